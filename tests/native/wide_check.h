// The wide kernels against the formulas in fp64: numbers of chunks, of terms and of columns that break their tilings, several
// blocks, every dtype.
#pragma once

#include <memory>

#include "stored.h"
#include "wide_kernels.h"

namespace compacter::plain {
extern const check::WideKernels wide_kernels;
}
namespace compacter::avx2 {
extern const check::WideKernels wide_kernels;
}
namespace compacter::avx512 {
extern const check::WideKernels wide_kernels;
}
namespace compacter::avx512bf16 {
extern const check::WideKernels wide_kernels;
}

namespace compacter::check {

inline const WideKernels& wide_kernels([[maybe_unused]] const std::string& isa) {
#ifdef COMPACTER_HAS_AVX2
    if (isa == "avx2") return avx2::wide_kernels;
#endif
#ifdef COMPACTER_HAS_AVX512
    if (isa == "avx512") return avx512::wide_kernels;
#endif
#ifdef COMPACTER_HAS_AVX512BF16
    if (isa == "avx512bf16") return avx512bf16::wide_kernels;
#endif
    return plain::wide_kernels;
}

struct WideShape {
    int64_t n, m, chunk, tokens;
};

inline void check_wide(const std::string& isa, const WideShape& s, DType dtype, std::mt19937& random) {
    const std::string name = isa + " wide " + std::to_string(s.n) + "/" + std::to_string(s.m) + "/" + std::to_string(s.chunk) +
                             " T=" + std::to_string(s.tokens) + " dtype " + std::to_string(int(dtype));
    constexpr int64_t lanes = 16;
    const int64_t row = s.n * s.chunk, in_lanes = s.n * s.m * lanes, blocks = (s.tokens + lanes - 1) / lanes;
    const bool adds = s.m % 2, biased = s.chunk % 2;
    Tensor x(s.tokens * row, dtype), residual = x, also = x, out = x, basis(s.m * s.chunk, DType::f32), bias(row, DType::f32);
    Tensor v(blocks * in_lanes, DType::f32), z = v, sum = basis, bias_sum = bias;
    for (Tensor* t : {&x, &residual, &also, &basis, &bias, &v}) t->randomise(random, 1.);
    if (dtype == DType::bf16 && s.tokens % 2) {  // such products have kernels of their own
        for (int64_t j = 0; j < s.m * s.chunk; ++j) static_cast<uint32_t*>(basis.data())[j] &= 0xffff0000u;
        for (int64_t j = 0; j < blocks * in_lanes; ++j) static_cast<uint32_t*>(v.data())[j] &= 0xffff0000u;
    }
    sum.fill([](int64_t) { return 1.; });
    bias_sum.fill([](int64_t) { return 2.; });
    const auto floats = [](Tensor& t) { return static_cast<float*>(t.data()); };
    const WideJob job{s.n, s.m, s.chunk, s.tokens, dtype, x.data(), adds ? residual.data() : nullptr, adds ? also.data() : nullptr,
                      out.data(), floats(basis), biased ? floats(bias) : nullptr, floats(v), floats(z), floats(sum),
                      biased ? floats(bias_sum) : nullptr};
    const WideKernels& kernels = wide_kernels(isa);
    const size_t bytes = static_cast<size_t>(kernels.scratch(job)) * sizeof(float);
    const std::unique_ptr<float, void (*)(void*)> scratch(static_cast<float*>(std::aligned_alloc(64, bytes)), std::free);
    std::memset(scratch.get(), 0xff, bytes);
    kernels.run(job, scratch.get());

    const Numbers x_ = x.values(), t_ = basis.values(), v_ = v.values(), b_ = bias.values();
    const Numbers residual_ = residual.values(), also_ = also.values();
    Numbers want_z(v_.size()), want_out(x_.size()), want_sum(t_.size(), 1.), want_bias(b_.size(), 2.);
    for (int64_t token = 0; token < s.tokens; ++token)
        for (int64_t q = 0; q < s.n; ++q)
            for (int64_t u = 0; u < s.chunk; ++u) {
                const int64_t column = q * s.chunk + u, at = token * row + column;
                want_out[at] = (biased ? b_[column] : 0.) + (adds ? residual_[at] + also_[at] : 0.);
                want_bias[column] += x_[at];
                for (int64_t c = 0; c < s.m; ++c) {
                    const int64_t lane = token / lanes * in_lanes + (q * s.m + c) * lanes + token % lanes;
                    want_z[lane] += x_[at] * t_[c * s.chunk + u];
                    want_out[at] += v_[lane] * t_[c * s.chunk + u];
                    want_sum[c * s.chunk + u] += v_[lane] * x_[at];
                }
            }
    expect(name, "contraction", z, want_z);
    expect(name, "expansion", out, want_out);
    expect(name, "gradient", sum, want_sum);
    if (biased) expect(name, "gradient of the bias", bias_sum, want_bias);
}

inline void check_wide(const std::string& isa) {
    std::mt19937 random(3);
    int turn = 0;
    for (const int64_t n : {1, 3, 9})
        for (const int64_t m : {1, 2, 3, 4, 5, 8, 12, 13, 16, 31, 48})
            for (const int64_t chunk : {1, 7, 16, 24, 50, 96})
                for (const int64_t tokens : {1, 5, 16, 23, 151})
                    if (++turn % (n * m > 40 ? 7 : 4) == 0)
                        check_wide(isa, {n, m, chunk, tokens}, static_cast<DType>(turn / 4 % 3), random);
    for (const WideShape& s : {WideShape{1, 256, 530, 151}, {1, 12, 2049, 20}, {8, 8, 128, 33}, {1, 300, 20, 151}, {4, 4, 192, 32}})
        for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) check_wide(isa, s, dtype, random);
}

}  // namespace compacter::check
