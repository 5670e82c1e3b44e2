#include "factors.h"

#include "convert.h"

namespace compacter::cpu {
namespace {

struct Sizes {
    int64_t rule, left, right, bias;
};

Sizes sizes(const Projection& p) { return {p.n * p.n * p.n, p.in * p.rank, p.out * p.rank, p.out}; }

// left is [i][u][rho], the kernels read [i][rho][u]. Visits (offset in left, offset in factors).
template <class Body>
void for_each_left(const Projection& p, const Body& body) {
    const int64_t chunk = p.in / p.n;
    for (int64_t i = 0; i < p.n; ++i)
        for (int64_t rho = 0; rho < p.rank; ++rho)
            for (int64_t u = 0; u < chunk; ++u) body((i * chunk + u) * p.rank + rho, (i * p.rank + rho) * chunk + u);
}

bool usable_as_is(const Array& array, float scale) { return !array.data || (array.dtype == DType::f32 && scale == 1.f); }
bool left_usable_as_is(const Projection& p) { return p.rank == 1 && usable_as_is(p.weights.left, 1.f); }

const float* staged(const Array& array, int64_t count, float scale, Scratch& scratch) {
    if (usable_as_is(array, scale)) return static_cast<const float*>(array.data);
    float* to = scratch.take(count);
    with_number(array.dtype, [&](auto zero) {
        const auto* from = static_cast<const decltype(zero)*>(array.data);
        for (int64_t j = 0; j < count; ++j) to[j] = from[j].get() * scale;
    });
    return to;
}

const float* staged_left(const Projection& p, Scratch& scratch) {
    if (left_usable_as_is(p)) return static_cast<const float*>(p.weights.left.data);
    float* to = scratch.take(p.in * p.rank);
    with_number(p.weights.left.dtype, [&](auto zero) {
        const auto* from = static_cast<const decltype(zero)*>(p.weights.left.data);
        for_each_left(p, [&](int64_t source, int64_t target) { to[target] = from[source].get(); });
    });
    return to;
}

// sums[0][j] = (sums[0][j] + sums[1][j] + ...) * scale
void add_parts(float* sums, int64_t count, float scale, int64_t stride, int64_t parts) {
    for (int64_t part = 1; part < parts; ++part)
        for (int64_t j = 0; j < count; ++j) sums[j] += sums[part * stride + j];
    if (scale != 1.f)
        for (int64_t j = 0; j < count; ++j) sums[j] *= scale;
}

void write(const Array& array, const float* sums, int64_t count) {
    if (!array.data) return;
    with_number(array.dtype, [&](auto zero) {
        auto* to = static_cast<decltype(zero)*>(array.data);
        for (int64_t j = 0; j < count; ++j) to[j].set(sums[j]);
    });
}

void write_left(const Projection& p, const Array& array, const float* sums) {
    with_number(array.dtype, [&](auto zero) {
        auto* to = static_cast<decltype(zero)*>(array.data);
        for_each_left(p, [&](int64_t target, int64_t source) { to[target].set(sums[source]); });
    });
}

}  // namespace

int64_t staged_floats(const Projection& p, float scale) {
    const Sizes count = sizes(p);
    const auto unless = [](bool as_is, int64_t floats) { return as_is ? 0 : Scratch::padded(floats); };
    return unless(usable_as_is(p.weights.rule, 1.f), count.rule) + unless(left_usable_as_is(p), count.left) +
           unless(usable_as_is(p.weights.right, scale), count.right) + unless(usable_as_is(p.weights.bias, scale), count.bias);
}

Factors dimensions(const Projection& p) {
    return {p.n, p.rank, p.n * p.rank, p.in, p.out, nullptr, nullptr, nullptr, nullptr};
}

void stage(const Projection& p, float scale, Scratch& scratch, Factors& f) {
    const Sizes count = sizes(p);
    f.rule = staged(p.weights.rule, count.rule, 1.f, scratch);
    f.left = staged_left(p, scratch);
    f.right = staged(p.weights.right, count.right, scale, scratch);
    f.bias = staged(p.weights.bias, count.bias, scale, scratch);
}

int64_t staged_floats(const LayerNorm& norm, int64_t k) {
    return (usable_as_is(norm.weight, 1.f) ? 0 : Scratch::padded(k)) + (usable_as_is(norm.bias, 1.f) ? 0 : Scratch::padded(k));
}

Norm stage(const LayerNorm& norm, int64_t k, Scratch& scratch) {
    return {staged(norm.weight, k, 1.f, scratch), staged(norm.bias, k, 1.f, scratch), norm.eps};
}

int64_t sums_floats(const Projection& p, const Parameters& gradients) {
    const Sizes count = sizes(p);
    const auto if_wanted = [](bool wanted, int64_t floats) { return wanted ? Scratch::padded(floats) : 0; };
    const bool right = gradients.right.data || gradients.bias.data;
    return if_wanted(gradients.rule.data, count.rule) + if_wanted(gradients.left.data, count.left) +
           if_wanted(right, count.right) + if_wanted(right, count.bias);
}

Sums place_sums(const Projection& p, const Parameters& gradients, float* row) {
    const Sizes count = sizes(p);
    const auto place = [&](bool wanted, int64_t floats) -> float* {
        if (!wanted) return nullptr;
        float* here = row;
        row += Scratch::padded(floats);
        return here;
    };
    const bool right = gradients.right.data || gradients.bias.data;
    Sums sums{};
    sums.rule = place(gradients.rule.data, count.rule);
    sums.left = place(gradients.left.data, count.left);
    sums.right = place(right, count.right);
    sums.bias = place(right, count.bias);
    return sums;
}

void write_gradients(const Projection& p, const Parameters& gradients, float scale, float* rows, int64_t stride,
                     int64_t parts) {
    const Sizes count = sizes(p);
    const Sums sums = place_sums(p, gradients, rows);
    if (sums.rule) {
        add_parts(sums.rule, count.rule, 1.f, stride, parts);
        write(gradients.rule, sums.rule, count.rule);
    }
    if (sums.left) {
        add_parts(sums.left, count.left, 1.f, stride, parts);
        write_left(p, gradients.left, sums.left);
    }
    if (sums.right) {
        add_parts(sums.right, count.right, scale, stride, parts);
        add_parts(sums.bias, count.bias, scale, stride, parts);
        write(gradients.right, sums.right, count.right);
        write(gradients.bias, sums.bias, count.bias);
    }
}

}  // namespace compacter::cpu
