"""What a compiled program copies and what its devices send, read from its HLO text (`compiled.as_text()`)."""

import re
from collections import Counter
from enum import IntEnum
from math import prod
from typing import NamedTuple

MOVES = {"bitcast-convert", "broadcast", "concatenate", "convert", "copy", "dynamic-slice"}
MOVES |= {"gather", "pad", "reshape", "reverse", "slice", "transpose"}
"""Operations that carry numbers over, arranged or rounded differently, and compute nothing."""


class WeightCopy(NamedTuple):
    """A buffer that is filled with weights and nothing else."""

    name: str
    shape: str
    num_bytes: int
    times: int
    """How often: in one iteration of the outermost loop around it, or in all where there is no loop around it."""
    in_loop: bool


class Source(IntEnum):
    """Where a value's numbers come from. What is put together comes from the largest."""

    CONSTANT = 0
    WEIGHT = 1
    OTHER = 2


Value = Source | tuple
"""A tuple's entries are values again."""


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str
    is_root: bool

    def attribute(self, pattern: str) -> str:
        """The first group of a regular expression, or an empty string."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


def weight_copies(hlo: str, argument: str = "params", *, unknown: int | None = None) -> list[WeightCopy]:
    """Every buffer that a program fills with weights alone: slices out of a stack, concatenated, transposed, converted.

    Each costs a read and a write of its bytes. A slice that a matrix product takes from the stack where it lies has no
    buffer and is not among them. In an inner loop each iteration counts, and of a conditional every branch.

    Args:
        hlo: text of one compiled module.
        argument: name of the jitted function's argument that holds the weights.
        unknown: iterations of an inner loop whose number is not known.

    Raises:
        ValueError: no such argument, or a copy in an inner loop whose number of iterations is not known nor given.
    """
    module = _Module(hlo, unknown)
    arguments: dict[int, Value] = {
        int(i.operands[0]): Source.WEIGHT if i.attribute(r'op_name="(\w+)') == argument else Source.OTHER
        for i in module.computations[module.entry]
        if i.opcode == "parameter"
    }
    if Source.WEIGHT not in arguments.values():
        raise ValueError(f"No parameter of the program belongs to {argument=}.")
    copies: list[WeightCopy] = []
    module.run(module.entry, [arguments[number] for number in sorted(arguments)], copies, times=1, in_loop=False)
    return copies


IN_PLACE = {"parameter", "get-tuple-element", "bitcast", "custom-call", "dynamic-update-slice"}
"""Operations that give an array back where it was."""

FUSED = re.compile(r"fused|wrapped|loop|gemm|input")
"""How computations inside of fusions begin: they have no buffers."""


def uses_of_stacks(hlo: str, stacks: set[str]) -> tuple[Counter[str], Counter[str]]:
    """Opcodes that make an array of a stack's shape, and reads of a stack by computation, less what is in place.

    Args:
        stacks: shapes such as `bf16[19,1,4608,24,128]`.
    """
    computations = _Module(hlo).computations
    roots = {name: one.opcode for name, body in computations.items() for one in body if one.is_root}
    shapes = {one.name: one.shape.split("{")[0] for body in computations.values() for one in body}
    made: Counter[str] = Counter()
    reads: Counter[str] = Counter()
    for computation, body in computations.items():
        if FUSED.match(computation):
            continue
        for one in body:
            opcode = roots.get(one.attribute(r"calls=%?([\w.-]+)"), one.opcode)
            if opcode in IN_PLACE:
                continue
            if shapes[one.name] in stacks:
                made[opcode] += 1
            if opcode not in ("tuple", "while", "conditional"):
                reads[computation] += sum(shapes.get(operand) in stacks for operand in one.operands)
    return made, reads


class Collective(NamedTuple):
    """An exchange between devices."""

    kind: str
    """As in HLO: "all-to-all"."""
    shape: str
    """What one device has afterwards."""
    devices: int
    """How many exchange with one another."""
    times: int
    """How often, in one iteration of a loop whose length is data."""
    in_loop: bool
    """In such a loop: over the steps of sampling."""

    @property
    def sent_bytes(self) -> int:
        """What one device sends to others, all times."""
        return self.times * num_bytes(self.shape) * (self.devices - 1) // self.devices


def collectives(hlo: str, *, unknown: int | None = None) -> list[Collective]:
    """Every all-to-all and all-gather of a program; of a conditional, those of the branch that sends most.

    Args:
        unknown: iterations of a loop whose length is data, within another such loop.

    Raises:
        ValueError: an exchange of another kind, or in such an inner loop while `unknown` is not given.
    """
    module = _Module(hlo, unknown)
    return _collectives(module, module.entry, times=1, in_loop=False)


def _collectives(module: "_Module", computation: str, *, times: int, in_loop: bool) -> list[Collective]:
    found: list[Collective] = []
    for one in module.computations[computation]:
        kind = one.opcode.removesuffix("-start")
        if kind in ("all-to-all", "all-gather"):
            shape = re.findall(r"[a-z]\w*\[[\d,]*\]", one.shape)[-1]  # a start has its operand, too
            found.append(Collective(kind, shape, _group_size(one), times, in_loop))
        elif re.match(r"all-reduce|reduce-scatter|collective-|ragged-", kind) and not kind.endswith("-done"):
            raise ValueError(f"{one.name}: exchanges of the kind {kind} are not counted.")
        elif kind == "conditional":
            branches = [_collectives(module, name, times=times, in_loop=in_loop) for name in _branches(one)]
            found += max(branches, key=lambda branch: sum(each.sent_bytes for each in branch))
        elif kind == "while":
            body, count = one.attribute(r"body=%([\w.\-]+)"), one.attribute(r'known_trip_count":\{"n":"(\d+)"')
            repeats = int(count or (in_loop and module.unknown) or 1)
            inside = _collectives(module, body, times=times * repeats, in_loop=in_loop or not count)
            if inside and in_loop and not count and module.unknown is None:
                raise ValueError(f"{one.name} exchanges {inside[0].shape} an unknown number of times.")
            found += inside
        elif kind in ("call", "async"):
            called = one.attribute(r"(?:calls|to_apply)=%([\w.\-]+)")
            found += _collectives(module, called, times=times, in_loop=in_loop)
    return found


def _group_size(instruction: "Instruction") -> int:
    """Devices of a group, which XLA names by axes of a mesh, counts or lists."""
    axes = dict(re.findall(r"'(\w+)'=(\d+)", instruction.attribute(r"replica_groups=mesh\[(.*?)\]")))
    if axes:
        named = re.findall(r"'(\w+)'", instruction.attribute(r"replica_groups=mesh\[.*?\] *\{(.*?)\}"))
        return prod(int(axes[name]) for name in named)
    if counts := instruction.attribute(r"replica_groups=\[\d+,(\d+)\]<="):
        return int(counts)
    return len(instruction.attribute(r"replica_groups=\{\{([\d,]*)\}").split(","))


class _Module:
    """Runs a module on `Source`s in place of numbers."""

    def __init__(self, hlo: str, unknown: int | None = None):
        self.unknown = unknown
        self.computations: dict[str, list[Instruction]] = {}
        for line in re.sub(r"/\*.*?\*/", "", hlo).splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                self.computations[header[2]] = body = []
                if header[1]:
                    self.entry = header[2]
            elif re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line):
                body.append(_parse(line))

    def run(self, name: str, arguments: list[Value], copies: list[WeightCopy], *, times: int, in_loop: bool) -> Value:
        """The root's value; the computation's copies are appended to `copies`."""
        values: dict[str, Value] = {}
        root: Value = Source.OTHER
        for instruction in self.computations[name]:
            if instruction.opcode == "parameter":
                value = arguments[int(instruction.operands[0])]
            else:
                operands = [values[operand] for operand in instruction.operands if operand in values]
                value = self.evaluate(instruction, operands, copies, times=times, in_loop=in_loop)
            if instruction.opcode in MOVES | {"fusion", "fusion-done", "copy-done", "async-done"}:
                copies += _buffers(instruction, value, times=times, in_loop=in_loop)
            values[instruction.name] = value
            root = value if instruction.is_root else root
        return root

    def evaluate(
        self, instruction: Instruction, operands: list[Value], copies: list[WeightCopy], *, times: int, in_loop: bool
    ) -> Value:
        opcode = instruction.opcode.removesuffix("-start")
        if opcode == "tuple":
            return tuple(operands)
        if opcode == "get-tuple-element":
            whole = operands[0]
            return whole[int(instruction.attribute(r"index=(\d+)"))] if isinstance(whole, tuple) else whole
        if opcode in ("bitcast", "opt-barrier") or opcode.endswith("-done"):
            return operands[0]
        if opcode in MOVES:
            return _join(*(operands[:1] if opcode in ("dynamic-slice", "gather") else operands))  # the rest are indices
        if opcode in ("fusion", "async", "call"):  # what happens inside of a fusion has no buffer
            inside = copies if opcode == "call" else []
            called = instruction.attribute(r"(?:calls|to_apply)=%([\w.\-]+)")
            return self.run(called, operands, inside, times=times, in_loop=in_loop)
        if opcode == "while":
            return self.loop(instruction, operands[0], copies, times=times, in_loop=in_loop)
        if opcode == "conditional":
            branches = zip(_branches(instruction), operands[1:], strict=True)
            return _join(*(self.run(name, [x], copies, times=times, in_loop=in_loop) for name, x in branches))
        return Source.CONSTANT if opcode in ("constant", "iota") else Source.OTHER

    def loop(
        self, instruction: Instruction, carry: Value, copies: list[WeightCopy], *, times: int, in_loop: bool
    ) -> Value:
        body = instruction.attribute(r"body=%([\w.\-]+)")
        while (after := _join(carry, self.run(body, [carry], [], times=1, in_loop=True))) != carry:
            carry = after
        inside: list[WeightCopy] = []
        count = instruction.attribute(r'known_trip_count":\{"n":"(\d+)"') if in_loop else "1"
        count = count or str(self.unknown or "")
        self.run(body, [carry], inside, times=times * int(count or 0), in_loop=True)
        if inside and not count:
            raise ValueError(f"{instruction.name} copies {inside[0].shape} of weights an unknown number of times.")
        copies += inside
        return carry


def _branches(conditional: Instruction) -> list[str]:
    """Computations, in the order of their operands."""
    named = conditional.attribute(r"branch_computations=\{(.*?)\}") or ",".join(
        conditional.attribute(rf"{branch}_computation=(%[\w.\-]+)") for branch in ("true", "false")
    )
    return re.findall(r"[\w.\-]+", named)


def _parse(line: str) -> Instruction:
    head, rest = line.strip().split(" = ", 1)
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, call = rest[:end], rest[end:].lstrip()
    opcode, inside = call[: call.index("(")], call[call.index("(") :]
    end = _closing(inside)
    operands = re.findall(r"%([\w.\-]+)", inside[:end]) if opcode != "parameter" else [inside[1 : end - 1]]
    return Instruction(head.split("%")[-1], shape, opcode, operands, inside[end:], head.startswith("ROOT"))


def _closing(text: str) -> int:
    """Where the parenthesis that opens `text` has closed."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place + 1
    raise ValueError(f"No closing parenthesis in {text!r}.")


def _join(*values: Value) -> Value:
    first = values[0] if values else Source.CONSTANT
    if isinstance(first, tuple):
        return tuple(_join(*same) for same in zip(*values, strict=True))
    return max(values, default=first)


def _buffers(instruction: Instruction, value: Value, *, times: int, in_loop: bool) -> list[WeightCopy]:
    shapes = re.findall(r"[a-z]\w*\[[\d,]*\]", instruction.shape)
    values = value if isinstance(value, tuple) else (value,) * len(shapes)
    return [
        WeightCopy(instruction.name, shape, num_bytes(shape), times, in_loop)
        for shape, value in zip(shapes, values, strict=True)
        if value == Source.WEIGHT
    ]


def num_bytes(shape: str) -> int:
    """Bytes of a shape such as `bf16[2,3]`; a `pred` takes a byte."""
    match = re.match(r"[a-z]+(\d*)\w*\[([\d,]*)\]", shape)
    assert match is not None, shape
    return -(-prod(int(size) for size in match[2].split(",") if size) * int(match[1] or 8) // 8)
