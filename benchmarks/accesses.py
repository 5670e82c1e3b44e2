"""The width of a compiled kernel's accesses to some of its tensors, read from its assembly."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

WIDE_BITS = 128
_ACCESS = re.compile(r"(ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)$")
_AMD_ACCESS = re.compile(r"\b(?:global|buffer)_(?:load|store)_(\w+)")


def _instructions(ptx: str) -> Iterable[tuple[str, str]]:
    """(operation, operands) of each line, without its predicate."""
    for line in ptx.splitlines():
        if found := re.match(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*?);", line):
            yield found[1], found[2]


def _sources(instructions: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """The registers and parameters from which each 64-bit register is computed.

    All definitions of a register count. A loaded value has no source, since no kernel loads a
    pointer.
    """
    sources = defaultdict(set)
    for operation, operands in instructions:
        if parameter := re.match(r"(%rd\d+), \[(\w+_param_\d+)\]", operands):
            sources[parameter[1]].add(parameter[2])
        elif not operation.startswith(("ld.", "st.", "cp.")) and (register := re.match(r"(%rd\d+), ", operands)):
            sources[register[1]].update(re.findall(r"%rd\d+", operands[register.end() :]))
    return sources


def _parameters(register: str, sources: dict[str, set[str]]) -> set[int]:
    """The numbers of the parameters from which a register is computed."""
    seen, waiting = {register}, [register]
    while waiting:
        new = sources.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return {int(name.rpartition("_")[2]) for name in seen if not name.startswith("%")}


def _bits(operation: str, operands: str) -> int | None:
    """The bits that an access to global memory moves; None for another instruction."""
    if operation.startswith("cp.async.c") and "global" in operation:
        return 8 * int(re.findall(r"\], (\w+)", operands)[0], 0)
    if access := _ACCESS.match(operation):
        return int(access[2] or 1) * int(access[3])
    return None


def share_by_pointer(ptx: str, names: list[str | None], wanted: Iterable[str]) -> float | None:
    """The share of the accesses to the wanted tensors that move 128 bits or more; None without any.

    An access belongs to the parameter from which its address is computed. `names` are the names of
    the parameters, in their order, None for a number.

    Raises:
        ValueError: an address belongs to no tensor, or to several.
    """
    instructions = list(_instructions(ptx))
    sources, wanted, widths = _sources(instructions), set(wanted), []
    for operation, operands in instructions:
        bits = _bits(operation, operands)
        if bits is not None:
            address = re.findall(r"\[ ?(%rd\d+)", operands)[-1]
            found = {name for number in _parameters(address, sources) if (name := names[number])}
            if len(found) != 1:
                raise ValueError(f"{operation} {operands}: to one of {sorted(found)}")
            if found <= wanted:
                widths.append(bits)
    return round(sum(bits >= WIDE_BITS for bits in widths) / len(widths), 3) if widths else None


def lines_that_access(folder: Path, wanted: Iterable[str]) -> set[tuple[str, int]]:
    """(file name, line) of every access to the wanted tensors in the kernels' source."""
    access = re.compile(rf"tl\.(load|store)\(({'|'.join(wanted)}) \+")
    found = set()
    for path in folder.glob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        found |= {(path.name, number) for number, line in enumerate(lines, 1) if access.search(line)}
    return found


def share_by_line(amdgcn: str, lines: set[tuple[str, int]]) -> float | None:
    """The same for the assembly of AMD, among the accesses that come from these lines of source.

    Its registers are those of the machine, and each holds one value after another. So an address
    can be traced to a parameter only by following the flow of control.
    """
    files, here, widths = {}, None, []
    for number, name in re.findall(r'^\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', amdgcn, re.M):
        files[number] = Path(name).name
    for line in amdgcn.splitlines():
        if location := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            here = files.get(location[1]), int(location[2])
        elif here in lines and (access := _AMD_ACCESS.search(line)):
            widths.append(access[1])
    return round(sum(width.endswith("dwordx4") for width in widths) / len(widths), 3) if widths else None
