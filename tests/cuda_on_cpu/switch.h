// A stack of its own for each fibre, and the step from one to another.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __x86_64__
#define CUDA_ON_CPU_UCONTEXT 1
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

struct Context {
#ifdef CUDA_ON_CPU_UCONTEXT
    ucontext_t registers;
#else
    void* stack_pointer = nullptr;
#endif
    const void* stack = nullptr;  // these three are what AddressSanitizer wants to know of a stack
    size_t size = 0;
    void* fake_stack = nullptr;
};

#ifndef CUDA_ON_CPU_UCONTEXT
// swapcontext() without its system call: what a callee has to preserve goes on the old stack and comes from the new one.
__attribute__((naked, noinline, noipa, no_sanitize("thread"))) inline void switch_stacks(void**, void*) {
    asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
#endif

// From now on `context` is at the start of `entry`, which must not return. What was on the stack is forgotten.
inline void prepare(Context& context, unsigned char* stack, size_t size, void (*entry)()) {
    context.stack = stack;
    context.size = size;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack, size);
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
    getcontext(&context.registers);
    context.registers.uc_stack.ss_sp = stack;
    context.registers.uc_stack.ss_size = size;
    makecontext(&context.registers, entry, 0);
    context.registers.uc_stack.ss_size = 0;  // or AddressSanitizer forgets the whole stack at every switch to it
#else
    void** top = reinterpret_cast<void**>(stack + size);  // aligned to 16, as a caller's frame is
    *--top = nullptr;                                     // the return address of `entry`
    *--top = reinterpret_cast<void*>(entry);
    for (int preserved = 0; preserved < 6; ++preserved) *--top = nullptr;
    context.stack_pointer = top;
#endif
}

// Returns when something switches back to `from`: `to` itself, since only the scheduler and a fibre take turns.
inline void switch_context(Context& from, Context& to) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.size);
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
    swapcontext(&from.registers, &to.registers);
#else
    switch_stacks(&from.stack_pointer, to.stack_pointer);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from.fake_stack, &to.stack, &to.size);
#endif
}

// The first thing on a new stack, instead of the end of switch_context.
inline void entered_from(Context& from) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.size);
#else
    static_cast<void>(from);
#endif
}

}  // namespace cuda_on_cpu
