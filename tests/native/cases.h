// The cases: shapes that break tilings, crossed thinly with everything else.
#pragma once

#include <string>
#include <vector>

#include "../../csrc/adapter.h"

namespace compacter::check {

struct Case {
    int64_t k, d, n_down, n_up, rank_down, rank_up, tokens;
    DType x = DType::f32, parameters = DType::f32;
    Activation activation = Activation::gelu_new;
    enum Residual { none, x_itself, other, both } residual = x_itself;
    bool bias = true, some_gradients = false;
    double scale = 1.;
    int64_t offset = 0;
    int threads = 1;

    std::string name() const {
        std::string text;
        for (int64_t v : {k, d, n_down, n_up, rank_down, rank_up, tokens, int64_t(x), int64_t(parameters), int64_t(activation),
                          int64_t(residual), int64_t(bias), int64_t(some_gradients), offset, int64_t(threads)})
            text += (text.empty() ? "" : "/") + std::to_string(v);
        return text;
    }
};

inline std::vector<Case> cases() {
    struct Shape {
        int64_t k, d, n_down, n_up, rank_down, rank_up;
    };
    const std::vector<Shape> shapes{{1, 1, 1, 1, 1, 1},   {24, 24, 12, 12, 1, 1}, {30, 6, 3, 3, 2, 1},   {40, 10, 5, 2, 1, 3},
                                    {772, 8, 4, 4, 1, 2}, {36, 12, 6, 12, 2, 1},  {16, 8, 1, 8, 3, 1},   {96, 48, 12, 6, 1, 1},
                                    {144, 24, 8, 4, 1, 2}, {66, 6, 2, 3, 3, 3},   {384, 16, 4, 8, 1, 1}, {96, 36, 6, 4, 3, 4}};
    const int64_t tokens[] = {0, 1, 2, 3, 5, 17, 33, 100};
    std::vector<Case> all;
    for (const Shape& s : shapes)
        for (const int64_t t : tokens)
            if (s.k < 300 || t <= 17) all.push_back({s.k, s.d, s.n_down, s.n_up, s.rank_down, s.rank_up, t});

    // Every other choice takes its turn from case to case, with periods that share no factor.
    for (size_t j = 0; j < all.size(); ++j) {
        Case& c = all[j];
        c.x = static_cast<DType>(j % 3);
        c.parameters = static_cast<DType>(j / 2 % 4);
        c.activation = static_cast<Activation>(j % activations);
        c.residual = static_cast<Case::Residual>(j / 3 % 4);
        c.bias = j % 5 != 0;
        c.some_gradients = j % 7 == 3;
        c.scale = j % 4 ? 1. : 0.37;
        c.offset = static_cast<int64_t>(j % 2);
#ifdef __SANITIZE_THREAD__
        c.threads = 4;
#else
        c.threads = 1 + static_cast<int>(j % 13 == 5);
#endif
    }
    for (int code = 0; code < activations; ++code) {
        Case c{48, 24, 4, 4, 1, 1, 33};
        c.activation = static_cast<Activation>(code);
        all.push_back(c);
    }
    return all;
}

}  // namespace compacter::check
