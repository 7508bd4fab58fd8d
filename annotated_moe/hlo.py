# Generated from book/chapters/92_hlo.md by `make sync`; edit the chapter.
"""A compiler that made a step ten times too slow had written down
exactly what it did, and what it wrote is text. By the end of this page
you can ask such a text two questions: how many bytes does a device move
in one run, and which lines move most; and what do devices send one
another. The plan then gets both answers, and the command `annotated-moe
plan` prints them.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# %% book/chapters/92_hlo.md, cell 6
Number = int | float


# %% book/chapters/92_hlo.md, cell 7
class Instruction(NamedTuple):
    """One line of a compiled program."""

    name: str
    shape: str                              # with layout, as printed
    kind: str
    operands: tuple[str, ...]               # names
    inside: str                             # between the parentheses
    after: str                              # attributes
    root: bool                              # what a computation returns


Computation = dict[str, Instruction]        # by name, in order
Program = dict[str, Computation]


# %% book/chapters/92_hlo.md, cell 8
def closing(text: str) -> int:
    """Where the parenthesis that opens `text` is closed."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i
    raise ValueError(f"no closing parenthesis in {text[:60]!r}")


# %% book/chapters/92_hlo.md, cell 9
def parse_instruction(line: str) -> Instruction | None:
    """`ROOT %name = shape kind(operands), attributes`, or None."""
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    text = line[head.end():]
    cut = closing(text) + 1 if text[0] == "(" else text.index(" ")
    shape, text = text[:cut], text[cut:].lstrip()
    kind, text = text.split("(", 1)
    end = closing("(" + text) - 1
    inside, after = text[:end], text[end + 1:]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    root = head[1] is not None
    return Instruction(
        head[2], shape, kind, operands, inside, after, root
    )


# %% book/chapters/92_hlo.md, cell 10
def parse_program(text: str) -> tuple[Program, str]:
    """The computations of `compiled.as_text()`, and which runs first.

    ValueError for a text that is none.
    """
    program: Program = {}
    entry, current = "", dict[str, Instruction]()
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith("HloModule"):
            current = program.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif instruction := parse_instruction(line):
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("this is not the text of a compiled program")
    return program, entry


# %% book/chapters/92_hlo.md, cell 11
def called(caller: Instruction, role: str = "calls") -> str:
    """The computation that an instruction names in that role."""
    found = re.search(rf"\b{role}=%?([\w.\-]+)", caller.after)
    if not found:
        raise ValueError(f"{caller.name} names no {role}")
    return found[1]


# %% book/chapters/92_hlo.md, cell 12
def root_of(computation: Computation) -> Instruction:
    """The instruction whose value a computation returns."""
    return next(i for i in computation.values() if i.root)


def parameter(computation: Computation, number: int) -> str:
    """The name of a computation's parameter of that number."""
    return next(
        i.name for i in computation.values()
        if i.kind == "parameter" and i.inside == str(number)
    )


# %% book/chapters/92_hlo.md, cell 13
def trip_count(
    program: Program, loop: Instruction, unknown: Number
) -> float:
    """How often a loop runs; `unknown` where the data decides."""
    told = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.after)
    if told:
        return float(told[1])
    test = program[called(loop, "condition")]
    for name in root_of(test).operands:
        if test[name].kind == "constant":
            return float(test[name].inside)
    return float(unknown)


# %% book/chapters/92_hlo.md, cell 14
def executed(
    program: Program, start: str, unknown: Number, times: Number = 1.0
) -> Iterator[tuple[float, Computation, Instruction]]:
    """(how often, its computation, instruction) of all that is run.

    Loops and calls are entered, fusions are not; of a conditional
    every branch counts.
    """
    computation = program[start]
    for one in computation.values():
        inner, count = [], times
        if one.kind == "while":
            inner = [called(one, "body")]
            count *= trip_count(program, one, unknown)
        elif one.kind == "call":
            inner = [called(one, "to_apply")]
        elif one.kind == "conditional":
            inner = re.findall(r"%([\w.\-]+)", one.after)
            inner = [name for name in inner if name in program]
        for name in inner:
            yield from executed(program, name, unknown, count)
        if not inner:
            yield times, computation, one


# %% book/chapters/92_hlo.md, cell 17
WIDTHS = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2,
    "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8,
    "f64": 8,
}
ARRAY_SHAPE = re.compile(
    r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?"
)


def integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


# %% book/chapters/92_hlo.md, cell 18
def array_bytes(kind: str, sizes: str, order: str, tail: str) -> int:
    """Bytes of one array in main memory, its tile's padding included.

    `tail` is what a layout says behind its order: `T(8,128)` pads the
    two minor axes, and `S(1)` is not main memory and counts nothing.
    """
    if re.search(r"S\([1-9]", tail):
        return 0
    shape = integers(sizes)
    tile = re.match(r"T\(([\d,]+)\)", tail)
    if tile and shape:
        minor = zip(reversed(integers(tile[1])), integers(order))
        for size, axis in minor:
            shape[axis] = -(-shape[axis] // size) * size
    return math.prod(shape) * WIDTHS.get(kind, 0)


def value_bytes(shape: str) -> int:
    """Bytes of a printed shape, which may be a tuple of arrays."""
    found = ARRAY_SHAPE.findall(shape)
    return sum(array_bytes(*parts) for parts in found)


def plain_bytes(shape: str) -> int:
    """Bytes of a printed shape wherever it lies, without padding."""
    return sum(
        math.prod(integers(sizes)) * WIDTHS.get(kind, 0)
        for kind, sizes, _, _ in ARRAY_SHAPE.findall(shape)
    )


# %% book/chapters/92_hlo.md, cell 21
SLICES = ("dynamic-slice", "slice", "gather")
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}     # what is new


def bytes_used(
    program: Program, computation: Computation, name: str
) -> int:
    """How much of `name` the rest of a fused computation reads.

    Slices and gathers read what they return, updates in place none of
    what they update, anything else the whole.
    """
    whole = value_bytes(computation[name].shape)
    total = sum(
        bytes_used_by(program, computation, one, name)
        for one in computation.values() if name in one.operands
    )
    return min(total, whole)


# %% book/chapters/92_hlo.md, cell 22
def bytes_used_by(
    program: Program, computation: Computation, user: Instruction,
    name: str,
) -> int:
    """How much of its operand `name` one instruction reads."""
    first = user.operands[0] == name
    if user.kind in SLICES and first:
        return value_bytes(user.shape)
    if user.kind in UPDATES and first:
        return 0
    same = user.kind == "bitcast" or "output_to_operand" in user.after
    if same:
        rest = bytes_used(program, computation, user.name)
        return 0 if user.root else rest
    if user.kind != "fusion":
        return value_bytes(computation[name].shape)
    inner = program[called(user)]
    return sum(
        bytes_used(program, inner, parameter(inner, number))
        for number, operand in enumerate(user.operands)
        if operand == name
    )


# %% book/chapters/92_hlo.md, cell 23
def bytes_returned(
    program: Program, computation: Computation, root: Instruction
) -> int:
    """What a fused computation that ends in `root` writes."""
    if root.kind == "tuple":
        parts = (computation[name] for name in root.operands)
        return sum(
            bytes_returned(program, computation, part) for part in parts
        )
    if root.kind == "bitcast":
        renamed = computation[root.operands[0]]
        return bytes_returned(program, computation, renamed)
    if root.kind == "fusion":
        inner = program[called(root)]
        return bytes_returned(program, inner, root_of(inner))
    if root.kind in UPDATES:
        new = computation[root.operands[UPDATES[root.kind]]]
        return min(value_bytes(root.shape), value_bytes(new.shape))
    return value_bytes(root.shape)


# %% book/chapters/92_hlo.md, cell 24
def fusion_bytes(
    program: Program, computation: Computation, fusion: Instruction
) -> int:
    """A fusion reads what its lines use and writes its result once."""
    inner, total = program[called(fusion)], 0
    for number, name in enumerate(fusion.operands):
        used = bytes_used(program, inner, parameter(inner, number))
        total += min(used, value_bytes(computation[name].shape))
    written = bytes_returned(program, inner, root_of(inner))
    return total + min(written, value_bytes(fusion.shape))


# %% book/chapters/92_hlo.md, cell 25
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast",
    "after-all", "partition-id", "replica-id", "copy-done",
    "all-gather-done", "all-reduce-done", "collective-permute-done",
}


def instruction_bytes(
    program: Program, computation: Computation, one: Instruction
) -> int:
    """Bytes to and from main memory of one instruction that is run."""
    if one.kind in FREE:
        return 0
    if one.kind == "fusion":
        return fusion_bytes(program, computation, one)
    whole = [value_bytes(computation[n].shape) for n in one.operands]
    if one.kind in SLICES:
        size = value_bytes(one.shape)
        return size + min(size, whole[0])
    if one.kind in UPDATES:
        return 2 * whole[UPDATES[one.kind]]
    if one.kind.endswith("-start"):
        # (operands, results, ...): what is read is not written again.
        landed = ARRAY_SHAPE.findall(one.shape)[:1]
        return sum(whole) + sum(array_bytes(*a) for a in landed)
    return sum(whole) + value_bytes(one.shape)


# %% book/chapters/92_hlo.md, cell 26
def largest_movers(
    text: str, unknown: Number = 1.0, most: int = 8
) -> list[tuple[float, str, str]]:
    """(bytes, kind, shape) of the instructions that move most.

    `text` is `compiled.as_text()`; `unknown` says how often loops run
    whose end the data decides.
    """
    program, entry = parse_program(text)
    found = [
        (n * instruction_bytes(program, computation, one),
         one.kind, one.shape)
        for n, computation, one in executed(program, entry, unknown)
    ]
    return sorted(found, reverse=True)[:most]


def bytes_moved(text: str, unknown: Number = 1.0) -> float:
    """Bytes one device reads and writes in a run of the program.

    Arguments as for `largest_movers`.
    """
    program, entry = parse_program(text)
    return float(sum(
        n * instruction_bytes(program, computation, one)
        for n, computation, one in executed(program, entry, unknown)
    ))


# %% book/chapters/92_hlo.md, cell 30
class Collective(NamedTuple):
    """A collective, what a device puts in, and how often it is run."""

    kind: str
    devices: int                            # that take part together
    bytes: int                              # a device's operand
    times: float

    @property
    def sent(self) -> float:
        """Bytes a device sends in all of them, around a ring."""
        n = self.devices
        share = {
            "all-reduce": 2 * (n - 1) / n, "all-gather": n - 1.0,
            "reduce-scatter": (n - 1) / n, "all-to-all": (n - 1) / n,
            "collective-permute": 1.0,
        }
        return self.times * self.bytes * share[self.kind]


# %% book/chapters/92_hlo.md, cell 31
def devices_together(after: str, devices: int) -> int:
    """How many devices a collective's attributes bring together.

    Groups are printed as lists, as `[2,4]<=[8]`, or as mesh axes, of
    which `'model':(2)2` is a part, of size 2.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", after):
        return len(integers(found[1]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", after):
        return int(found[1])
    by_axes = r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}"
    if found := re.search(by_axes, after):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[a]) for a, part in axes)
    return devices


# %% book/chapters/92_hlo.md, cell 32
COLLECTIVES = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all"
    r"|collective-permute)(-start)?$"
)


def collectives(
    text: str, devices: int, unknown: Number = 1.0
) -> Iterator[Collective]:
    """The collectives of a compiled program, fused ones included."""
    program, entry = parse_program(text)
    for times, computation, one in executed(program, entry, unknown):
        lines = [one]
        if one.kind == "fusion":
            computation = program[called(one)]
            lines = list(computation.values())
        for line in lines:
            found = COLLECTIVES.match(line.kind)
            if found:
                size = sum(
                    plain_bytes(computation[name].shape)
                    for name in line.operands
                )
                n = devices_together(line.after, devices)
                yield Collective(found[1], n, size, times)
