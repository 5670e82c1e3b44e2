// The middle of an adapter in the lane layout, from Z, the contraction of x, to V2, which is
// expanded; and back from dV2 to dZ. One class for each kind of adapter:
//     z()                     the memory of Z
//     forward()               V2 of Z
//     forward_with_slopes()   the same, and all that backward needs
//     dv2()                   the memory of dV2
//     backward(down, up)      dZ of dV2; adds the gradients of the narrow weights to the sums
//     flush(down, up)         adds what backward has kept
#pragma once

#include "arena.h"
#include "bottleneck.h"
#include "rule_grad.h"

namespace compacter::COMPACTER_ISA {

using cpu::Sums;

// Two sums of Kronecker products. The names are those of the formulas; those of up end in 2.
class KroneckerMiddle {
public:
    KroneckerMiddle(const Factors& down, const Factors& up, Activation activation, Arena& arena)
        : down(down), up(up), activation(activation),
          dz(arena.take(down.n_in * down.m * lanes)),
          v(arena.take(down.n_out * down.m * lanes)),
          dz2(arena.take(up.n_in * up.m * lanes)),
          v2(arena.take(up.n_out * up.m * lanes)),
          h(arena.take(down.out * lanes)),
          slope(arena.take(down.out * lanes)),
          dh(arena.take(down.out * lanes)),
          rule(down, arena), rule2(up, arena) {}

    float* z() { return rule.z(); }
    float* dv2() { return rule2.dv(); }

    float* forward() {
        mix(down, rule.z(), v);
        preactivation(down, v, h);
        activate(activation, h, down.out);
        contract_bottleneck(up, h, rule2.z());
        mix(up, rule2.z(), v2);
        return v2;
    }

    float* forward_with_slopes() {
        mix(down, rule.z(), v);
        preactivation(down, v, h);
        activate_with_slope(activation, h, slope, down.out);
        contract_bottleneck(up, h, rule2.z());
        mix(up, rule2.z(), v2);
        return v2;
    }

    float* backward(const Sums& down_sums, const Sums& up_sums) {
        mix_transposed(up, rule2.dv(), dz2);
        rule2.next(up_sums.rule);
        if (up_sums.left) left_gradient(up, h, dz2, up_sums.left);
        float* dy = slope;
        preactivation_gradient(up, dz2, dh, dy);
        if (down_sums.right) right_gradient(down, v, dy, down_sums.right);
        if (down_sums.bias) bias_gradient(dy, down.out, down_sums.bias);
        expand_transposed(down, dy, rule.dv());
        mix_transposed(down, rule.dv(), dz);
        rule.next(down_sums.rule);
        return dz;
    }

    void flush(const Sums& down_sums, const Sums& up_sums) {
        rule.flush(down_sums.rule);
        rule2.flush(up_sums.rule);
    }

private:
    const Factors &down, &up;
    Activation activation;
    float *dz, *v, *dz2, *v2, *h, *slope, *dh;
    RuleGradient rule, rule2;
};

// Two dense projections: Z = x W1, V2 = act(Z + b1), dZ = act'(Z + b1) dV2.
class DenseMiddle {
public:
    DenseMiddle(const Factors& down, const Factors&, Activation activation, Arena& arena)
        : down(down), activation(activation),
          h(arena.take(down.out * lanes)),
          slope(arena.take(down.out * lanes)),
          dh(arena.take(down.out * lanes)) {}

    float* z() { return h; }
    float* dv2() { return dh; }

    float* forward() {
        add_bias();
        activate(activation, h, down.out);
        return h;
    }

    float* forward_with_slopes() {
        add_bias();
        activate_with_slope(activation, h, slope, down.out);
        return h;
    }

    float* backward(const Sums& down_sums, const Sums&) {
        for (int64_t j = 0; j < down.out * lanes; j += W) store(slope + j, load(slope + j) * load(dh + j));
        if (down_sums.bias) bias_gradient(slope, down.out, down_sums.bias);
        return slope;
    }

    void flush(const Sums&, const Sums&) {}

private:
    void add_bias() {
        if (!down.bias) return;
        for (int64_t j = 0; j < down.out; ++j)
            for (int l = 0; l < lanes; l += W) store(h + j * lanes + l, load(h + j * lanes + l) + down.bias[j]);
    }

    const Factors& down;
    Activation activation;
    float *h, *slope, *dh;
};

}  // namespace compacter::COMPACTER_ISA
