#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef COMPACTER_HAS_AVX2
#include <cpuid.h>
#endif

namespace compacter {

namespace plain {
extern const cpu::Kernels kernels;
}
namespace avx2 {
extern const cpu::Kernels kernels;
}
namespace avx512 {
extern const cpu::Kernels kernels;
}
namespace avx512bf16 {
extern const cpu::Kernels kernels;
}

namespace cpu {
namespace {

struct Candidate {
    const Kernels* kernels;
    bool supported;
};

#ifdef COMPACTER_HAS_AVX2
// __builtin_cpu_supports knows no "f16c" before GCC 11 and in older clang.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

std::vector<Candidate> candidates() {
    std::vector<Candidate> all{{&plain::kernels, true}};
#ifdef COMPACTER_HAS_AVX2
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    all.push_back({&avx2::kernels, avx2});
#endif
#ifdef COMPACTER_HAS_AVX512
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    all.push_back({&avx512::kernels, avx512});
#endif
#ifdef COMPACTER_HAS_AVX512BF16
    all.push_back({&avx512bf16::kernels, avx512 && __builtin_cpu_supports("avx512bf16")});
#endif
    return all;
}

const Kernels& find(const std::string& name) {
    std::string choices;
    for (const Candidate& candidate : candidates()) {
        if (!candidate.supported) continue;
        if (candidate.kernels->isa == name) return *candidate.kernels;
        choices += (choices.empty() ? "" : ", ") + std::string(candidate.kernels->isa);
    }
    throw std::invalid_argument("instruction set \"" + name + "\" is not supported here; choose one of " + choices);
}

const Kernels& initial() {
    const char* forced = std::getenv("COMPACTER_KERNELS_ISA");
    return forced && *forced ? find(forced) : find(supported_isas().back());
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

std::vector<std::string> compiled_isas() {
    std::vector<std::string> names;
    for (const Candidate& candidate : candidates()) names.push_back(candidate.kernels->isa);
    return names;
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Candidate& candidate : candidates())
        if (candidate.supported) names.push_back(candidate.kernels->isa);
    return names;
}

const Kernels& kernels() {
    const Kernels* now = chosen.load(std::memory_order_acquire);
    if (!now) {
        now = &initial();
        chosen.store(now, std::memory_order_release);
    }
    return *now;
}

void set_isa(const std::string& name) { chosen.store(&find(name), std::memory_order_release); }

}  // namespace cpu
}  // namespace compacter
