"""What stands in a compiled program: matrix products, collectives, memory traffic, kernels, large buffers.

XLA's own cost analysis is empty for an absent GPU and counts a loop's body once for a TPU, so we read the optimised
program's text. An instruction counts as often as it runs: a loop's body times the loop's known trip count.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from jaxguard.plan.groups import axes_of, groups_of
from jaxguard.utils.errors import JaxguardError

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
SIZES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota"}
"""What moves no bytes."""

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_ARRAY = re.compile(r"\b(?P<type>[a-z]+\d*(?:e\d+m\d+\w*)?)\[(?P<sides>[\d,]*)\]")


@dataclass(frozen=True)
class Array:
    """Type and sides of an array in the program."""

    type: str
    sides: tuple[int, ...]

    @property
    def bytes(self) -> int:
        digits = re.search(r"\d+", self.type)
        size = SIZES.get(self.type) or (max(1, int(digits[0]) // 8) if digits else 0)
        return math.prod(self.sides) * size


@dataclass(frozen=True)
class Instruction:
    """One line of the program; `attributes` is what follows the operands, or a constant's value."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @property
    def shown(self) -> str:
        return " ".join(f"{one.type}[{','.join(map(str, one.sides))}]" for one in self.arrays)

    @property
    def source(self) -> str:
        """Which operation of ours it comes from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else self.name


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind, axis and size.

    Attributes:
        kind: such as all-gather.
        axes: mesh axes that it runs over, joined by +; `?` where its groups are no axis'.
        group: devices that take part.
        near: how many of them are linked, on one host of GPUs or in one TPU slice.
        size: bytes of the whole array that one device holds before or after it, whichever is larger.
        count: how often it runs in one step.
        source: which operation of ours it comes from.
    """

    kind: str
    axes: str
    group: int
    near: int
    size: int
    count: float
    source: str

    @property
    def sent(self) -> float:
        """Bytes that each device sends in one step, by a ring or anything as good."""
        passes = 2 if self.kind == "all-reduce" else 1
        share = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return self.count * passes * share * self.size


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def users(self) -> Mapping[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = defaultdict(list)
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                users[operand].append(instruction)
        return users


class Compiled:
    """The program of one device.

    Args:
        text: `compiled.as_text()`.
        branches: how often each branch of a conditional runs, of one run of the conditional.
    """

    def __init__(self, text: str, branches: Sequence[float] = ()) -> None:
        self.branches = branches
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation | None = None
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = Computation(match["name"])
                self.computations[current.name] = current
                self.entry = current.name if match["entry"] else self.entry
            elif current is not None and (match := _INSTRUCTION.match(line)):
                instruction = _instruction(match["name"], match["rest"])
                current.instructions[instruction.name] = instruction
        self.runs = self._runs()

    def _runs(self) -> Mapping[str, float]:
        """Computation -> how often it runs in one step."""
        runs: dict[str, float] = defaultdict(float)
        waiting = [(self.entry, 1.0)]
        while waiting:
            name, times = waiting.pop()
            runs[name] += times
            for instruction in self.computations[name].instructions.values():
                called = _called(instruction)
                often: Sequence[float] = [1.0] * len(called)
                if instruction.opcode == "while":
                    often = [self._trips(instruction)]
                elif instruction.opcode == "conditional" and len(called) == len(self.branches):
                    often = self.branches
                waiting.extend((callee, times * share) for callee, share in zip(called, often, strict=True))
        return runs

    def _trips(self, loop: Instruction) -> float:
        """How often a loop turns: as XLA says on a GPU, or until its counter reaches the number that it is held against.

        Raises:
            JaxguardError: the program does not tell.
        """
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return float(known[1])
        condition = re.search(r"\bcondition=%?([\w.\-]+)", loop.attributes)
        held = list(self.computations[condition[1]].instructions.values()) if condition else []
        limits = [i.attributes for i in held if i.opcode == "constant" and i.attributes.isdecimal()]
        counters = [re.search(r"\bindex=(\d+)", i.attributes) for i in held if i.opcode == "get-tuple-element"]
        if len(limits) != 1 or len(counters) != 1 or counters[0] is None:
            raise JaxguardError(
                f"the compiled program does not tell how often its loop {loop.name} turns; this is a bug"
            )
        return math.ceil(int(limits[0]) / self._step(loop, int(counters[0][1])))

    def _step(self, loop: Instruction, counter: int) -> int:
        """What one turn adds to the loop's counter: more than 1 where the compiler made one turn of several."""
        body = self.computations[_called(loop)[0]].instructions
        added = body[next(reversed(body.values())).operands[counter]]
        constants = [body[name].attributes for name in added.operands if body[name].opcode == "constant"]
        return int(constants[0]) if added.opcode == "add" and constants else 1

    def walk(self) -> Iterator[tuple[Computation, Instruction, float]]:
        """Every instruction with its computation and how often it runs."""
        for name, times in self.runs.items():
            for instruction in self.computations[name].instructions.values():
                yield self.computations[name], instruction, times

    @cached_property
    def _fused(self) -> set[str]:
        """Computations that are the inside of a kernel: their arrays are no memory."""
        return {callee for _, one, _ in self.walk() if one.opcode == "fusion" for callee in _called(one)}

    @cached_property
    def matmul_flops(self) -> float:
        """FLOPs of matrix products; those inside a vendor's attention kernel are not visible."""
        return float(sum(times * _flops(instruction, home) for home, instruction, times in self.walk()))

    @cached_property
    def kernels(self) -> Mapping[str, float]:
        """Names of the vendor's kernels -> how often they run; a TPU's compiler has calls that are no kernels besides."""
        found: dict[str, float] = defaultdict(float)
        for _, instruction, times in self.walk():
            if instruction.opcode == "custom-call" and (
                match := re.search(r'target="([^"]*\$[^"]*|tpu_custom_call)"', instruction.attributes)
            ):
                found[match[1]] += times
        return found

    def collectives(self, mesh: Mapping[str, int], linked: int) -> list[Collective]:
        """All collectives, the largest traffic first; equal ones are one entry.

        Args:
            mesh: axis -> devices.
            linked: how many devices that follow one another in the mesh are linked.
        """
        found: dict[Collective, float] = defaultdict(float)
        channels: set[str] = set()
        for home, instruction, times in self.walk():
            if one := _between_slices(instruction, home, math.prod(mesh.values()) // linked):
                found[one] += times
                continue
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            # On a TPU a collective stands in every fusion that it runs beside, from its start to its end.
            if channel := re.search(r"channel_id=(\d+)", instruction.attributes):
                if channel[1] in channels:
                    continue
                channels.add(channel[1])
            groups = groups_of(instruction.attributes, math.prod(mesh.values()))
            given = sum(home.instructions[name].bytes for name in instruction.operands)
            # What starts a collective returns its operands beside its results.
            size = max(given, instruction.bytes - given if instruction.opcode != kind else instruction.bytes)
            near = min(max(Counter(position // linked for position in group).values()) for group in groups)
            one = Collective(kind, axes_of(groups, mesh), len(groups[0]), near, size, 1, place(instruction.source))
            found[one] += times
        return sorted((replace(one, count=times) for one, times in found.items()), key=lambda one: -one.sent)

    @cached_property
    def traffic(self) -> float:
        """Bytes that instructions read from and write to the device's memory, each operand and result once.

        An upper bound where a cache or on-chip memory keeps them.
        """
        total = 0.0
        for home, instruction, times in self.walk():
            if home.name in self._fused or instruction.opcode in FREE or _called_only(instruction):
                continue
            total += times * self._moved(instruction, home)
        return total

    def _moved(self, instruction: Instruction, home: Computation) -> int:
        operands = [home.instructions[name] for name in instruction.operands if name in home.instructions]
        if instruction.opcode in {"dynamic-slice", "gather", "slice"}:
            return 2 * instruction.bytes
        if instruction.opcode == "dynamic-update-slice":
            return 2 * operands[1].bytes
        if instruction.opcode != "fusion":
            return instruction.bytes + sum(operand.bytes for operand in operands)
        callee = self.computations[_called(instruction)[0]]
        parameters = [i for i in callee.instructions.values() if i.opcode == "parameter"]
        read = sum(_read(parameter, callee) for parameter in parameters)
        root = next(reversed(callee.instructions.values()))
        written = (
            callee.instructions[root.operands[1]].bytes if root.opcode == "dynamic-update-slice" else instruction.bytes
        )
        return read + written

    def largest(self, count: int = 5) -> list[Instruction]:
        """The largest arrays that the program makes, without those that it is given."""
        made: dict[str, Instruction] = {}
        for home, instruction, _ in self.walk():
            # One that is updated in place is one array, however often it is written to.
            if home.name not in self._fused and instruction.opcode not in FREE and len(instruction.arrays) == 1:
                made.setdefault(instruction.shown, instruction)
        return sorted(made.values(), key=lambda one: -one.bytes)[:count]


def _instruction(name: str, rest: str) -> Instruction:
    """`f32[8]{0} add(%a, %b), metadata={…}` -> an instruction."""
    stop = _balanced(rest) if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:stop], rest[stop:].lstrip()
    opcode, _, rest = rest.partition("(")
    stop = _balanced("(" + rest) - 1
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[: stop - 1]))
    attributes = rest[: stop - 1] if opcode == "constant" else rest[stop:]
    return Instruction(name, _arrays(result), opcode, operands, attributes)


def _balanced(text: str) -> int:
    """Where the bracket that opens `text` is closed, one past it."""
    depth = 0
    for at, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return at + 1
    return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(match["type"], tuple(int(side) for side in match["sides"].split(",") if side))
        for match in _ARRAY.finditer(text)
    )


def _called(instruction: Instruction) -> list[str]:
    """Computations that it runs."""
    if instruction.opcode.endswith(("-done", "-update")):
        return []
    if instruction.opcode == "while":
        return re.findall(r"\bbody=%?([\w.\-]+)", instruction.attributes)
    if instruction.opcode == "conditional":
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        pair = re.findall(r"\b(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)[::-1]
        return re.findall(r"[\w.\-]+", listed[1]) if listed else pair
    if instruction.opcode in {"fusion", "call", "async-start"}:
        return re.findall(r"\b(?:calls|to_apply)=%?([\w.\-]+)", instruction.attributes)
    return []


def _between_slices(instruction: Instruction, home: Computation, slices: int) -> Collective | None:
    """The collective that a TPU's program has the hosts do over the network: every device sends its part to its own.

    All slices take part, since they lie along `data` (train/sharding.py).
    """
    told = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    if instruction.opcode != "send" or told is None:
        return None
    kind = told[1].lower().replace("_", "-")
    part = home.instructions[instruction.operands[0]].bytes
    size = part * slices if kind == "all-gather" else part
    return Collective(kind, "data", slices, 1, size, 1, "between slices")


def _called_only(instruction: Instruction) -> bool:
    return instruction.opcode in {"while", "call", "conditional"} or instruction.opcode.endswith(("-start", "-done"))


def _flops(instruction: Instruction, home: Computation) -> int:
    """Of one matrix product; 0 for anything else."""
    operands = [home.instructions[name].arrays[0].sides for name in instruction.operands if name in home.instructions]
    result = math.prod(instruction.arrays[0].sides) if instruction.arrays else 0
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        return 2 * result * math.prod(operands[0][int(d)] for d in contracted[1].split(",") if d) if contracted else 0
    if instruction.opcode == "custom-call" and "__cublas$" in instruction.attributes:
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        return 2 * result * math.prod(operands[0][int(d)] for d in re.findall(r"\d+", found[1])) if found else 0
    if instruction.opcode == "convolution":
        return 2 * _convolved(instruction, operands)
    return 0


def _convolved(instruction: Instruction, operands: Sequence[tuple[int, ...]]) -> int:
    """Multiplications of a convolution, as a TPU's matrix products are written.

    A product over a batch is one whose window slides over a spread-out input: most of its positions meet a hole, and
    only those that meet an element are multiplied.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    window = dict(
        re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.attributes) or [""] * 2)[1])
    )
    if labels is None:
        return 0
    left, right, out = labels[1], labels[2], labels[3]
    sides = instruction.arrays[0].sides
    total = sides[out.index("b")] * sides[out.index("f")] * operands[1][right.index("i")]
    spatial = sorted(c for c in out if c.isdigit())

    def read(name: str, default: int) -> list[int]:
        return [int(one) for one in window[name].split("x")] if name in window else [default] * len(spatial)

    pads = [int(p.split("_")[0]) for p in window["pad"].split("x")] if "pad" in window else [0] * len(spatial)
    strides, spread, dilation = read("stride", 1), read("lhs_dilate", 1), read("rhs_dilate", 1)
    for at, axis in enumerate(spatial):
        size, kernel = operands[0][left.index(axis)], operands[1][right.index(axis)]
        met = 0
        for position in range(sides[out.index(axis)]):
            for tap in range(kernel):
                place, hole = divmod(position * strides[at] + tap * dilation[at] - pads[at], spread[at])
                met += hole == 0 and 0 <= place < size
        total *= met
    return total


def place(source: str) -> str:
    """Forward, recomputation, backward or update, and the operation."""
    phase = (
        "recomputed" if "rematted_computation" in source
        else "backward" if "transpose(" in source
        else "forward" if "jvp(" in source
        else "update"
    )  # fmt: skip
    return f"{phase}: {source.rsplit('/', 1)[-1]}"


def _read(parameter: Instruction, home: Computation) -> int:
    """Bytes that a fusion reads of one parameter: where it takes only slices of it, those."""
    users = home.users[parameter.name]
    sliced = {"dynamic-slice", "slice", "gather"}
    if users and all(user.opcode in sliced and user.operands[0] == parameter.name for user in users):
        return sum(user.bytes for user in users)
    if users and all(user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name for user in users):
        return 0
    return parameter.bytes
