"""Runs the tests of the cpu kernels under each instruction set that the whole suite does not use.

    python tests/instruction_sets.py [options of pytest]

torch and its libraries are limited to the same set, so that the run imitates an older processor as
a whole. A set that this build or this processor lacks is skipped, and the output says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from compacter_kernels import _C

HERE = Path(__file__).parent
CHOICE = "COMPACTER_KERNELS_ISA"
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")
SETS = {
    "plain": ("default", "SSE41", "COMPATIBLE"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
}
FILES = (
    "isa",
    "agreement",
    "nonfinite",
    "out",
    "memory",
    "determinism",
    "strides",
    "normed_adapter",
    "family",
    "bank_function",
)
# tests of this impl, or of calls that "auto" gives to it; those of torch's operators repeat kernels
SELECTED = "(environment or cpu or normed) and not operator"


def why_not(isa: str) -> str | None:
    """The reason why the tests are not run under this set; None if they are."""
    if isa not in _C.build_info()["isa"]:
        return "not in this build"
    try:
        _C.set_isa(isa)
    except ValueError:
        return "not on this processor"
    return None


def main(options: list[str]) -> int:
    if CHOICE in os.environ:
        raise SystemExit(f"{CHOICE} is set to {os.environ[CHOICE]}; unset it, since every set is run in turn")
    usual = _C.isa()
    tests = [str(HERE / f"test_{name}.py") for name in FILES]
    for isa, limits in SETS.items():
        reason = "run by the whole suite" if isa == usual else why_not(isa)
        print(f"\n{isa}: {reason or 'the tests of the cpu kernels'}", flush=True)
        if reason is None:
            environment = {**os.environ, CHOICE: isa, **dict(zip(LIMITS, limits, strict=True))}
            command = [sys.executable, "-m", "pytest", "-rN", "-k", SELECTED, *options, *tests]
            if code := subprocess.run(command, env=environment, check=False).returncode:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
