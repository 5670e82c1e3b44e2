// The rows of one block: consecutive in a tensor, or gathered from it by an index.
#pragma once

#include "lanes.h"

namespace compacter::COMPACTER_ISA {

COMPACTER_INLINE int64_t block_size(int64_t token, int64_t end) { return end - token < lanes ? end - token : lanes; }

// The rows of the next block, or null if it is not whole.
template <class T>
COMPACTER_INLINE const T* rows_after(const T* x, int64_t token, int64_t end, int64_t row) {
    return token + 2 * lanes <= end ? x + (token + lanes) * row : nullptr;
}

// `index` [tokens] has the row of each token, or is null where token t is row t.
struct RowIndex {
    const int64_t* index;
    int64_t width;

    bool consecutive(int64_t token, int64_t tokens) const {
        return !index || index[token + tokens - 1] - index[token] == tokens - 1;
    }

    // The first of consecutive rows.
    template <class T>
    T* direct(T* x, int64_t token) const {
        return x + (index ? index[token] : token) * width;
    }

    // The rows where they are, or a copy in `memory` of scattered ones.
    template <class T>
    const T* read(const T* x, int64_t token, int64_t tokens, T* memory) const {
        if (consecutive(token, tokens)) return direct(x, token);
        for (int64_t t = 0; t < tokens; ++t) std::memcpy(memory + t * width, x + index[token + t] * width, bytes<T>());
        return memory;
    }

    // Copies rows to where they belong, unless they were written there.
    template <class T>
    void write(T* x, int64_t token, int64_t tokens, const T* memory) const {
        if (consecutive(token, tokens)) return;
        for (int64_t t = 0; t < tokens; ++t) std::memcpy(x + index[token + t] * width, memory + t * width, bytes<T>());
    }

    // The rows of the next block, to be prefetched, or null if they are not whole or consecutive.
    template <class T>
    const T* after(const T* x, int64_t token, int64_t end) const {
        if (!index) return rows_after(x, token, end, width);
        return token + 2 * lanes <= end && consecutive(token + lanes, lanes) ? direct(x, token + lanes) : nullptr;
    }

private:
    template <class T>
    size_t bytes() const { return static_cast<size_t>(width) * sizeof(T); }
};

}  // namespace compacter::COMPACTER_ISA
