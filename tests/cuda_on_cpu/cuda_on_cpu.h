// Executes CUDA kernels on the CPU, for tests, where their source keeps to what csrc/cuda/ptx.h and runtime.h name:
//
//     g++ -x c++ -std=c++17 -DCOMPACTER_CUDA_ON_CPU -include tests/cuda_on_cpu/cuda_on_cpu.h csrc/cuda/*.cu ...
//
// Every thread of a block is a fibre; blocks run one after the other. What is wrong for sure ends the launch with
// std::runtime_error, which names the fault and its place: lanes of a warp that wait for each other at different
// instructions, a wait that nobody ends, an address that an instruction does not take. What the hardware leaves open is
// filled in spitefully:
//
//   - shared memory is all ones at the start of each block, a NaN in float, half and bfloat16;
//   - what a copy_async is to bring is all ones until the thread that asked for it has waited;
//   - a shuffle from a lane that takes no part gives all ones;
//   - threads, warps and blocks advance in the order that cuda_on_cpu_order() asks for (0 upwards, 1 downwards, others
//     at random); a kernel must give the same bits under each.
//
// A matrix product is exact until its sum, which is truncated to a float, as tensor cores do.
//
// Three builds see different things: the plain one; -fsanitize=address,undefined, for which memory beyond the launch's
// shared memory is poisoned; and -fsanitize=thread when compiling but not when linking, which finds races on shared and
// global memory whatever the order (race_check.h). -ftrivial-auto-var-init=pattern spoils registers nobody has set.
//
// Not modelled: clusters, TMA, wgmma, votes, atomics, blocks that run at once, the limit of
// __launch_bounds__, registers, time.
#pragma once

#include "language.h"
#include "fibres.h"
#include "race_check.h"
#include "collectives.h"
#include "ptx.h"
#include "launch.h"
