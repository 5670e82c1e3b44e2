// Divides a problem of the family for a device. On the host.
#pragma once

#include "family.h"
#include "plan.h"

namespace compacter::cuda {

// An adapter, a bank of them, or one projection (up == nullptr).
struct FamilyProblem {
    Problem problem;
    const Bank* bank;  // or null
};

FamilyProblem family_of(const Linear& linear);
FamilyProblem family_of(const Adapter& adapter, const Bank* bank);

// The numbers of the wide gradients of one adapter in a row of partials, in the order left, right2, bias2, and those of the
// small ones, in the order rule, right, bias, rule2, left2.
struct FamilySizes {
    int left, right2, bias2;
    int rule, right, bias, rule2, left2;

    explicit FamilySizes(const Family& f);
    int64_t wide() const { return int64_t{left} + right2 + bias2; }
    int64_t small() const { return int64_t{rule} + right + bias + rule2 + left2; }
};

// Which gradients a backward computes. A mix that is not wanted has none.
struct Wanted {
    bool x, small, left, right, mix;
};

// The arguments of the kernels, without pointers, and their launches, which may exceed the shared memory.
struct PlannedFamilyForward {
    FamilyForward arguments;
    Launch launch;
};
struct PlannedFamilyBackward {
    FamilyBackward rows;
    FamilyWeights weights;
    Launch rows_launch, weights_launch;
};
PlannedFamilyForward plan_family_forward(const FamilyProblem& problem, const Device& device);
PlannedFamilyBackward plan_family_backward(const FamilyProblem& problem, const Device& device, const Wanted& wanted);

// Whether the forward for pairs of chunks serves a routed bank: as for one adapter, in groups of whole tiles. The addresses
// of x, the residual and the output must be multiples of 16 too.
bool routed_pairs_serve(const FamilyProblem& problem);
RoutedPairForward plan_routed_pairs(const FamilyProblem& problem, const Device& device, Launch& launch);

// The same for the folded backward, which knows fewer sizes, and computes all gradients of the parameters.
bool plan_routed_backward(RoutedBackward& backward, const FamilyProblem& problem, const Device& device, Launch& launch);

// The launch that makes the images, and how many there are.
int images_of(const Family& family);
FamilyImages plan_images(const Family& family, const FamilyPlaces& places, Launch& launch);

// The launch that makes the table of a routed bank.
FamilyTable plan_table(const Tiling& tiling, const FamilyProblem& problem, const Device& device, Launch& launch);

}  // namespace compacter::cuda
