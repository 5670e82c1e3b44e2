// Dense projections and banks. A dense adapter is checked against the formulas; a routed bank against
// single adapters on the rows of each, bit for bit; a mixed bank against the sum of single adapters.
#pragma once

#include "../../csrc/cpu/launch.h"
#include "stored.h"

namespace compacter::check {

// The parameters of `count` adapters, one behind the other, or their gradients.
struct BankSide {
    Projection p;
    bool shared_rule;
    int64_t count, rules, lefts, rights, biases;  // the numbers of one adapter
    Tensor rule, left, right, bias;

    BankSide(const Case& c, bool down, bool dense, int64_t count, bool shared_rule)
        : shared_rule(shared_rule && !dense), count(count) {
        const int64_t n = down ? c.n_down : c.n_up, rank = down ? c.rank_down : c.rank_up;
        const int64_t in = down ? c.k : c.d, out = down ? c.d : c.k;
        p = dense ? Projection{0, 1, 1, 0, in, out, c.tokens % 2 == 1, {}} : Projection{n, n, n, rank, in, out, false, {}};
        rules = dense ? 0 : n * n * n;
        lefts = dense ? in * out : in * rank;
        rights = dense ? 0 : out * rank;
        biases = c.bias ? out : 0;
        rule = Tensor(rules * (this->shared_rule ? 1 : count), c.parameters);
        left = Tensor(lefts * count, c.parameters, c.offset);
        right = Tensor(rights * count, c.parameters);
        bias = Tensor(biases * count, c.parameters);
    }

    void randomise(std::mt19937& random) {
        if (rules) rule.randomise(random, 0.5);
        left.randomise(random, 1. / std::sqrt(double(p.in)));
        if (rights) right.randomise(random, 0.7);
        if (biases) bias.randomise(random, 0.3);
    }

    Parameters parameters() { return {rule.array(), left.array(), right.array(), bias.array()}; }

    Projection projection() {
        Projection own = p;
        own.weights = parameters();
        return own;
    }

    // One adapter's share of all tensors.
    Parameters of(int64_t adapter) {
        const auto at = [](Tensor& tensor, int64_t numbers) {
            Array array = tensor.array();
            if (array.data) array.data = static_cast<char*>(array.data) + numbers * Tensor::size(array.dtype);
            return array;
        };
        return {at(rule, shared_rule ? 0 : adapter * rules), at(left, adapter * lefts), at(right, adapter * rights), at(bias, adapter * biases)};
    }

    Projection adapter(int64_t index) {
        Projection own = p;
        own.weights = of(index);
        return own;
    }

    // A dense weight as the formulas know it: one term whose second factor is the identity.
    Weights dense_values() const {
        Weights w{1, p.out, p.in, p.out, {1.}, Numbers(static_cast<size_t>(p.in * p.out)), Numbers(static_cast<size_t>(p.out * p.out)), bias.values()};
        const Numbers stored = left.values();
        for (int64_t a = 0; a < p.in; ++a)
            for (int64_t b = 0; b < p.out; ++b) w.left[a * p.out + b] = stored[p.transposed ? b * p.in + a : a * p.out + b];
        for (int64_t b = 0; b < p.out; ++b) w.right[b * p.out + b] = 1.;
        return w;
    }

    bool same_bits(const BankSide& o) const {
        return rule.same_bits(o.rule) && left.same_bits(o.left) && right.same_bits(o.right) && bias.same_bits(o.bias);
    }
};

struct BankCase {
    const Case& c;
    int64_t count;
    BankSide down, up, d_down, d_up;
    Tensor x, g, other, out, dx;

    BankCase(const Case& c, bool dense, int64_t count, std::mt19937& random)
        : c(c), count(count),
          down(c, true, dense, count, c.tokens % 3 == 0), up(c, false, dense, count, c.tokens % 3 == 0),
          d_down(down), d_up(up),
          x(c.tokens * c.k, c.x, c.offset), g(x), other(x), out(x), dx(x) {
        down.randomise(random);
        up.randomise(random);
        x.randomise(random, 1.);
        g.randomise(random, 1.);
        other.randomise(random, 1.);
    }

    const Tensor* residual() const { return c.residual == Case::none ? nullptr : c.residual == Case::x_itself ? &x : &other; }
    const void* residual_data() const { return residual() ? residual()->data() : nullptr; }
    bool also_x() const { return c.residual == Case::both; }
    bool adds_x() const { return also_x() || c.residual == Case::x_itself; }

    Adapter whole() { return {down.projection(), up.projection(), c.activation, float(c.scale), c.x, c.tokens, x.data()}; }
    Bank bank() const { return {count, down.shared_rule, up.shared_rule, c.tokens, nullptr, {}}; }
};

inline void check_dense(const std::string& name, const Case& c, std::mt19937& random) {
    BankCase b(c, true, 1, random);
    const Adapter adapter = b.whole();
    cpu::forward(adapter, b.residual_data(), b.also_x(), b.out.data(), c.threads);
    cpu::backward(adapter, b.g.data(), b.dx.data(), b.adds_x(), b.d_down.parameters(), b.d_up.parameters(), c.threads);

    const Weights w1 = b.down.dense_values(), w2 = b.up.dense_values();
    const Numbers h1 = matrix(w1), h2 = matrix(w2), x = b.x.values(), g = b.g.values();
    const Numbers y = project(w1, h1, x, c.tokens);
    Numbers h = y, scaled = g;
    for (double& value : h) value = activation(c.activation, value);
    Numbers want = project(w2, h2, h, c.tokens);
    for (size_t j = 0; j < want.size(); ++j)
        want[j] = want[j] * adapter.scale + (b.residual() ? b.residual()->values()[j] : 0.) + (b.also_x() ? x[j] : 0.);
    expect(name, "out", b.out, want);
    for (double& value : scaled) value *= adapter.scale;
    Weights want_down, want_up;
    Numbers dy = project_backward(w2, h2, h, scaled, c.tokens, want_up);
    for (size_t j = 0; j < dy.size(); ++j) dy[j] *= activation_slope(c.activation, y[j]);
    Numbers want_dx = project_backward(w1, h1, x, dy, c.tokens, want_down);
    if (b.adds_x())
        for (size_t j = 0; j < want_dx.size(); ++j) want_dx[j] += g[j];
    expect(name, "dx", b.dx, want_dx);
    const auto turned = [](const BankSide& side, const Numbers& gradient) {
        Numbers stored(gradient.size());
        for (int64_t a = 0; a < side.p.in; ++a)
            for (int64_t v = 0; v < side.p.out; ++v)
                stored[side.p.transposed ? v * side.p.in + a : a * side.p.out + v] = gradient[a * side.p.out + v];
        return stored;
    };
    expect(name, "down", b.d_down.left, turned(b.down, want_down.left));
    expect(name, "up", b.d_up.left, turned(b.up, want_up.left));
    if (c.bias) {
        expect(name, "down bias", b.d_down.bias, want_down.bias);
        expect(name, "up bias", b.d_up.bias, want_up.bias);
    }
}

inline void check_routed(const std::string& name, const Case& c, bool dense, std::mt19937& random) {
    const int64_t count = 3;
    BankCase b(c, dense, count, random);
    std::vector<int64_t> route(static_cast<size_t>(c.tokens));
    for (int64_t& adapter : route) adapter = std::uniform_int_distribution<int64_t>(-1, count - 1)(random);
    Bank bank = b.bank();
    const int64_t nothing = 0;
    bank.route = c.tokens ? route.data() : &nothing;
    cpu::forward_routed(b.whole(), bank, b.residual_data(), b.also_x(), b.out.data(), c.threads);
    cpu::backward_routed(b.whole(), bank, b.g.data(), b.dx.data(), b.adds_x(), b.d_down.parameters(), b.d_up.parameters(), c.threads);

    // Each adapter alone, on its rows; -1 is what is added.
    BankCase alone(b);
    const int64_t row_bytes = c.k * Tensor::size(c.x);
    bool rows_equal = true, dx_equal = true;
    for (int64_t adapter = -1; adapter < count; ++adapter) {
        std::vector<int64_t> rows;
        for (int64_t t = 0; t < c.tokens; ++t)
            if (route[t] == adapter) rows.push_back(t);
        const int64_t tokens = static_cast<int64_t>(rows.size());
        const auto gathered = [&](const Tensor& from) {
            Tensor to(tokens * c.k, c.x);
            for (int64_t t = 0; t < tokens; ++t)
                std::memcpy(static_cast<char*>(to.data()) + t * row_bytes, static_cast<const char*>(from.data()) + rows[t] * row_bytes, row_bytes);
            return to;
        };
        Tensor x = gathered(b.x), g = gathered(b.g), other = gathered(b.other), out(tokens * c.k, c.x), dx = out;
        if (adapter >= 0) {
            const Adapter own{alone.down.adapter(adapter), alone.up.adapter(adapter), c.activation, float(c.scale), c.x, tokens, x.data()};
            const void* residual = c.residual == Case::none ? nullptr : c.residual == Case::x_itself ? x.data() : other.data();
            BankSide d_down = b.d_down, d_up = b.d_up;
            Parameters of_down = alone.d_down.of(adapter), of_up = alone.d_up.of(adapter);
            if (b.down.shared_rule) of_down.rule.data = of_up.rule.data = nullptr;
            cpu::forward(own, residual, b.also_x(), out.data(), 1);
            cpu::backward(own, g.data(), dx.data(), b.adds_x(), of_down, of_up, 1);
        } else {
            const Numbers added = other.values(), own = x.values(), of_g = g.values();
            out.fill([&](int64_t j) {
                return (c.residual == Case::none || c.residual == Case::x_itself ? 0. : added[j]) + (b.adds_x() ? own[j] : 0.);
            });
            dx.fill([&](int64_t j) { return b.adds_x() ? of_g[j] : 0.; });
        }
        rows_equal &= gathered(b.out).same_bits(out);
        dx_equal &= gathered(b.dx).same_bits(dx);
    }
    expect(name, "rows are those of single adapters", rows_equal);
    expect(name, "dx as well", dx_equal);
    if (c.threads > 1) return;
    if (b.down.shared_rule && c.tokens) {  // a sum over the adapters, which Python's tests check
        alone.d_down.rule = b.d_down.rule;
        alone.d_up.rule = b.d_up.rule;
    } else if (b.down.shared_rule) {
        alone.d_down.rule.fill([](int64_t) { return 0.; });
        alone.d_up.rule.fill([](int64_t) { return 0.; });
    }
    expect(name, "gradients of down", b.d_down.same_bits(alone.d_down));
    expect(name, "gradients of up", b.d_up.same_bits(alone.d_up));
}

inline void check_mixed(const std::string& name, const Case& c, bool dense, std::mt19937& random) {
    const int64_t count = 3;
    BankCase b(c, dense, count, random);
    Bank bank = b.bank();
    if (c.offset && c.tokens) bank.groups = c.tokens % 4 == 0 ? 4 : c.tokens % 3 == 0 ? 3 : 1;
    const int64_t per_group = bank.groups ? c.tokens / bank.groups : 1;
    Tensor drawn(c.tokens * count, c.parameters), mix(bank.groups * count, c.parameters), d_mix = mix;
    drawn.randomise(random, 1.);  // as many numbers, however many groups
    mix.fill([&](int64_t j) { return drawn.values()[j]; });
    bank.mix = mix.array();
    cpu::forward_mixed(b.whole(), bank, b.residual_data(), b.also_x(), b.out.data(), c.threads);
    cpu::backward_mixed(b.whole(), bank, b.g.data(), b.dx.data(), b.adds_x(), b.d_down.parameters(), b.d_up.parameters(), d_mix.array(),
                        c.threads);

    Numbers want(static_cast<size_t>(c.tokens * c.k)), want_mix(static_cast<size_t>(bank.groups * count));
    const Numbers weights = mix.values(), g = b.g.values();
    for (int64_t adapter = 0; adapter < count; ++adapter) {
        Tensor x(c.tokens * c.k, DType::f32), out = x;
        const Numbers values = b.x.values();
        x.fill([&](int64_t j) { return values[j]; });
        cpu::forward(Adapter{b.down.adapter(adapter), b.up.adapter(adapter), c.activation, float(c.scale), DType::f32, c.tokens, x.data()},
                     nullptr, false, out.data(), 1);
        const Numbers own = out.values();
        for (int64_t j = 0; j < c.tokens * c.k; ++j) {
            const int64_t weight = j / c.k / per_group * count + adapter;
            want[j] += weights[weight] * own[j];
            want_mix[weight] += g[j] * own[j];
        }
    }
    for (int64_t j = 0; j < c.tokens * c.k; ++j)
        want[j] += (b.residual() ? b.residual()->values()[j] : 0.) + (b.also_x() ? b.x.values()[j] : 0.);
    expect(name, "out", b.out, want);
    expect(name, "mix", d_mix, want_mix);
}

}  // namespace compacter::check
