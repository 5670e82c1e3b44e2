#include "factors.h"

#include <algorithm>

#include "convert.h"

namespace compacter::cpu {
namespace {

bool usable_as_is(const Array& array, float scale) { return !array.data || (array.dtype == DType::f32 && scale == 1.f); }

// Visits (offset in matrices [rows][columns], offset in the transposed ones) in small squares.
template <class Body>
void for_each_turned(int64_t matrices, int64_t rows, int64_t columns, const Body& body) {
    constexpr int64_t square = 16;
    for (int64_t first = 0; first < matrices * rows * columns; first += rows * columns)
        for (int64_t r = 0; r < rows; r += square)
            for (int64_t c = 0; c < columns; c += square)
                for (int64_t j = c; j < std::min(c + square, columns); ++j)
                    for (int64_t i = r; i < std::min(r + square, rows); ++i)
                        body(first + i * columns + j, first + j * rows + i);
}

const float* staged(const Array& array, int64_t count, float scale, Room& room) {
    if (usable_as_is(array, scale)) return static_cast<const float*>(array.data);
    float* to = room.take(count);
    with_number(array.dtype, [&](auto zero) {
        const auto* from = static_cast<const decltype(zero)*>(array.data);
        for (int64_t j = 0; j < count; ++j) to[j] = from[j].get() * scale;
    });
    return to;
}

// sums[0][j] = (sums[0][j] + sums[1][j] + ...) * scale. Sums of no parts stay as they are, for other threads.
void add_parts(float* sums, int64_t count, float scale, int64_t stride, int64_t parts) {
    for (int64_t part = 1; part < parts; ++part)
        for (int64_t j = 0; j < count; ++j) sums[j] += sums[part * stride + j];
    if (parts && scale != 1.f)
        for (int64_t j = 0; j < count; ++j) sums[j] *= scale;
}

void write_numbers(const Array& array, const float* sums, int64_t count) {
    if (!array.data) return;
    with_number(array.dtype, [&](auto zero) {
        auto* to = static_cast<decltype(zero)*>(array.data);
        for (int64_t j = 0; j < count; ++j) to[j].set(sums[j]);
    });
}

}  // namespace

Staging::Wide Staging::left(const Parameters& of) const {
    if (!dense()) return {of.left, p.terms * count, p.in / p.n_in, p.rank, p.rank != 1};
    if (side == Side::up) return {};
    return {of.left, count, p.in, p.out, !p.transposed};
}

Staging::Wide Staging::right(const Parameters& of) const {
    if (!dense()) return {of.right, p.terms * p.rank * count, 1, p.out / p.n_out, false};
    if (side == Side::down) return {};
    return {of.left, count, p.out, p.in, p.transposed};
}

bool Staging::right_wanted(const Parameters& gradients) const {
    return right(gradients).array.data || (gradients.bias.data && !(dense() && side == Side::down));
}

int64_t Staging::floats() const {
    const Wide l = left(p.weights), r = right(p.weights);
    const auto unless = [](bool as_is, int64_t floats) { return as_is ? 0 : Scratch::padded(floats); };
    return unless(usable_as_is(p.weights.rule, 1.f), rule_numbers()) +
           unless(!l.turned && usable_as_is(l.array, 1.f), l.numbers()) +
           unless(!r.turned && usable_as_is(r.array, scale), r.numbers()) +
           unless(usable_as_is(p.weights.bias, scale), bias_numbers());
}

Factors Staging::sizes() const {
    const int64_t m = !dense() ? p.terms * p.rank : side == Side::down ? p.out : p.in;
    return {p.n_in, p.n_out, p.rank, m, p.in, p.out, nullptr, nullptr, nullptr, nullptr};
}

void Staging::stage(Room& room, Factors& f) const {
    const auto wide = [&](const Wide& w, float factor) {
        if (!w.turned) return staged(w.array, w.numbers(), factor, room);
        float* to = room.take(w.numbers());
        with_number(w.array.dtype, [&](auto zero) {
            const auto* from = static_cast<const decltype(zero)*>(w.array.data);
            for_each_turned(w.matrices, w.rows, w.columns,
                            [&](int64_t source, int64_t target) { to[target] = from[source].get() * factor; });
        });
        return static_cast<const float*>(to);
    };
    f.rule = staged(p.weights.rule, rule_numbers(), 1.f, room);
    f.left = wide(left(p.weights), 1.f);
    f.right = wide(right(p.weights), scale);
    f.bias = staged(p.weights.bias, bias_numbers(), scale, room);
}

int64_t Staging::sums_floats(const Parameters& gradients) const {
    const auto if_wanted = [](bool wanted, int64_t floats) { return wanted ? Scratch::padded(floats) : 0; };
    const bool right_and_bias = right_wanted(gradients);
    return if_wanted(gradients.rule.data, rule_numbers()) + if_wanted(left(gradients).array.data, left(gradients).numbers()) +
           if_wanted(right_and_bias, right(gradients).numbers()) + if_wanted(right_and_bias || gradients.bias.data, bias_numbers());
}

Sums Staging::place_sums(const Parameters& gradients, float* row) const {
    const auto place = [&](bool wanted, int64_t floats) -> float* {
        if (!wanted) return nullptr;
        float* here = row;
        row += Scratch::padded(floats);
        return here;
    };
    const bool right_and_bias = right_wanted(gradients);
    Sums sums{};
    sums.rule = place(gradients.rule.data, rule_numbers());
    sums.left = place(left(gradients).array.data, left(gradients).numbers());
    sums.right = place(right_and_bias, right(gradients).numbers());
    sums.bias = place(right_and_bias || gradients.bias.data, bias_numbers());
    return sums;
}

void Staging::write(const Parameters& gradients, float* rows, int64_t stride, int64_t parts) const {
    write_rule(gradients, rows, stride, parts);
    write_others(gradients, rows, stride, parts);
}

void Staging::write_rule(const Parameters& gradients, float* rows, int64_t stride, int64_t parts) const {
    const Sums sums = place_sums(gradients, rows);
    if (!sums.rule) return;
    add_parts(sums.rule, rule_numbers(), 1.f, stride, parts);
    write_numbers(gradients.rule, sums.rule, rule_numbers());
}

void Staging::write_others(const Parameters& gradients, float* rows, int64_t stride, int64_t parts) const {
    const Sums sums = place_sums(gradients, rows);
    const auto add = [&](float* first, int64_t numbers, float factor) { add_parts(first, numbers, factor, stride, parts); };
    const auto wide = [](const Wide& w, const float* from) {
        if (!w.array.data) return;
        if (!w.turned) return write_numbers(w.array, from, w.numbers());
        with_number(w.array.dtype, [&](auto zero) {
            auto* to = static_cast<decltype(zero)*>(w.array.data);
            for_each_turned(w.matrices, w.rows, w.columns, [&](int64_t target, int64_t source) { to[target].set(from[source]); });
        });
    };
    if (sums.left) {
        add(sums.left, left(gradients).numbers(), 1.f);
        wide(left(gradients), sums.left);
    }
    if (sums.right) {
        add(sums.right, right(gradients).numbers(), scale);
        wide(right(gradients), sums.right);
    }
    if (sums.bias) {
        add(sums.bias, bias_numbers(), scale);
        write_numbers(gradients.bias, sums.bias, bias_numbers());
    }
}

Parameters adapter_of(const Projection& p, const Parameters& of_bank, int64_t adapter, bool shared_rule) {
    const auto after = [](const Array& array, int64_t numbers) {
        Array own = array;
        if (own.data) own.data = static_cast<char*>(own.data) + numbers * size_of(own.dtype);
        return own;
    };
    const int64_t rule = p.terms * p.n_in * p.n_out;
    const int64_t left = p.dense() ? p.in * p.out : p.terms * (p.in / p.n_in) * p.rank;
    const int64_t right = p.terms * p.rank * (p.out / p.n_out);
    return {after(of_bank.rule, shared_rule ? 0 : adapter * rule), after(of_bank.left, adapter * left),
            after(of_bank.right, adapter * right), after(of_bank.bias, adapter * p.out)};
}

int64_t staged_floats(const LayerNorm& norm, int64_t k) {
    return (usable_as_is(norm.weight, 1.f) ? 0 : Scratch::padded(k)) + (usable_as_is(norm.bias, 1.f) ? 0 : Scratch::padded(k));
}

Norm stage(const LayerNorm& norm, int64_t k, Room& room) {
    return {staged(norm.weight, k, 1.f, room), staged(norm.bias, k, 1.f, room), norm.eps};
}

}  // namespace compacter::cpu
