// The rows of a routed call in the order of their adapters, and their division among the threads.
#pragma once

#include <cstdint>
#include <vector>

#include "../adapter.h"

namespace compacter::cpu {

// Positions begin to end of the order, which have one adapter; -1: none.
struct Piece {
    int64_t adapter, begin, end;
};

class Order {
public:
    // Throws std::out_of_range if the bank lacks an adapter of its route.
    Order(const Bank& bank, int64_t tokens);

    // The row at each position, or null if every row is at its own position.
    const int64_t* rows() const { return sorted ? nullptr : rows_.data(); }

    // The pieces of each part. Parts have equally many blocks, and a block has rows of one adapter.
    std::vector<std::vector<Piece>> divided(int64_t parts) const;

private:
    std::vector<Piece> segments;  // one for each adapter that occurs
    std::vector<int64_t> rows_;
    bool sorted;
};

}  // namespace compacter::cpu
