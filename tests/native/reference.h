// The formulas as plain fp64 loops, one chain for any number of projections.
#pragma once

#include <cmath>
#include <vector>

#include "exact.h"

namespace compacter::check {

using Numbers = std::vector<double>;

// One projection's parameters, or its gradients: rule, left, right, bias (empty: none).
struct Weights {
    int64_t n, rank, in, out;
    Numbers rule, left, right, bias;
};

// H[p,u][q,v] = sum_i A_i[p,q] sum_rho left_i[u,rho] right_i[rho,v]; calls body(row, column, i, u, rho, v, p, q).
template <class Body>
void for_each_term(const Weights& w, const Body& body) {
    const int64_t chunk_in = w.in / w.n, chunk_out = w.out / w.n;
    for (int64_t i = 0; i < w.n; ++i)
        for (int64_t p = 0; p < w.n; ++p)
            for (int64_t q = 0; q < w.n; ++q)
                for (int64_t rho = 0; rho < w.rank; ++rho)
                    for (int64_t u = 0; u < chunk_in; ++u)
                        for (int64_t v = 0; v < chunk_out; ++v)
                            body((p * chunk_in + u) * w.out + q * chunk_out + v, (i * w.n + p) * w.n + q,
                                 (i * chunk_in + u) * w.rank + rho, (i * w.rank + rho) * chunk_out + v);
}

inline Numbers matrix(const Weights& w) {
    Numbers h(static_cast<size_t>(w.in * w.out));
    for_each_term(w, [&](auto cell, auto rule, auto left, auto right) { h[cell] += w.rule[rule] * w.left[left] * w.right[right]; });
    return h;
}

inline Numbers project(const Weights& w, const Numbers& h, const Numbers& x, int64_t tokens) {
    Numbers y(static_cast<size_t>(tokens * w.out));
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t b = 0; b < w.out; ++b) {
            double sum = w.bias.empty() ? 0. : w.bias[b];
            for (int64_t a = 0; a < w.in; ++a) sum += x[t * w.in + a] * h[a * w.out + b];
            y[t * w.out + b] = sum;
        }
    return y;
}

// Gradients of the parameters into `grad`; returns that of x.
inline Numbers project_backward(const Weights& w, const Numbers& h, const Numbers& x, const Numbers& g, int64_t tokens,
                                Weights& grad) {
    Numbers dx(x.size()), dh(h.size());
    grad = {w.n, w.rank, w.in, w.out, Numbers(w.rule.size()), Numbers(w.left.size()), Numbers(w.right.size()), Numbers(w.bias.size())};
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t b = 0; b < w.out; ++b) {
            const double gb = g[t * w.out + b];
            if (!w.bias.empty()) grad.bias[b] += gb;
            for (int64_t a = 0; a < w.in; ++a) {
                dx[t * w.in + a] += gb * h[a * w.out + b];
                dh[a * w.out + b] += gb * x[t * w.in + a];
            }
        }
    for_each_term(w, [&](auto cell, auto rule, auto left, auto right) {
        grad.rule[rule] += dh[cell] * w.left[left] * w.right[right];
        grad.left[left] += dh[cell] * w.rule[rule] * w.right[right];
        grad.right[right] += dh[cell] * w.rule[rule] * w.left[left];
    });
    return dx;
}

inline double activation(Activation kind, double y) {
    const auto sigmoid = [](double v) { return 1. / (1. + std::exp(-v)); };
    switch (kind) {
        case Activation::identity: return y;
        case Activation::relu: return y > 0. ? y : 0.;
        case Activation::gelu: return 0.5 * y * std::erfc(-y * std::sqrt(0.5));
        case Activation::gelu_new: return y * sigmoid(2. * std::sqrt(2. / std::acos(-1.)) * (y + 0.044715 * y * y * y));
        case Activation::silu: return y * sigmoid(y);
        case Activation::tanh: return std::tanh(y);
        case Activation::sigmoid: return sigmoid(y);
        case Activation::leaky_relu: return y > 0. ? y : 0.01 * y;
        case Activation::mish: return y * std::tanh(std::log1p(std::exp(y)));
        case Activation::relu2: return y > 0. ? y * y : 0.;
        case Activation::quick_gelu: return y * sigmoid(1.702 * y);
    }
    return NAN;
}

// Central difference: right to 1e-9, with no second formula to get wrong. Two straight lines through 0 need none.
inline double activation_slope(Activation kind, double y) {
    if (kind == Activation::relu || kind == Activation::leaky_relu) return activation(kind, y) / y;
    const double step = 1e-5;
    return (activation(kind, y + step) - activation(kind, y - step)) / (2. * step);
}

// The layer norm over rows of k numbers.
struct Rows {
    Numbers z, rate;
    size_t k;

    Rows(const Numbers& y, int64_t width, double eps) : z(y), k(static_cast<size_t>(width)) {
        for (auto row = z.begin(); row != z.end(); row += width) {
            double mean = 0., variance = 0.;
            for (size_t u = 0; u < k; ++u) mean += row[u] / double(k);
            for (size_t u = 0; u < k; ++u) variance += (row[u] - mean) * (row[u] - mean) / double(k);
            rate.push_back(1. / std::sqrt(variance + eps));
            for (size_t u = 0; u < k; ++u) row[u] = (row[u] - mean) * rate.back();
        }
    }

    Numbers normed(const Numbers& weight, const Numbers& bias) const {
        Numbers out(z.size());
        for (size_t j = 0; j < z.size(); ++j) out[j] = z[j] * weight[j % k] + bias[j % k];
        return out;
    }

    // dz/dy = rate (1 - 1/k - z z^T / k), applied to g weight
    Numbers backward(const Numbers& weight, const Numbers& g) const {
        Numbers dy(z.size());
        for (size_t first = 0; first < z.size(); first += k)
            for (size_t u = 0; u < k; ++u)
                for (size_t v = 0; v < k; ++v)
                    dy[first + u] += ((u == v) - (1. + z[first + u] * z[first + v]) / double(k)) * g[first + v] * weight[v] * rate[first / k];
        return dy;
    }
};

}  // namespace compacter::check
