"""Reads what ptxas and a disassembler say about a kernel, and judges it: no spills, wide accesses, no fp64.

"Streamed" accesses are those in loops: what stands outside is read or written once a row (a label, a saved sum, the remainder of
a row). A kernel without a loop streams in its one pass. Loops are found in the graph of branches (strongly connected parts),
because a branch backwards alone is none: unlikely blocks stand at the end and jump back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
BRANCH = re.compile(r"\bBRA(?:\.\S+)?\s+(?:\S+,\s*)*`?\(?(0x[0-9a-f]+)")
END = re.compile(r"\b(EXIT|RET|BRX|JMX)\b")
PREDICATE = re.compile(r"\bBRA(?:\.\S+)?\s+!?U?P\d")
GLOBAL = re.compile(r"\b(LDG|STG|LDGSTS)\.(\S+)")
FP64 = re.compile(r"\b(D(ADD|MUL|FMA|SETP|MNMX)|F2F\.\S*F64|I2F\.\S*F64|F2I\.\S*F64|DMMA)\b")
LOCAL = re.compile(r"\b(LDL|STL)\b")
USAGE = re.compile(r"Function\s+(\S+?):\s*\n\s*(REG:.*)")
WIDTHS = ((r"\.128\b", 128), (r"\.64\b", 64), (r"\.[US]8\b", 8), (r"\.[US]16\b", 16))
FEW = 4
"""Narrow accesses that a kernel without a loop may have: its scalars."""


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one kernel, as ptxas reports them; bytes."""

    registers: int
    stack: int
    shared: int
    local: int


@dataclass(frozen=True, slots=True)
class Code:
    """What stands in a kernel's machine code. loads, stores: accesses to global memory by bits; streamed: those in loops, or all
    where there is no loop. local: LDL and STL; fp64: instructions on doubles."""

    resources: Resources
    instructions: int
    loads: dict[int, int]
    stores: dict[int, int]
    streamed_loads: dict[int, int]
    streamed_stores: dict[int, int]
    loops: int
    local: int
    fp64: int


def resources(usage: str, function: str) -> Resources:
    """From `cuobjdump -res-usage`. Raises ValueError where the function is not in it."""
    for name, line in USAGE.findall(usage):
        if name == function:
            numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            return Resources(numbers["REG"], numbers["STACK"], numbers["SHARED"], numbers["LOCAL"])
    raise ValueError(f"{function}: not in the report of resources")


def read(sass: str, found: Resources) -> Code:
    """sass: one function's part of `cuobjdump -sass`."""
    code = [(int(address, 16), text) for address, text in INSTRUCTION.findall(sass)]
    loops = _loops(code)
    accesses = [(place, kind, _width(rest)) for place, (_, text) in enumerate(code) for kind, rest in GLOBAL.findall(text)]
    streamed = [access for access in accesses if access[0] in loops] if loops else accesses

    def widths(kinds: Sequence[str], chosen: Sequence[tuple[int, str, int]]) -> dict[int, int]:
        return dict(sorted(Counter(width for _, kind, width in chosen if kind in kinds).items()))

    reading, writing = ("LDG", "LDGSTS"), ("STG",)
    return Code(
        resources=found,
        instructions=len(code),
        loads=widths(reading, accesses),
        stores=widths(writing, accesses),
        streamed_loads=widths(reading, streamed),
        streamed_stores=widths(writing, streamed),
        loops=len(set(loops.values())),
        local=sum(bool(LOCAL.search(text)) for _, text in code),
        fp64=sum(bool(FP64.search(text)) for _, text in code),
    )


def faults(code: Code, *, reads: bool, writes: bool, edges: bool = False) -> list[str]:
    """What is wrong with it, in words; nothing where all is well. reads, writes: whether it streams from or to global memory.
    edges: whether it has paths of its own for rows that are not aligned, whose narrow accesses are meant."""
    found = []
    if code.resources.local or code.resources.stack or code.local:
        found.append(
            f"spills: {code.resources.stack} B of stack, {code.resources.local} B local, {code.local} LDL and STL instructions"
        )
    if code.fp64:
        found.append(f"{code.fp64} fp64 instructions")
    for what, wanted, widths in (("loads", reads, code.streamed_loads), ("stores", writes, code.streamed_stores)):
        narrow = sum(count for width, count in widths.items() if width < 128)
        if wanted and not widths.get(128):
            found.append(f"no 128-bit streamed {what}: {widths or 'none at all'}")
        elif narrow > (0 if code.loops else FEW) and not edges:
            found.append(f"{narrow} streamed {what} narrower than 128 bits: {widths}")
    return found


def _loops(code: Sequence[tuple[int, str]]) -> dict[int, int]:
    """Which loop an instruction belongs to, by their places; instructions in none are left out. Nested loops count as one."""
    following = _following(code)
    before: list[list[int]] = [[] for _ in code]
    for place, successors in enumerate(following):
        for successor in successors:
            before[successor].append(place)
    finished: list[int] = []
    seen: set[int] = set()
    for start in range(len(code)):
        _walk(start, following, seen, finished)
    loops: dict[int, int] = {}
    taken: set[int] = set()
    for number, start in enumerate(reversed(finished)):
        part: list[int] = []
        _walk(start, before, taken, part)
        if len(part) > 1:
            loops |= dict.fromkeys(part, number)
    return loops


def _following(code: Sequence[tuple[int, str]]) -> list[list[int]]:
    """The places at which each instruction can go on."""
    places = {address: place for place, (address, _) in enumerate(code)}
    found = []
    for place, (_, text) in enumerate(code):
        branch = BRANCH.search(text)
        target = places.get(int(branch.group(1), 16)) if branch else None
        successors = [] if target is None else [target]
        ends = bool(END.search(text)) and not text.startswith("@")
        unconditional = branch is not None and not text.startswith("@") and not PREDICATE.search(text)
        if not ends and not unconditional and place + 1 < len(code):
            successors.append(place + 1)
        found.append(successors)
    return found


def _walk(start: int, following: Sequence[Sequence[int]], seen: set[int], finished: list[int]) -> None:
    """Depth first from start; appends places as they are left."""
    if start in seen:
        return
    seen.add(start)
    stack = [(start, iter(following[start]))]
    while stack:
        place, rest = stack[-1]
        successor = next((one for one in rest if one not in seen), None)
        if successor is None:
            finished.append(place)
            stack.pop()
        else:
            seen.add(successor)
            stack.append((successor, iter(following[successor])))


def _width(modifiers: str) -> int:
    for pattern, bits in WIDTHS:
        if re.search(pattern, "." + modifiers):
            return bits
    return 32
