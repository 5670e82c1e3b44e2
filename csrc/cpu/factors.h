// Converts the parameters of a projection for the kernels, and the gradients for the caller.
#pragma once

#include "kernels.h"
#include "scratch.h"

namespace compacter::cpu {

// The side of an adapter on which a projection stands; any side serves for a projection alone.
enum class Side { down, up };

// A projection with the tensors of `count` adapters, one behind the other, which are staged
// together. A shared rule stands there once.
class Staging {
public:
    Staging(const Projection& projection, Side side, float scale, int64_t count = 1, bool shared_rule = false)
        : p(projection), side(side), scale(scale), count(count), shared_rule(shared_rule) {}

    int64_t floats() const;                    // of the room that stage takes
    Factors sizes() const;                     // of one adapter, without memory
    void stage(Room& room, Factors& f) const;    // scales right and bias

    // The sums of one part are one row.
    int64_t sums_floats(const Parameters& gradients) const;
    Sums place_sums(const Parameters& gradients, float* row) const;

    // Adds `parts` rows in order and writes each gradient in its own dtype, or all but the rule's,
    // or that alone.
    void write(const Parameters& gradients, float* rows, int64_t stride, int64_t parts) const;
    void write_rule(const Parameters& gradients, float* rows, int64_t stride, int64_t parts) const;
    void write_others(const Parameters& gradients, float* rows, int64_t stride, int64_t parts) const;

private:
    // `matrices` matrices of a tensor, which are staged transposed if they are turned.
    struct Wide {
        Array array;
        int64_t matrices, rows, columns;
        bool turned;

        int64_t numbers() const { return matrices * rows * columns; }
    };

    bool dense() const { return p.dense(); }
    int64_t rule_numbers() const { return dense() ? 0 : p.terms * p.n_in * p.n_out * (shared_rule ? 1 : count); }
    int64_t bias_numbers() const { return p.out * count; }
    Wide left(const Parameters& of) const;
    Wide right(const Parameters& of) const;
    bool right_wanted(const Parameters& gradients) const;

    const Projection& p;
    Side side;
    float scale;
    int64_t count;
    bool shared_rule;
};

// The parameters of one adapter, or its gradients, of those of a bank. A null stays null.
Parameters adapter_of(const Projection& p, const Parameters& of_bank, int64_t adapter, bool shared_rule);

int64_t staged_floats(const LayerNorm& norm, int64_t k);
Norm stage(const LayerNorm& norm, int64_t k, Room& room);

}  // namespace compacter::cpu
