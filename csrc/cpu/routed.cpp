// Routed banks: the rows are taken in the order of their adapters.
#include <vector>

#include "factors.h"
#include "isa.h"
#include "launch.h"
#include "order.h"
#include "parallel.h"
#include "work.h"

namespace compacter::cpu {
namespace {

// The sums of the pieces of all parts are rows in the order of the adapters.
struct Rows {
    std::vector<int64_t> first_of_part, first_of_adapter;  // the latter has one entry more than adapters

    Rows(const std::vector<std::vector<Piece>>& parts, int64_t adapters) : first_of_adapter(static_cast<size_t>(adapters) + 1) {
        int64_t rows = 0;
        for (const auto& pieces : parts) {
            first_of_part.push_back(rows);
            for (const Piece& piece : pieces) {
                if (piece.adapter < 0) continue;
                ++first_of_adapter[piece.adapter + 1];
                ++rows;
            }
        }
        for (int64_t adapter = 0; adapter < adapters; ++adapter) first_of_adapter[adapter + 1] += first_of_adapter[adapter];
    }

    int64_t count() const { return first_of_adapter.back(); }
};

struct Routed {
    const Adapter& a;
    const Bank& bank;
    const Kernels& kernel = kernels();
    Order order{bank, a.tokens};

    AdapterJob job(const void* residual, const void* grad_out, void* out, bool streaming, bool also_x) const {
        AdapterJob job{Staging(a.down, Side::down, 1.f).sizes(), Staging(a.up, Side::up, 1.f).sizes(), a.activation, a.dtype,
                       a.x, residual, grad_out, out, streaming, also_x, a.down.dense()};
        job.rows = order.rows();
        return job;
    }

    int64_t staged_floats() const { return Staging(a.down, Side::down, 1.f).floats() + Staging(a.up, Side::up, a.scale).floats(); }

    // The memory behind the staged factors of one adapter.
    float* stage(int64_t adapter, float* memory, AdapterJob& own) const {
        Projection down = a.down, up = a.up;
        down.weights = adapter_of(a.down, a.down.weights, adapter, bank.shared_rule_down);
        up.weights = adapter_of(a.up, a.up.weights, adapter, bank.shared_rule_up);
        Room room(memory);
        Staging(down, Side::down, 1.f).stage(room, own.down);
        Staging(up, Side::up, a.scale).stage(room, own.up);
        return room.rest();
    }
};

}  // namespace

void forward_routed(const Adapter& a, const Bank& bank, const void* residual, bool also_x, void* out, int threads) {
    const Routed routed{a, bank};
    const AdapterJob job = routed.job(residual, nullptr, out, exceeds_caches(a.tokens, 2 * a.down.in, a.dtype), also_x);
    const int64_t parts = part_count(a.tokens, work_per_token(a), threads);
    const auto pieces = routed.order.divided(parts);
    const int64_t per_part = routed.staged_floats() + routed.kernel.adapter_scratch(job);
    Scratch scratch(parts * per_part);
    float* memory = scratch.take(parts * per_part);
    for_each_part(parts, [&](int64_t part) {
        for (const Piece& piece : pieces[part]) {
            float* here = memory + part * per_part;
            AdapterJob own = job;
            if (piece.adapter < 0) {
                routed.kernel.adapter_skip(own, piece.begin, piece.end, here);
                continue;
            }
            here = routed.stage(piece.adapter, here, own);
            routed.kernel.adapter_forward(own, piece.begin, piece.end, here);
        }
    });
}

void backward_routed(const Adapter& a, const Bank& bank, const void* grad_out, void* grad_x, bool residual_is_x,
                     const Parameters& down_gradients, const Parameters& up_gradients, int threads) {
    const Routed routed{a, bank};
    const AdapterJob job = routed.job(residual_is_x ? grad_out : nullptr, grad_out, grad_x,
                                      exceeds_caches(a.tokens, 3 * a.down.in, a.dtype), false);
    const int64_t parts = part_count(a.tokens, 3 * work_per_token(a), threads);
    const auto pieces = routed.order.divided(parts);
    const Rows numbered(pieces, bank.count);
    const Staging down(a.down, Side::down, 1.f), up(a.up, Side::up, a.scale);
    const int64_t per_part = routed.staged_floats() + routed.kernel.adapter_scratch(job);
    const int64_t down_row = down.sums_floats(down_gradients), row = down_row + up.sums_floats(up_gradients);
    Scratch scratch(parts * per_part + (numbered.count() + 1) * row);
    float *memory = scratch.take(parts * per_part), *rows = scratch.take((numbered.count() + 1) * row);
    for_each_part(parts, [&](int64_t part) {
        float* sums = rows + numbered.first_of_part[part] * row;
        for (const Piece& piece : pieces[part]) {
            float* here = memory + part * per_part;
            AdapterJob own = job;
            if (piece.adapter < 0) {
                routed.kernel.adapter_skip(own, piece.begin, piece.end, here);
                continue;
            }
            here = routed.stage(piece.adapter, here, own);
            clear(sums, row);
            routed.kernel.adapter_backward(own, piece.begin, piece.end, here, down.place_sums(down_gradients, sums),
                                           up.place_sums(up_gradients, sums + down_row));
            sums += row;
        }
    });
    float* zeros = rows + numbered.count() * row;  // the gradients of an adapter without rows
    clear(zeros, row);
    const int64_t all = numbered.count();  // if it is 0, zeros are the first row
    if (bank.shared_rule_down) down.write_rule(down_gradients, rows, row, all);
    if (bank.shared_rule_up) up.write_rule(up_gradients, rows + down_row, row, all);
    for_each_part(parts, [&](int64_t part) {
        for (int64_t adapter = bank.count * part / parts; adapter < bank.count * (part + 1) / parts; ++adapter) {
            const int64_t first = numbered.first_of_adapter[adapter], count = numbered.first_of_adapter[adapter + 1] - first;
            const auto write = [&](const Staging& side, const Parameters& of_bank, bool shared, const Projection& p, int64_t at) {
                const Parameters own = adapter_of(p, of_bank, adapter, shared);
                float* sums = (count ? rows + first * row : zeros) + at;
                if (!shared) side.write_rule(own, sums, row, count);
                side.write_others(own, sums, row, count);
            };
            write(down, down_gradients, bank.shared_rule_down, a.down, 0);
            write(up, up_gradients, bank.shared_rule_up, a.up, down_row);
        }
    });
}

}  // namespace compacter::cpu
