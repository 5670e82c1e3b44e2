// What selftest.cpp and faults.cpp share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

namespace compacter::cuda {

#define check(holds, what) check_at(__LINE__, holds, what)
inline void check_at(int line, bool holds, const char* what) {
    if (holds) return;
    printf("line %d: %s\n", line, what);
    exit(1);
}

// Launches what has the fault of that name, under several orders, and prints what each launch throws.
void fault(const std::string& name);

}  // namespace compacter::cuda
