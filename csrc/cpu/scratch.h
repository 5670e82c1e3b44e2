// Memory of the calling thread, aligned to 64 bytes. It is kept between calls if it is small.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace compacter::cpu {

// Memory that is taken piece by piece.
class Room {
public:
    explicit Room(float* memory) : data(memory) {}

    float* take(int64_t floats) {
        float* piece = data;
        data += padded(floats);
        return piece;
    }

    float* rest() const { return data; }

    static int64_t padded(int64_t floats) { return (floats + 15) / 16 * 16; }

private:
    float* data;
};

class Scratch : public Room {
public:
    // Throws std::bad_alloc. Two Scratch objects of one thread must not live at the same time.
    explicit Scratch(int64_t floats) : Room(hold(floats)) {}

    ~Scratch() {
        if (kept.floats > keep_at_most) kept.resize(0);
    }

    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

private:
    static constexpr int64_t keep_at_most = int64_t{1} << 20;
    static constexpr std::align_val_t alignment{64};

    struct Memory {
        float* data = nullptr;
        int64_t floats = 0;

        ~Memory() { resize(0); }

        void resize(int64_t count) {
            ::operator delete(data, alignment);
            data = nullptr;
            floats = 0;
            if (!count) return;
            data = static_cast<float*>(::operator new(static_cast<size_t>(padded(count)) * sizeof(float), alignment));
            floats = count;
        }
    };

    static float* hold(int64_t floats) {
        if (floats > kept.floats) kept.resize(floats);
        return kept.data;
    }

    static thread_local Memory kept;
};

inline thread_local Scratch::Memory Scratch::kept;

}  // namespace compacter::cpu
