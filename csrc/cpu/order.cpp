#include "order.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace compacter::cpu {

Order::Order(const Bank& bank, int64_t tokens) : sorted(std::is_sorted(bank.route, bank.route + bank.groups)) {
    const int64_t per_group = bank.groups ? tokens / bank.groups : 0;
    std::vector<int64_t> next(static_cast<size_t>(bank.count) + 1);  // first the number of rows, then the next position
    for (int64_t group = 0; group < bank.groups; ++group) {
        const int64_t adapter = bank.route[group];
        if (adapter < -1 || adapter >= bank.count)
            throw std::out_of_range("route has the adapter " + std::to_string(adapter) + "; the bank has " +
                                    std::to_string(bank.count) + ": 0 to " + std::to_string(bank.count - 1) + ", or -1 for none");
        next[adapter + 1] += per_group;
    }
    int64_t position = 0;
    for (int64_t adapter = -1; adapter < bank.count; ++adapter) {
        const int64_t rows = next[adapter + 1];
        if (rows) segments.push_back({adapter, position, position + rows});
        next[adapter + 1] = position;
        position += rows;
    }
    if (sorted) return;
    rows_.resize(static_cast<size_t>(tokens));
    for (int64_t group = 0; group < bank.groups; ++group) {
        int64_t& at = next[bank.route[group] + 1];
        for (int64_t row = group * per_group; row < (group + 1) * per_group; ++row) rows_[at++] = row;
    }
}

std::vector<std::vector<Piece>> Order::divided(int64_t parts) const {
    int64_t blocks = 0;
    for (const Piece& s : segments) blocks += block_count(s.end - s.begin);
    std::vector<std::vector<Piece>> pieces(static_cast<size_t>(parts));
    int64_t first = 0;  // the number of blocks before a segment
    for (const Piece& s : segments) {
        const int64_t last = first + block_count(s.end - s.begin);
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t from = std::max(first, blocks * part / parts), to = std::min(last, blocks * (part + 1) / parts);
            if (from < to)
                pieces[part].push_back({s.adapter, s.begin + (from - first) * block_tokens,
                                        std::min(s.end, s.begin + (to - first) * block_tokens)});
        }
        first = last;
    }
    return pieces;
}

}  // namespace compacter::cpu
