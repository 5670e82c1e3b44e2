// Runs every kernel of every instruction set that this processor has against plain fp64 loops, in exactly sized buffers
// poisoned with NaN; meant to be built with the address and undefined-behaviour sanitizers.
#include <cstdio>

#include "../../csrc/cpu/isa.h"
#include "../../csrc/cpu/launch.h"
#include "family_check.h"
#include "stored.h"
#include "wide_check.h"

namespace compacter::check {
namespace {

void check_linear(const std::string& name, const Case& c, std::mt19937& random) {
    Stored weights(c, true), grads(c, true), again(c, true);
    weights.randomise(random);
    Tensor x(c.tokens * c.k, c.x, c.offset), g(c.tokens * c.d, c.x, c.offset), out = g, dx = x;
    x.randomise(random, 1.);
    g.randomise(random, 1.);
    if (c.some_gradients) drop_some(grads), drop_some(again), dx = Tensor();
    const Linear linear{weights.projection(), c.x, c.tokens, x.data()};
    cpu::forward(linear, nullptr, out.data(), c.threads);
    cpu::backward(linear, g.data(), dx.data(), grads.parameters(), c.threads);
    cpu::backward(linear, g.data(), dx.data(), again.parameters(), c.threads);

    const Weights w = weights.values();
    const Numbers h = matrix(w);
    Weights want;
    expect(name, "out", out, project(w, h, x.values(), c.tokens));
    const Numbers want_dx = project_backward(w, h, x.values(), g.values(), c.tokens, want);
    if (!c.some_gradients) expect(name, "dx", dx, want_dx);
    expect_gradients(name, grads, want);
    expect(name, "repeats bitwise", grads.same_bits(again));
}

// The norm's weight and bias in the dtype of x, and the two tensors that a call hands over for it.
struct StoredNorm {
    Tensor weight, bias, y, grad_y;

    StoredNorm(const Case& c, std::mt19937& random)
        : weight(c.k, c.x, c.offset), bias(c.k, c.x, c.offset), y(c.tokens * c.k, c.x, c.offset), grad_y(y) {
        weight.randomise(random, 1.);
        bias.randomise(random, 0.5);
    }

    LayerNorm norm() { return {weight.array(), bias.array(), 1e-5f, y.data(), grad_y.data()}; }
};

// With a norm, each step is checked from what the step before it stored.
void check_adapter(const std::string& name, const Case& c, bool normed, std::mt19937& random) {
    Stored down(c, true), up(c, false), d_down(c, true), d_up(c, false);
    down.randomise(random);
    up.randomise(random);
    Tensor x(c.tokens * c.k, c.x, c.offset), g = x, other = x, out = x, dx = x;
    x.randomise(random, 1.);
    g.randomise(random, 1.);
    other.randomise(random, 1.);
    if (c.some_gradients) drop_some(d_down), drop_some(d_up), dx = Tensor();
    const Adapter adapter{down.projection(), up.projection(), c.activation, float(c.scale), c.x, c.tokens, x.data()};
    const Tensor* residual = c.residual == Case::none ? nullptr : c.residual == Case::x_itself ? &x : &other;
    const bool also_x = c.residual == Case::both;
    StoredNorm n(c, random);
    const LayerNorm norm = n.norm();
    cpu::forward(adapter, residual ? residual->data() : nullptr, also_x, out.data(), c.threads, normed ? &norm : nullptr);
    cpu::backward(adapter, g.data(), dx.data(), c.residual == Case::x_itself || also_x, d_down.parameters(), d_up.parameters(), c.threads,
                  normed ? &norm : nullptr);

    const Weights w1 = down.values(), w2 = up.values();
    const Numbers h1 = matrix(w1), h2 = matrix(w2);
    const Numbers y = project(w1, h1, x.values(), c.tokens);
    Numbers h = y, want_out;
    for (double& value : h) value = activation(c.activation, value);
    want_out = project(w2, h2, h, c.tokens);
    for (size_t j = 0; j < want_out.size(); ++j)
        want_out[j] = want_out[j] * adapter.scale + (residual ? residual->values()[j] : 0.) + (also_x ? x.values()[j] : 0.);
    expect(name, "out", normed ? n.y : out, want_out);
    if (normed) {
        const Rows rows(n.y.values(), c.k, norm.eps);
        expect(name, "normed", out, rows.normed(n.weight.values(), n.bias.values()));
        if (c.k > 1)  // of a single number it is 0 but for rounding
            expect(name, "dy", n.grad_y, rows.backward(n.weight.values(), g.values()));
        Tensor in_place = out;
        LayerNorm over = norm;
        over.y = in_place.data();
        cpu::forward(adapter, residual ? residual->data() : nullptr, also_x, in_place.data(), c.threads, &over);
        expect(name, "normed in place", in_place.same_bits(out));

        over = norm;
        over.grad_y = n.y.data();
        Stored again_down(c, true), again_up(c, false);
        Tensor again = dx;
        cpu::backward(adapter, g.data(), again.data(), c.residual == Case::x_itself || also_x, again_down.parameters(), again_up.parameters(),
                      c.threads, &over);
        expect(name, "dy in place of y", n.y.same_bits(n.grad_y) && again.same_bits(dx));
    }

    const Numbers grad = (normed ? n.grad_y : g).values();
    Numbers scaled = grad;
    for (double& value : scaled) value *= adapter.scale;
    Weights want_down, want_up;
    Numbers dy = project_backward(w2, h2, h, scaled, c.tokens, want_up);
    for (size_t j = 0; j < dy.size(); ++j) dy[j] *= activation_slope(c.activation, y[j]);
    Numbers want_dx = project_backward(w1, h1, x.values(), dy, c.tokens, want_down);
    if (c.residual == Case::x_itself || also_x)
        for (size_t j = 0; j < want_dx.size(); ++j) want_dx[j] += grad[j];
    if (!c.some_gradients) expect(name, "dx", dx, want_dx);
    expect_gradients(name + " down", d_down, want_down);
    expect_gradients(name + " up", d_up, want_up);
}

// A NaN in one token's x is NaN in that token's whole output row, and nowhere else.
void check_nan(const std::string& name, Activation activation) {
    Case c{48, 24, 4, 4, 1, 1, 21};
    std::mt19937 random(7);
    Stored down(c, true), up(c, false);
    down.randomise(random);
    up.randomise(random);
    Tensor x(c.tokens * c.k, DType::f32), out = x;
    const int64_t poisoned = 18;
    x.fill([&](int64_t j) { return j == poisoned * c.k + 5 ? NAN : double(j % 7) - 3.; });
    cpu::forward(Adapter{down.projection(), up.projection(), activation, 1.f, c.x, c.tokens, x.data()}, x.data(), false, out.data(), 1);
    bool right = true;
    const Numbers values = out.values();
    for (int64_t j = 0; j < c.tokens * c.k; ++j) right &= std::isnan(values[j]) == (j / c.k == poisoned);
    expect(name, "NaN", right);
}

}  // namespace
}  // namespace compacter::check

int main() {
    using namespace compacter;
    for (const std::string& isa : cpu::supported_isas()) {
        cpu::set_isa(isa);
        check::check_wide(isa);
        std::mt19937 random(1);
        bool dense = false;  // in turns
        for (const check::Case& c : check::cases()) {
            check::check_linear(isa + " linear " + c.name(), c, random);
            for (const bool normed : {false, true})
                check::check_adapter(isa + (normed ? " normed adapter " : " adapter ") + c.name(), c, normed, random);
            dense = !dense;
            const std::string kind = isa + (dense ? " dense " : " ");
            if (dense) check::check_dense(kind + c.name(), c, random);
            check::check_routed(kind + "routed " + c.name(), c, dense, random);
            check::check_mixed(kind + "mixed " + c.name(), c, dense, random);
        }
        for (int code = 0; code < activations; ++code)
            check::check_nan(isa + " activation " + std::to_string(code), static_cast<Activation>(code));
    }
    std::printf("%d passed, %d failed\ndigest of the results: %016llx\n", check::passed, check::failed,
                static_cast<unsigned long long>(check::digest));
    return check::failed != 0;
}
