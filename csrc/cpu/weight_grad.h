// The gradients of the wide factors:
//     G_c[u] += sum_{token,q} V[q,c] g[q,u]        bias[q,u] += sum_token g[q,u]
//
// A strip of a few vectors u of all rows is read once. The first tile of rows c copies it side by
// side, and the other tiles read the copy: rows of g that lie a multiple of 4 KiB apart would drive
// one another out of the first cache.
//
// The sums of many rows c exceed the first cache. They lie strip by strip in memory of their own
// until flush(), and several blocks are added at once, so that they are read and written less often.
//
// There V may be rounded to bf16, if g is in bf16 and the processor multiplies pairs of such numbers
// (has_dot). Then two tokens are added at once.
#pragma once

#include "element.h"
#include "lanes.h"

namespace compacter::COMPACTER_ISA {

// The blocks of rows that a WeightGradient of m rows c keeps until it adds them.
constexpr int64_t kept_blocks(int64_t m) { return m > 12 ? 4 : 1; }

template <class T>
class WeightGradient {
public:
    // `sum` is [m][chunk]; `bias_sum` is [n * chunk] or null. `scratch` has size(n, m, chunk) floats, which
    // few `rows` do not use. Without `sum` nothing may be added. `pairs`: whether V may be rounded.
    WeightGradient(int64_t n, int64_t m, int64_t chunk, float* sum, float* bias_sum, float* scratch, int64_t rows, bool pairs)
        : n(n), m(m), chunk(chunk), sum(sum), bias_sum(bias_sum), strips(sum && many(m) && rows > 8 * lanes ? scratch : nullptr),
          paired(has_dot<T> && pairs && strips) {
        if (!strips) return;
        kept = strips + strip_floats();
        for (int64_t j = 0; j < strip_floats(); ++j) strips[j] = 0.f;
    }

    static int64_t size(int64_t n, int64_t m, int64_t chunk) {
        return many(m) ? m * round_up(chunk, W) + batch * n * m * lanes : 0;
    }

    // Adds `tokens` <= 16 rows of g, which must stay as they are for kept_blocks(m) blocks or until
    // flush(). Sums start at 0 in each of these: two levels of summation reduce the error of long sums.
    void operator()(const float* v, const T* g, int64_t tokens, const T* next) {
        if (!strips) {
            const Block block{v, g, tokens};
            return add(&block, 1, next ? next - g : 0);
        }
        float* copy = kept + used * n * m * lanes;
        if (paired)
            round(v, tokens, reinterpret_cast<bf16*>(copy));
        else
            std::memcpy(copy, v, static_cast<size_t>(n * m * lanes) * sizeof(float));
        blocks[used++] = {copy, g, tokens};
        if (used == batch) add_kept();
    }

    // To be called after the last block.
    void flush() {
        add_kept();
        if (!strips) return;
        const float* from = strips;
        columns<strip_vectors, 1>(chunk, [&](auto vectors, int64_t u, auto cut, int64_t count) {
            constexpr int U = decltype(vectors)::value;
            for (int64_t c = 0; c < m; ++c, from += U * W)
                COMPACTER_UNROLL(4)
                for (int k = 0; k < U; ++k)
                    add_to<decltype(cut)::value>(sum + c * chunk + u + k * W, load(from + k * W), count);
        });
    }

private:
    // V in bf16; of an odd number of tokens, the one that completes the last pair is 0.
    void round(const float* v, int64_t tokens, bf16* to) const {
        for (int64_t j = 0; j < n * m * lanes; j += W) store(to + j, load(v + j));
        if (tokens % 2)
            for (int64_t j = tokens; j < n * m * lanes; j += lanes) to[j] = {};
    }

    // Adds the blocks that were kept.
    void add_kept() {
        const int count = used;
        used = 0;
        if (count) add(blocks, count, 0);
    }

    static constexpr int batch = kept_blocks(INT64_MAX);
    static constexpr int most = 8;  // chunks of a strip at once
    static constexpr int strip_vectors = W == 4 && many_registers ? 4 : 2;

    static bool many(int64_t m) { return kept_blocks(m) > 1; }
    int64_t strip_floats() const { return m * round_up(chunk, W); }

    // The rows of a block, or one chunk of them: its coefficients and numbers.
    struct Block {
        const float* coef;
        const T* g;
        int64_t tokens;
    };
    struct Chunks {
        Block all[most];
        int64_t bias[most];
        int count = 0;
        int64_t next;  // numbers to the next block, or 0
    };

    void add(const Block* from, int count, int64_t next) const {
        const int64_t coef_row = has_dot<T> && paired ? lanes / 2 : lanes;
        Chunks chunks;
        chunks.next = next;
        for (int j = 0; j < count; ++j)
            for (int64_t q = 0; q < n; ++q) {
                chunks.bias[chunks.count] = q * chunk;
                chunks.all[chunks.count++] = {from[j].coef + q * m * coef_row, from[j].g + q * chunk, from[j].tokens};
                if (chunks.count == most) spend(chunks);
            }
        if (chunks.count) spend(chunks);
    }

    void spend(Chunks& chunks) const {
        if (m <= 4)  // a tile of few rows is wider in u, so that each coefficient serves several vectors
            columns<many_registers ? 4 : 2, 1>(chunk, [&](auto vectors, int64_t u, auto cut, int64_t count) {
                strip<1, 4, decltype(vectors)::value>(chunks, u, cut, count);
            });
        else
            columns<strip_vectors, 1>(chunk, [&](auto vectors, int64_t u, auto cut, int64_t count) {
                constexpr int C = W == 16 ? 12 : 4, U = decltype(vectors)::value;
                if constexpr (has_dot<T>)
                    if (paired) return strip<2, C, U>(chunks, u, cut, count);
                strip<1, C, U>(chunks, u, cut, count);
            });
        chunks.count = 0;
    }

    // Step: the tokens that are added at once. C: the rows c of the largest tile.
    template <int Step, int C, int U, bool Cut>
    COMPACTER_NOINLINE void strip(const Chunks& chunks, int64_t u, std::bool_constant<Cut> cut, int64_t count) const {
        alignas(64) float copy[most * lanes * U * W];
        const auto from_rows = [&](auto size, auto copies) COMPACTER_INLINE_LAMBDA {
            if (bias_sum)
                tile<Step, decltype(size)::value, U, true, true, decltype(copies)::value>(chunks, copy, 0, u, cut, count);
            else
                tile<Step, decltype(size)::value, U, true, false, decltype(copies)::value>(chunks, copy, 0, u, cut, count);
        };
        const auto from_copy = [&](auto size, int64_t first) COMPACTER_INLINE_LAMBDA {
            tile<Step, decltype(size)::value, U, false, false, false>(chunks, copy, first, u, cut, count);
        };
        if (m < 4) {
            from_rows(Int<1>{}, std::true_type{});
            tiles<1>(1, m, from_copy);
        } else if (m == C) {
            from_rows(Int<C>{}, std::false_type{});
        } else if (C == 12 && m == 8) {
            from_rows(Int<8>{}, std::false_type{});
        } else {
            from_rows(Int<4>{}, std::true_type{});
            if constexpr (C == 12)
                tiles<12, 8, 4, 1>(4, m, from_copy);
            else
                tiles<4, 1>(4, m, from_copy);
        }
    }

    // C rows of the gradient by U vectors.
    template <int Step, int C, int U, bool FromRows, bool WithBias, bool Copies, bool Cut>
    COMPACTER_INLINE void tile(const Chunks& chunks, float* copy, int64_t first, int64_t u, std::bool_constant<Cut>, int64_t count) const {
        constexpr int coef_row = lanes / Step;
        const int64_t row = n * chunk, ahead = chunks.next;
        Vec total[C][U] = {};
        for (int j = 0; j < chunks.count; ++j) {
            const int64_t tokens = chunks.all[j].tokens;
            const float* coef = chunks.all[j].coef + first * coef_row;
            const T* source = chunks.all[j].g + u;
            Vec bias_total[U] = {};
            for (int64_t token = 0; token < tokens; token += Step, ++coef, source += Step * row, copy += U * W) {
                Vec value[U];
                COMPACTER_UNROLL(4)
                for (int k = 0; k < U; ++k) {
                    if constexpr (FromRows) {
                        if (ahead && k % vectors_per_line<T> == 0) COMPACTER_PREFETCH(source + ahead + k * W, 0, 2);
                        if constexpr (Step == 2)
                            value[k] = two_rows<Cut>(source + k * W, token + 1 < tokens ? row : 0, count);
                        else
                            value[k] = Cut ? load(source, count) : load(source + k * W);
                    } else {
                        value[k] = load(copy + k * W);
                    }
                    if constexpr (Copies) store(copy + k * W, value[k]);
                    if constexpr (WithBias) bias_total[k] = Step == 2 ? dot(bias_total[k], ones(), value[k]) : bias_total[k] + value[k];
                }
                COMPACTER_UNROLL(12)
                for (int c = 0; c < C; ++c) {
                    const Vec weight = Step == 2 ? splat_pair(coef + c * coef_row) : splat(coef[c * coef_row]);
                    COMPACTER_UNROLL(4)
                    for (int k = 0; k < U; ++k) total[c][k] = Step == 2 ? dot(total[c][k], weight, value[k]) : total[c][k] + weight * value[k];
                }
            }
            if constexpr (WithBias)
                COMPACTER_UNROLL(4)
                for (int k = 0; k < U; ++k) add_to<Cut>(bias_sum + chunks.bias[j] + u + k * W, bias_total[k], count);
        }
        const bool in_strips = strips;
        float* to = in_strips ? strips + u * m + first * U * W : sum + first * chunk + u;
        const int64_t stride = in_strips ? U * W : chunk;
        COMPACTER_UNROLL(12)
        for (int c = 0; c < C; ++c, to += stride)
            COMPACTER_UNROLL(4)
            for (int k = 0; k < U; ++k) {
                if (in_strips)
                    add_to<false>(to + k * W, total[c][k], 0);
                else
                    add_to<Cut>(to + k * W, total[c][k], count);
            }
    }

    // Pairs of a row and the one `row` numbers behind it, or zeros if that is 0.
    template <bool Cut>
    COMPACTER_INLINE static Vec two_rows(const T* p, int64_t row, int64_t count) {
        const HalfBits low = Cut ? load_bits(p, count) : load_bits(p);
        if (!row) return joined(low, HalfBits{});
        return joined(low, Cut ? load_bits(p + row, count) : load_bits(p + row));
    }

    // Pairs of 1 in bf16.
    COMPACTER_INLINE static Vec ones() { return (Vec)(BitVec{} + 0x3f803f80u); }

    template <bool Cut>
    COMPACTER_INLINE static void add_to(float* p, Vec value, int64_t count) {
        if constexpr (Cut)
            store(p, load(p, count) + value, count);
        else
            store(p, load(p) + value);
    }

    int64_t n, m, chunk;
    float *sum, *bias_sum, *strips, *kept = nullptr;
    bool paired;
    Block blocks[batch];
    int used = 0;
};

}  // namespace compacter::COMPACTER_ISA
