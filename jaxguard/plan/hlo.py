"""Read a compiled program: matrix products, collectives, memory traffic, fused kernels, large buffers.

XLA's own cost analysis is empty for an absent GPU and counts a loop's body once for a TPU, so we parse the text of the
optimized program. An instruction counts as often as it runs: a loop's body times the loop's trip count.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from jaxguard.utils.errors import JaxguardError

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota"}
"""Instructions that move no bytes."""
SLICES = {"dynamic-slice", "gather", "slice"}
"""Instructions that read only a part of their first operand."""

CALLED = {"while": "body", "conditional": "(?:true|false)_computation"}
CALLED |= dict.fromkeys(("fusion", "call", "async-start"), "(?:calls|to_apply)")
"""Instruction -> the attribute that names the computations which it runs."""

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
# `%name = f32[8]{0} add(%a, %b), metadata={…}`; a result is one array, or several in brackets.
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<result>\(.*?\)|\S+) (?P<opcode>[\w\-]+)"
    r"\((?P<operands>.*?)\)(?P<attributes>, [\w\-]+=.*)?$"
)
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_SCOPE = re.compile(r"\b(embed|attention|mlp|head|loss|optimizer)\b")

Array = tuple[str, tuple[int, ...]]
"""Type and shape of an array in the program."""


@dataclass(frozen=True, eq=False)
class Instruction:
    """One line of the program; `attributes` is what follows the operands, a constant's value, or a parameter's number."""

    name: str
    arrays: Sequence[Array]
    opcode: str
    operands: Sequence["Instruction"]
    attributes: str

    @property
    def bytes(self) -> int:
        total = 0
        for dtype, shape in self.arrays:
            bits = re.search(r"\d+", dtype)
            total += math.prod(shape) * (max(1, int(bits[0]) // 8) if bits else dtype == "pred")
        return total

    @property
    def result(self) -> str:
        """Types and shapes of its arrays, as the program writes them."""
        return " ".join(f"{dtype}[{','.join(map(str, shape))}]" for dtype, shape in self.arrays)

    @property
    def source(self) -> str:
        """The JAX operation that it comes from; see `describe`."""
        op_name = self.search(r'op_name="([^"]*)"')
        return describe(op_name[1] if op_name else self.name)

    @property
    def called(self) -> list[str]:
        """Computations that it runs."""
        if branches := self.search(r"branch_computations=\{([^}]*)\}"):
            return re.findall(r"[\w.\-]+", branches[1])
        if self.opcode not in CALLED:
            return []
        names = re.findall(rf"\b{CALLED[self.opcode]}=%?([\w.\-]+)", self.attributes)
        return names[::-1] if self.opcode == "conditional" else names

    def search(self, pattern: str) -> re.Match[str] | None:
        """Search the attributes."""
        return re.search(pattern, self.attributes)


def describe(op_name: str) -> str:
    """`jit(step)/transpose(jvp(mlp))/dot_general` -> `backward mlp: dot_general`: pass, named scope, operation."""
    phases = {"rematted_computation": "recomputed", "transpose(": "backward", "jvp(": "forward"}
    phase = [name for sign, name in phases.items() if sign in op_name][:1]
    path, _, operation = op_name.rpartition("/")
    return f"{' '.join([*phase, *_SCOPE.findall(path)[-1:]]) or 'step'}: {operation}"


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind, axis and size.

    Attributes:
        axes: mesh axes that it runs over, joined by +; `?` where its groups are those of no axis.
        group: devices that take part.
        near: how many of them are linked, on one host of GPUs or in one TPU slice.
        size: bytes of the whole array that one device holds before or after it, whichever is larger.
        count: how often it runs in one step.
        hidden: how many of these have matrix products between their start and their end, in the compiler's schedule.
    """

    kind: str
    axes: str
    group: int
    near: int
    size: int
    count: float
    source: str
    hidden: float = 0

    @property
    def sent(self) -> float:
        """Bytes that each device sends in one step, by a ring or an equally good algorithm."""
        passes = 2 if self.kind == "all-reduce" else 1
        share = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return self.count * passes * share * self.size


class CompiledProgram:
    """The program of one device, from `compiled.as_text()`.

    `branches`: how often each branch of a conditional runs, as a share of the conditional's runs.
    """

    def __init__(self, text: str, branches: Sequence[float] = ()) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        waiting: list[tuple[str, float]] = []
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                known: dict[str, Instruction] = {}
                body = self.computations[match["name"]] = []
                waiting += [(match["name"], 1.0)] if match["entry"] else []
            elif match := _INSTRUCTION.match(line):
                name, opcode, operands = match["name"], match["opcode"], match["operands"]
                shapes = ((dtype, shape.split(",")) for dtype, shape in _ARRAY.findall(match["result"]))
                arrays = [(dtype, tuple(int(size) for size in sizes if size)) for dtype, sizes in shapes]
                used = [known[each] for each in re.findall(r"%([\w.\-]+)", operands) if each in known]
                attributes = operands if opcode in ("constant", "parameter") else match["attributes"] or ""
                known[name] = Instruction(name, arrays, opcode, used, attributes)
                body.append(known[name])
        runs: dict[str, float] = defaultdict(float)  # computation -> how often it runs in one step
        fused: set[str] = set()
        while waiting:
            name, times = waiting.pop()
            runs[name] += times
            for instruction in self.computations[name]:
                called = instruction.called
                shares: Sequence[float] = [1.0] * len(called)
                if instruction.opcode == "while":
                    shares = [self._trip_count(instruction)]
                elif instruction.opcode == "conditional" and len(called) == len(branches):
                    shares = branches
                elif instruction.opcode == "fusion":
                    fused.update(called)
                waiting.extend((callee, times * share) for callee, share in zip(called, shares, strict=True))
        self.instructions = [(i, times) for name, times in runs.items() for i in self.computations[name]]
        """Every instruction, and how often it runs in one step."""
        unfused = [(name, times) for name, times in runs.items() if name not in fused]
        self.fused = [self.computations[name] for name in fused]
        self.buffers = [(i, times) for name, times in unfused for i in self.computations[name] if i.opcode not in FREE]
        """Those whose results are in memory: not inside a fused kernel, and no mere names."""

    def _trip_count(self, loop: Instruction) -> float:
        """How often a loop's body runs: as the program states it, or until its counter is at its limit; once if data limit it."""
        if known := loop.search(r'known_trip_count":\{"n":"(\d+)"'):
            return float(known[1])
        condition = loop.search(r"\bcondition=%?([\w.\-]+)")
        tested = self.computations[condition[1]] if condition else []
        limits = [i.attributes for i in tested if i.opcode == "constant" and i.attributes.isdecimal()]
        counters = [i.search(r"\bindex=(\d+)") for i in tested if i.opcode == "get-tuple-element"]
        if not limits and len(counters) == 2:
            return 1  # attention on a CPU, which the planner counts by itself
        if len(limits) != 1 or len(counters) != 1 or counters[0] is None:
            raise JaxguardError(f"the trip count of loop {loop.name} is not in the compiled program; this is a bug")
        # The counter rises by more than 1 where the compiler merged several iterations.
        added = self.computations[loop.called[0]][-1].operands[int(counters[0][1])]
        constants = [operand.attributes for operand in added.operands if operand.opcode == "constant"]
        increment = int(constants[0]) if added.opcode == "add" and constants else 1
        return math.ceil(int(limits[0]) / increment)

    def matmul_flops(self) -> float:
        """FLOPs of matrix products; those inside a vendor's attention kernel are not visible."""
        return float(sum(times * _flops(instruction) for instruction, times in self.instructions))

    def kernels(self) -> dict[str, float]:
        """Names of our own kernels and the vendor's -> how often they run; other custom calls of a TPU's program are left out."""
        counts: dict[str, float] = defaultdict(float)
        for instruction, times in self.instructions:
            target = instruction.search(r'target="([^"]*\$[^"]*|tpu_custom_call)"')
            if instruction.opcode == "custom-call" and target:
                ours = instruction.search(r'op_name="[^"]*?(\w+)\)*/pallas_call')
                counts[(ours or target)[1]] += times
        return dict(counts)

    def collectives(self, mesh: Mapping[str, int], linked: int) -> list[Collective]:
        """All collectives, the largest traffic first; equal ones are one. Of the mesh, `linked` devices in a row are linked."""
        counts: dict[Collective, float] = defaultdict(float)
        hidden: dict[Collective, float] = defaultdict(float)
        behind_products = self._behind_products()
        channels: set[str] = set()
        devices = math.prod(mesh.values())
        # A TPU's program writes a reduce-scatter as a fusion of an all-reduce and a slice.
        fused = (body for name, body in self.computations.items() if name.startswith("all-reduce-scatter"))
        scattered = {instruction for body in fused for instruction in body if instruction.opcode == "all-reduce"}
        for instruction, times in self.instructions:
            kind = "reduce-scatter" if instruction in scattered else instruction.opcode.removesuffix("-start")
            transfer = instruction.search(r'_xla_megascale_transfer_type="(\w+)"')
            if instruction.opcode == "send" and transfer:
                # Slices lie along `data` (models/sharding.py). Every device sends its part to its host; hosts do the rest.
                between, slices = transfer[1].lower().replace("_", "-"), devices // linked
                size = instruction.operands[0].bytes * (slices if between == "all-gather" else 1)
                counts[Collective(between, "data", slices, 1, size, 1, "between slices")] += times
            # A TPU's program repeats a collective in every fusion that runs between its start and its end.
            channel = instruction.search(r"channel_id=(\d+)")
            if kind not in COLLECTIVES or (channel and channel[1] in channels):
                continue
            channels |= {channel[1]} if channel else set()
            groups = _device_groups(instruction.attributes, devices)
            inputs = sum(operand.bytes for operand in instruction.operands)
            # The start of a collective returns its operands beside its results.
            started = instruction.opcode.endswith("-start")
            size = max(inputs, instruction.bytes - inputs if started else instruction.bytes)
            near = min(max(Counter(position // linked for position in group).values()) for group in groups)
            axes = _mesh_axes(groups, mesh)
            collective = Collective(kind, axes, len(groups[0]), near, size, 1, instruction.source)
            counts[collective] += times
            hidden[collective] += times * (instruction in behind_products)
        counted = (replace(c, count=times, hidden=hidden[c]) for c, times in counts.items())
        return sorted(counted, key=lambda c: -c.sent)

    def _behind_products(self) -> set[Instruction]:
        """The instructions between whose start and end, in the order of the schedule, the device multiplies matrices.

        A GPU's program has a start and an end; a TPU's may also fuse a collective with products.
        """
        found = {i for body in self.fused if any(map(self._multiplies, body)) for i in body}
        for body in self.computations.values():
            for position, start in enumerate(body):
                if start.opcode.endswith("-start"):
                    later = body[position + 1 :]
                    end = next((n for n, i in enumerate(later) if start in i.operands), 0)
                    if any(map(self._multiplies, later[:end])):
                        found |= {start, *(i for name in start.called for i in self.computations[name])}
        return found

    def _multiplies(self, instruction: Instruction) -> bool:
        """Whether it is, or runs, a matrix product or a vendor's kernel."""
        if instruction.opcode == "custom-call":
            return bool(instruction.search(r'target="([^"]*\$[^"]*|tpu_custom_call)"'))
        inner = (i for name in instruction.called for i in self.computations[name])
        return instruction.opcode in {"dot", "convolution"} or any(map(self._multiplies, inner))

    def traffic(self, scope: str | None = None) -> float:
        """Bytes that instructions read from and write to the device's memory, each operand and result once.

        An upper bound where a cache or on-chip memory keeps them. Of all instructions, or of those in one jax.named_scope.
        """
        # Those that start computations, or wait for them, move nothing themselves.
        return sum(
            times * self._bytes_moved(instruction)
            for instruction, times in self.buffers
            if (scope is None or instruction.search(rf'op_name="[^"]*\b{scope}\b'))
            and instruction.opcode not in {"while", "call", "conditional"}
            and not instruction.opcode.endswith(("-start", "-done"))
        )

    def _bytes_moved(self, instruction: Instruction) -> int:
        if instruction.opcode in SLICES:
            return 2 * instruction.bytes
        if instruction.opcode == "dynamic-update-slice":
            return 2 * instruction.operands[1].bytes
        if instruction.opcode != "fusion":
            return instruction.bytes + sum(operand.bytes for operand in instruction.operands)
        body = self.computations[instruction.called[0]]
        moved = body[-1].operands[1].bytes if body[-1].opcode == "dynamic-update-slice" else instruction.bytes
        return moved + sum(self._bytes_read(i, body) for i in body if i.opcode == "parameter")

    def _bytes_read(self, parameter: Instruction, body: Sequence[Instruction]) -> int:
        """Bytes that a fused kernel reads of a parameter: where its users only take slices of it, or overwrite some, no more."""
        total = 0
        for user in (each for each in body if parameter in each.operands):
            first = user.operands[0] is parameter
            if user.opcode == "fusion":
                inner = self.computations[user.called[0]]
                numbers = {str(n) for n, operand in enumerate(user.operands) if operand is parameter}
                total += sum(
                    self._bytes_read(i, inner) for i in inner if i.opcode == "parameter" and i.attributes in numbers
                )
            elif first and user.opcode in SLICES:
                total += user.bytes
            elif not first or user.opcode != "dynamic-update-slice":
                return parameter.bytes
        return min(total, parameter.bytes)

    def largest(self, count: int = 5) -> list[Instruction]:
        """The largest arrays that the program makes, without its arguments."""
        made: dict[str, Instruction] = {}
        for instruction, _ in self.buffers:
            # An array that is updated in place counts once, however often it is written.
            if len(instruction.arrays) == 1:
                made.setdefault(instruction.result, instruction)
        return sorted(made.values(), key=lambda instruction: -instruction.bytes)[:count]


def _flops(instruction: Instruction) -> int:
    """FLOPs of one matrix product; 0 for any other instruction."""
    pattern = None
    if instruction.opcode == "dot":
        pattern = r"lhs_contracting_dims=\{([\d,]*)\}"
    elif instruction.opcode == "custom-call" and "__cublas$" in instruction.attributes:
        pattern = r'"lhs_contracting_dimensions":\[([^\]]*)\]'
    elif instruction.opcode != "convolution":
        return 0
    shapes = [operand.arrays[0][1] for operand in instruction.operands]
    contracted = instruction.search(pattern) if pattern else None
    if contracted is None:
        return 2 * _convolution_products(instruction, shapes)
    sizes = (shapes[0][int(axis)] for axis in re.findall(r"\d+", contracted[1]))
    return 2 * math.prod(instruction.arrays[0][1]) * math.prod(sizes)


def _convolution_products(instruction: Instruction, shapes: Sequence[tuple[int, ...]]) -> int:
    """Multiplications of a convolution, as a TPU's program writes matrix products.

    A product over a batch is one whose window slides over a dilated input: most of its positions meet a hole, and
    only those that meet an element are multiplied.
    """
    labels = instruction.search(r"dim_labels=(\w+)_(\w+)->(\w+)")
    window = instruction.search(r"window=\{([^}]*)\}")
    if labels is None:
        return 0
    settings = dict(re.findall(r"(\w+)=([\dx_\-]+)", window[1])) if window else {}
    left, right, out = labels[1], labels[2], labels[3]
    result = instruction.arrays[0][1]
    total = result[out.index("b")] * result[out.index("f")] * shapes[1][right.index("i")]
    spatial = sorted(label for label in out if label.isdigit())

    for i, axis in enumerate(spatial):
        names = (("stride", "1"), ("rhs_dilate", "1"), ("pad", "0"), ("lhs_dilate", "1"))
        texts = (settings[name].split("x")[i] if name in settings else default for name, default in names)
        stride, spacing, padding, dilation = (int(text.split("_")[0]) for text in texts)
        taps = np.arange(shapes[1][right.index(axis)]) * spacing - padding
        element, hole = np.divmod(np.arange(result[out.index(axis)])[:, None] * stride + taps, dilation)
        total *= int(np.sum((hole == 0) & (element >= 0) & (element < shapes[0][left.index(axis)])))
    return total


def _device_groups(attributes: str, devices: int) -> list[tuple[int, ...]]:
    """Positions in the mesh of the devices of each group of a collective."""
    order_of = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if named := re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({order_of}\))? \{{([^}}]*)\}}", attributes
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = _iota(named[2], named[3]) if named[2] else np.arange(math.prod(sizes.values()))
        return [tuple(map(int, ids[list(group)])) for group in _groups_along(sizes, re.findall(r"'(\w+)'", named[4]))]
    if iota := re.search(rf"replica_groups=\[(\d+),(\d+)\]<={order_of}", attributes):
        return [tuple(map(int, group)) for group in _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))]
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]+\},?)+)\}", attributes)
    groups = re.findall(r"\{([\d,]+)\}", listed[1]) if listed else []
    return [tuple(map(int, group.split(","))) for group in groups] or [tuple(range(devices))]


def _iota(sides: str, permutation: str | None) -> np.ndarray:
    """Devices in the order of XLA's `[sides]T(permutation)`."""
    sizes = [int(size) for size in sides.split(",")]
    order = np.arange(math.prod(sizes)).reshape(sizes)
    return (order.transpose([int(axis) for axis in permutation.split(",")]) if permutation else order).ravel()


def _groups_along(mesh: Mapping[str, int], axes: Sequence[str]) -> list[tuple[int, ...]]:
    """Groups of devices that differ in these axes only."""
    grid = np.arange(math.prod(mesh.values())).reshape(list(mesh.values()))
    grid = np.moveaxis(grid, [list(mesh).index(axis) for axis in axes], range(-len(axes), 0))
    return [tuple(map(int, group)) for group in grid.reshape(-1, math.prod(mesh[axis] for axis in axes))]


def _mesh_axes(groups: Sequence[tuple[int, ...]], mesh: Mapping[str, int]) -> str:
    """The mesh axes along which the groups lie, `?` if there are none such."""
    wanted = {frozenset(group) for group in groups}
    axes = [axis for axis, size in mesh.items() if size > 1]
    for count in range(1, len(axes) + 1):
        for chosen in combinations(axes, count):
            along = {frozenset(group) for group in _groups_along(mesh, chosen)}
            if all(any(group <= line for line in along) for group in wanted):
                return "+".join(chosen)
    return "?"
