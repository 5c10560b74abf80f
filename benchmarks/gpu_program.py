"""What a program that XLA has optimised for a GPU does: its kernels, their bytes and operations.

The bytes of a kernel are those of its operands and results, each counted once; where a kernel
takes, or replaces, but a part of an array, that part counts. Caches are not modelled.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
}
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_NO_KERNEL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"),
    *("partition-id", "replica-id"),
}
_COLLECTIVES = (
    *("all-reduce", "all-gather", "all-to-all", "reduce-scatter"),
    *("collective-permute", "collective-broadcast"),
)
_SHALLOW = {
    *("abs", "add", "and", "bitcast", "ceil", "clamp", "compare", "convert", "copy", "divide"),
    *("exponential", "floor", "log", "logistic", "maximum", "minimum", "multiply", "negate", "not"),
    *("or", "power", "reshape", "rsqrt", "select", "sign", "sqrt", "subtract", "tanh", "transpose"),
}
"""Operations that read no more of their operands than a kernel needs of their result."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One of a program's kernels, or a collective."""

    name: str
    operation: str
    """`fusion`, `copy`, an operation's name, or what library is called."""
    result: str
    """Type of its result."""
    bytes: int
    flops: int
    """Of its convolutions and products."""
    collective: bool
    lines: tuple[str, ...]
    """Lines of the project that it comes from, the innermost first."""


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    result: str
    operation: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found and found[1]

    @property
    def called(self) -> str | None:
        return self.attribute(r"\b(?:calls|to_apply|called_computations=\{)=?%?([\w.\-]+)")


class Program:
    """An optimised program.

    Args:
        text: As `jax.stages.Compiled.as_text` gives it.
        root: Folder in front of the project's files; others' lines are left out.
    """

    def __init__(self, text: str, root: str):
        self._frames = _frames(text, root)
        self._computations: dict[str, dict[str, _Instruction]] = {}
        self._entry = ""
        current: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                current = self._computations[header[2]] = {}
                if header[1]:
                    self._entry = header[2]
            elif instruction := _instruction(line):
                current[instruction.name] = instruction

    def step(self) -> list[Kernel]:
        """Returns the kernels of a turn of the outermost loop, or of all where there is none."""
        loops = [
            each for each in self._computations[self._entry].values() if each.operation == "while"
        ]
        if not loops:
            return list(self._kernels(self._entry))
        # Steps are what most of the program is; a loop beside them is XLA's own.
        bodies = [list(self._kernels(str(each.attribute(r"body=%?([\w.\-]+)")))) for each in loops]
        return max(bodies, key=len)

    def _kernels(self, computation: str) -> Iterator[Kernel]:
        for each in self._computations[computation].values():
            operation = each.operation
            if operation in _NO_KERNEL or operation.endswith("-done"):
                continue
            if operation == "while":
                turns = int(each.attribute(r'known_trip_count":\{"n":"(\d+)"') or 1)
                body = list(self._kernels(str(each.attribute(r"body=%?([\w.\-]+)"))))
                for _ in range(turns):
                    yield from body
            elif operation in ("call", "conditional") and each.called:
                yield from self._kernels(each.called)
            else:
                yield self._kernel(computation, each)

    def _kernel(self, computation: str, each: _Instruction) -> Kernel:
        scope = self._computations[computation]
        operation = each.operation.removesuffix("-start")
        body = self._computations.get(each.called or "", {})
        if operation == "async" and body:
            (operation,) = {i.operation for i in body.values()} - {"parameter", "tuple"}
        collective = operation in _COLLECTIVES
        moved = _bytes(each.result)
        if collective:
            # The result of one that has only started repeats its operand.
            moved = sum(_bytes(scope[name].result) for name in each.operands)
        elif operation == "fusion":
            moved = _fusion_bytes(each, body)
        else:
            moved += sum(_bytes(scope[name].result) for name in dict.fromkeys(each.operands))
        target = each.attribute(r'custom_call_target="([^"]+)"')
        frame = int(each.attribute(r"stack_frame_id=(\d+)") or 0)
        return Kernel(
            name=each.name,
            operation=target or operation,
            result=re.sub(r"\{[\d,:TS()]*\}|/\*.*?\*/", "", each.result),
            bytes=moved,
            flops=self._flops(scope, each),
            collective=collective,
            lines=self._frames.get(frame, ()),
        )

    def _flops(self, scope: dict[str, _Instruction], each: _Instruction) -> int:
        """Returns the operations of a convolution or product, or of those in a kernel."""
        if each.operation == "fusion" and each.called:
            body = self._computations[each.called]
            return sum(self._flops(body, inner) for inner in body.values())
        types = [_shape(scope[name].result) for name in each.operands if name in scope]
        if each.operation == "dot":
            contracted = str(each.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
            depth = math.prod(types[0][int(i)] for i in contracted.split(",") if i)
            return 2 * math.prod(_shape(each.result)) * depth
        labels = each.attribute(r"dim_labels=\w+_(\w+)->")
        target = each.attribute(r'custom_call_target="([^"]+)"') or ""
        if (each.operation != "convolution" and "conv" not in target) or labels is None:
            return 0
        # Each pixel of the forward pass's result meets the kernel's taps and inputs.
        result = _shape(each.result)
        pixels, kernel = result, types[1]
        if target.endswith("BackwardFilter"):
            pixels, kernel = types[1], result
        elif target.endswith("BackwardInput"):
            pixels = types[0]
        taps = math.prod(n for n, label in zip(kernel, labels, strict=True) if label != "o")
        return 2 * math.prod(pixels) * taps


def _instruction(line: str) -> _Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line)
    if not found:
        return None
    rest = found[3]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    operation, opened = rest[: rest.index("(")], rest.index("(")
    close = opened + _closing(rest[opened:])
    inside = rest[opened + 1 : close]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    # A parameter's number stands where others have operands.
    attributes = inside + ")" if operation == "parameter" else rest[close + 1 :]
    return _Instruction(found[2], result, operation, operands, attributes, bool(found[1]))


def _closing(text: str) -> int:
    """Returns where the parenthesis that the text begins with is closed."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return position
    raise ValueError(f"no end of {text[:80]}")


@functools.cache
def _bytes(result: str) -> int:
    return sum(_BYTES[kind] * math.prod(_sides(sides)) for kind, sides in _ARRAY.findall(result))


def _shape(result: str) -> list[int]:
    """Returns the shape of the first array of a type."""
    found = _ARRAY.search(result)
    return _sides(found[2]) if found else []


def _sides(text: str) -> list[int]:
    return [int(side) for side in text.split(",") if side]


def _fusion_bytes(fusion: _Instruction, body: dict[str, _Instruction]) -> int:
    """Returns what a kernel of several operations reads and writes."""
    users: dict[str, list[_Instruction]] = collections.defaultdict(list)
    for each in body.values():
        for operand in each.operands:
            users[operand].append(each)

    @functools.cache
    def read(name: str) -> int:
        """Returns how many bytes are read of a value in the kernel."""
        whole, parts = _bytes(body[name].result), 0
        for user in users[name]:
            if user.operation in ("dynamic-slice", "slice", "gather"):
                first = user.operands[0] == name
                parts += _bytes(user.result) if first else whole
            elif user.operation == "dynamic-update-slice" and user.operands[0] == name:
                continue
            elif user.operation in _SHALLOW and not user.root:
                parts += round(read(user.name) / max(1, _bytes(user.result)) * whole)
            else:
                return whole
        return min(whole, parts)

    moved, counted = 0, set()
    for each in body.values():
        if each.operation == "parameter":
            position = int(each.attributes.split(")")[0])
            # One array may be several operands.
            array = fusion.operands[position]
            if array not in counted or read(each.name) < _bytes(each.result):
                moved += read(each.name)
            counted.add(array)
        elif each.root:
            results = each.operands if each.operation == "tuple" else (each.name,)
            moved += sum(_written(body, name) for name in results)
    return moved


def _written(body: dict[str, _Instruction], name: str) -> int:
    """Returns how many bytes a kernel writes of one of its results."""
    each = body[name]
    while each.operation == "bitcast":
        each = body[each.operands[0]]
    if each.operation == "dynamic-update-slice":
        # In place: it replaces a part of its operand.
        return _bytes(body[each.operands[1]].result)
    return 0 if each.operation == "parameter" else _bytes(each.result)


def _frames(text: str, root: str) -> dict[int, tuple[str, ...]]:
    """Returns the project's lines of each stack frame in the text's tables, innermost first."""
    files = {int(n): name for n, name in re.findall(r'^(\d+) "(/[^"]*)"$', text, re.MULTILINE)}
    places = {}
    for number, file, line in re.findall(
        r"^(\d+) \{file_name_id=(\d+) function_name_id=\d+ line=(\d+)", text, re.MULTILINE
    ):
        name = files.get(int(file), "")
        ours = name.startswith(root + "/")
        places[int(number)] = f"{name.removeprefix(root + '/')}:{line}" if ours else None
    frames: dict[int, tuple[str, ...]] = {}
    for number, place, parent in re.findall(
        r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?\}", text, re.MULTILINE
    ):
        # Numbered from 1, parents from 2: 1 is none.
        above = frames.get(int(parent or 1) - 1, ())
        line = places.get(int(place))
        frames[int(number)] = (line, *above) if line else above
    return frames
