// A vector as a class of loops, for compilers whose language has none (vector.h). It gives the
// arithmetic, comparisons and casts of GCC's vectors that the kernels use.
#pragma once

namespace compacter::COMPACTER_ISA {

template <class T, int N>
struct Lanes {
    T values[N];

    Lanes() : values{} {}

    template <class... Each, class = decltype((static_cast<T>(Each{}) + ...))>
    Lanes(T first, T second, Each... others) : values{first, second, others...} {}

    // The same bits.
    template <class Other>
    explicit Lanes(const Lanes<Other, N>& other) {
        static_assert(sizeof(T) == sizeof(Other));
        std::memcpy(values, other.values, sizeof values);
    }

    // The same numbers.
    template <class Other>
    Lanes<Other, N> converted() const {
        Lanes<Other, N> result;
        for (int k = 0; k < N; ++k) result.values[k] = static_cast<Other>(values[k]);
        return result;
    }

    T operator[](int64_t k) const { return values[k]; }

    Lanes operator-() const {
        Lanes result;
        for (int k = 0; k < N; ++k) result.values[k] = -values[k];
        return result;
    }

#define COMPACTER_LANES(OP)                                                      \
    friend Lanes operator OP(const Lanes& a, const Lanes& b) {                   \
        Lanes result;                                                            \
        for (int k = 0; k < N; ++k) result.values[k] = a.values[k] OP b.values[k]; \
        return result;                                                           \
    }                                                                            \
    friend Lanes operator OP(const Lanes& a, T b) { return a OP all(b); }        \
    friend Lanes operator OP(T a, const Lanes& b) { return all(a) OP b; }        \
    Lanes& operator OP##=(const Lanes& other) { return *this = *this OP other; }
    COMPACTER_LANES(+)
    COMPACTER_LANES(-)
    COMPACTER_LANES(*)
    COMPACTER_LANES(/)
    COMPACTER_LANES(&)
    COMPACTER_LANES(|)
    COMPACTER_LANES(<<)
    COMPACTER_LANES(>>)
#undef COMPACTER_LANES

    // A comparison has all bits of a lane where it holds.
#define COMPACTER_LANES(OP)                                                           \
    friend Lanes<int32_t, N> operator OP(const Lanes& a, const Lanes& b) {            \
        Lanes<int32_t, N> result;                                                     \
        for (int k = 0; k < N; ++k) result.values[k] = a.values[k] OP b.values[k] ? -1 : 0; \
        return result;                                                                \
    }                                                                                 \
    friend Lanes<int32_t, N> operator OP(const Lanes& a, T b) { return a OP all(b); }
    COMPACTER_LANES(<)
    COMPACTER_LANES(<=)
    COMPACTER_LANES(>)
    COMPACTER_LANES(>=)
    COMPACTER_LANES(==)
    COMPACTER_LANES(!=)
#undef COMPACTER_LANES

private:
    static Lanes all(T value) {
        Lanes result;
        for (int k = 0; k < N; ++k) result.values[k] = value;
        return result;
    }
};

// Lane by lane a where the comparison holds, else b.
template <class T, int N>
COMPACTER_INLINE Lanes<T, N> select(const Lanes<int32_t, N>& holds, Lanes<T, N> a, const Lanes<T, N>& b) {
    for (int k = 0; k < N; ++k)
        if (!holds.values[k]) a.values[k] = b.values[k];
    return a;
}

}  // namespace compacter::COMPACTER_ISA
