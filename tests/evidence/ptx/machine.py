"""Executes a program: blocks of threads in lockstep, each thread with its own program counter.

Where threads diverge, those that are furthest behind go first, so that they meet again. A barrier
that only some threads of a block reach is a Fault.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from evidence.ptx.arithmetic import bf16_to_f32, f32_to_bf16
from evidence.ptx.memory import Fault, Memory
from evidence.ptx.operations import OPERATIONS, Operation
from evidence.ptx.program import Instruction, Program
from evidence.ptx.tiles import load_matrices, multiply, store_matrices

Values = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

_THREADS_AT_ONCE = 1 << 16
_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
_ACCESS = re.compile(r"(ld|st)\.(global|shared|param)(?:\.v([248]))?\.([busf])(8|16|32|64)$")
_MATRICES = re.compile(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16$")
_PRODUCT = re.compile(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(f16|bf16)\.\1\.f32$")
_SHUFFLE = re.compile(r"shfl\.sync\.(bfly|idx|down|up)\.b32$")
_REDUCTION = re.compile(r"redux\.sync\.(min|max)\.([su]32)$")
_MOVE = re.compile(r"mov\.([busf])(16|32|64)$")
_POISON = 0xCDCDCDCDCDCDCDCD
"""What a register lane holds before it is written: nothing that a test could mistake."""


def run(
    program: Program,
    grid: tuple[int, int, int],
    arguments: tuple[int, ...],
    memory: Memory,
    shared_bytes: int = 0,
    only: Sequence[int] | None = None,
) -> None:
    """Execute every block of the grid, or `only` some by number, x first; `arguments` are the bits
    of the kernel's parameters."""
    if len(arguments) != len(program.parameters):
        raise Fault(
            f"{program.name}: {len(program.parameters)} parameters, {len(arguments)} arguments"
        )
    numbers = range(grid[0] * grid[1] * grid[2]) if only is None else only
    at_once = max(1, _THREADS_AT_ONCE // program.threads)
    for first in range(0, len(numbers), at_once):
        blocks = np.array(numbers[first : first + at_once], np.int64)
        _Machine(program, grid, blocks, arguments, memory, shared_bytes).run()


class _Machine:
    """Registers and shared memory of some blocks, and where each of their threads is."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        blocks: npt.NDArray[np.int64],
        arguments: tuple[int, ...],
        memory: Memory,
        shared_bytes: int,
    ) -> None:
        self.program, self.memory = program, memory
        self.count = program.threads * len(blocks)
        self.block = np.repeat(blocks, program.threads)
        self.thread = np.arange(self.count)
        self.parameters = dict(zip(program.parameters, arguments, strict=True))
        self.stride = max(16, program.shared_bytes + shared_bytes)
        self.shared = np.full(len(blocks) * self.stride, 0xCD, np.uint8)
        self.registers: dict[str, Values] = {}
        self.special = self._special(grid)
        self.widths = dict(program.widths)
        self.constants: dict[tuple[str, str], Values] = {}  # read often, and never written to
        self.active: Mask = np.ones(self.count, bool)
        self.whole = True  # all threads are active

    @np.errstate(all="ignore")
    def run(self) -> None:
        instructions, end = self.program.instructions, len(self.program.instructions)
        counters = np.zeros(self.count, np.int64)
        while (here := int(counters.min())) < end:
            live = counters == here
            instruction = instructions[here]
            self.active = live
            if instruction.guard is not None:
                self.active = live & (self.read(instruction.guard, "pred") ^ instruction.negated)
            self.whole = bool(self.active.all())
            counters[live] = here + 1
            try:
                if instruction.opcode in ("bra", "bra.uni"):
                    counters[self.active] = self._target(instruction)
                elif instruction.opcode in ("ret", "exit"):
                    counters[self.active] = end
                elif self.whole or self.active.any():
                    self._execute(instruction, live, counters)
            except Fault as fault:
                message = f"{self.program.name}: {fault} at `{instruction.text}`"
                raise Fault(message) from None

    def read(self, operand: str, kind: str, *, narrow: bool = False) -> Values:
        """An operand as `kind`, such as "s32" or "pred"; `narrow` takes a register's low bits."""
        if operand in self.registers:
            bits, width = _bits(kind), self._width(operand)
            if width < bits or (width > bits and not narrow):
                raise Fault(f"register {operand} has {width} bits, {kind} is read")
            return _typed(self.registers[operand], kind)
        if (operand, kind) not in self.constants:
            self.constants[operand, kind] = self._constant(operand, kind)
        return self.constants[operand, kind]

    def _constant(self, operand: str, kind: str) -> Values:
        bits = _bits(kind)
        if operand in self.special:
            return _typed(self.special[operand], kind)
        if operand.startswith("%"):
            raise Fault(f"register {operand} is read before it is written")
        if operand in self.program.shared:
            return np.full(self.count, self.program.shared[operand], _UNSIGNED[bits])
        hexadecimal = operand.startswith(("0f", "0d"))
        number = int(operand[2:], 16) if hexadecimal else int(operand.rstrip("U"), 0)
        return _typed(np.full(self.count, number & ((1 << bits) - 1), _UNSIGNED[bits]), kind)

    def write(self, register: str, values: Any, kind: str) -> None:
        """Set the active lanes; a wider register is extended by the sign of `kind`."""
        if register == "_":
            return
        width = self._width(register)
        if width < _bits(kind):
            raise Fault(f"register {register} has {width} bits, {kind} is written")
        if kind == "pred":
            raw = np.asarray(values, bool)
        else:
            raw = _raw(values, kind).astype(_UNSIGNED[width])
        if self.whole:
            self.registers[register] = raw
            return
        old = self.registers.get(register)
        if old is None:
            fill = True if kind == "pred" else _POISON & ((1 << width) - 1)
            old = np.full(self.count, fill, raw.dtype)
        self.registers[register] = np.where(self.active, raw, old)

    def _execute(self, instruction: Instruction, live: Mask, counters: Values) -> None:
        opcode, operands = instruction.opcode, instruction.operands
        if (operation := OPERATIONS.get(opcode)) is not None:
            self._compute(operation, operands, narrow=opcode.startswith("cvt"))
        elif (access := _ACCESS.match(opcode)) is not None:
            self._access(access, operands)
        elif (move := _MOVE.match(opcode)) is not None:
            self._move(move[1] + move[2], *operands)
        elif opcode == "mov.pred":
            self.write(operands[0], self._predicate(operands[1]), "pred")
        elif opcode == "bar.sync":
            self._barrier(live, counters < len(self.program.instructions))
        elif (shuffle := _SHUFFLE.match(opcode)) is not None:
            self._shuffle(shuffle[1], operands)
        elif (reduction := _REDUCTION.match(opcode)) is not None:
            self._reduce(reduction[1], reduction[2], operands)
        elif (matrices := _MATRICES.match(opcode)) is not None:
            self._matrices(matrices, operands)
        elif (product := _PRODUCT.match(opcode)) is not None:
            self._product(product[1], operands)
        else:
            raise Fault(f"unknown instruction {opcode}")

    def _compute(self, operation: Operation, operands: tuple[str, ...], *, narrow: bool) -> None:
        inputs = [
            self.read(operand, kind, narrow=narrow)
            for operand, kind in zip(operands[1:], operation.operands, strict=True)
        ]
        self.write(operands[0], operation.compute(*inputs), operation.result)

    def _access(self, access: re.Match[str], operands: tuple[str, ...]) -> None:
        verb, space, vector, sign, bits = access.groups()
        kind, size = sign + bits, int(bits) // 8
        if space == "param":
            value = self.parameters[operands[1].strip("[] ")] & ((1 << int(bits)) - 1)
            raw = np.full(self.count, value, _UNSIGNED[int(bits)])
            self.write(operands[0], _typed(raw, kind), kind)
            return
        target, data = (operands[1], operands[0]) if verb == "ld" else operands
        registers = _listed(data)
        if len(registers) != int(vector or 1):
            raise Fault(f"{len(registers)} registers for a vector of {vector or 1}")
        lanes = np.flatnonzero(self.active)
        addresses = self.address(target)[lanes]
        if verb == "st":
            parts = [self.read(r, kind, narrow=True)[lanes] for r in registers]
            self._store(space, addresses, np.stack(parts, 1).view(np.uint8), lanes)
            return
        raw = self._load(space, addresses, size * len(registers), lanes)
        for column, register in zip(
            raw.view(_UNSIGNED[int(bits)]).reshape(len(lanes), -1).T, registers, strict=True
        ):
            values = np.zeros(self.count, _UNSIGNED[int(bits)])
            values[lanes] = column
            self.write(register, _typed(values, kind), kind)

    def address(self, operand: str) -> npt.NDArray[np.uint64]:
        """`[%rd1+16]`, in bytes."""
        base, _, offset = operand.strip("[] ").replace("+-", "+ -").partition("+")
        shift = np.uint64(int(offset or "0", 0) & ((1 << 64) - 1))
        base = base.strip()
        if base in self.program.shared:
            return np.full(self.count, self.program.shared[base], np.uint64) + shift
        # Shared memory is addressed by registers of 32 bits as well.
        kind = f"u{self._width(base)}" if base.startswith("%") else "u64"
        return self.read(base, kind).astype(np.uint64) + shift

    def shared_offsets(self, addresses: Any, width: int, lanes: Any) -> npt.NDArray[np.int64]:
        """[N, width] places in `shared` of each lane's own block."""
        first = addresses.astype(np.int64)
        if len(first) and (int(first.max()) + width > self.stride or int(first.min()) < 0):
            raise Fault(f"illegal address: byte {int(first.max())} of {self.stride} shared ones")
        if (first % width).any():
            raise Fault(f"misaligned address: {width} bytes of shared memory")
        offsets = (lanes // self.program.threads) * self.stride + first
        return offsets[:, None] + np.arange(width)

    def _load(self, space: str, addresses: Any, width: int, lanes: Any) -> npt.NDArray[np.uint8]:
        if space == "shared":
            return self.shared[self.shared_offsets(addresses, width, lanes)]
        return self.memory.load(addresses, width, lanes, self.block[lanes])

    def _store(self, space: str, addresses: Any, values: Any, lanes: Any) -> None:
        if space == "shared":
            self.shared[self.shared_offsets(addresses, values.shape[1], lanes)] = values
        else:
            self.memory.store(addresses, values, lanes, self.block[lanes])

    def _move(self, kind: str, target: str, source: str) -> None:
        bits = int(kind[1:])
        if target.startswith("{"):
            parts, value = _listed(target), self.read(source, f"u{bits}")
            each = bits // len(parts)
            for i, part in enumerate(parts):
                self.write(part, (value >> _UNSIGNED[bits](each * i)), f"u{each}")
        elif source.startswith("{"):
            parts = _listed(source)
            each, total = bits // len(parts), np.zeros(self.count, _UNSIGNED[bits])
            for i, part in enumerate(parts):
                # The compiler leaves lanes of a vector undefined that nothing uses.
                if part.startswith("%") and part not in self.special | self.registers:
                    part = str(_POISON & ((1 << each) - 1))
                piece = self.read(part, f"u{each}").astype(_UNSIGNED[bits])
                total |= piece << _UNSIGNED[bits](each * i)
            self.write(target, total, f"u{bits}")
        else:
            self.write(target, self.read(source, f"u{bits}"), f"u{bits}")

    def _predicate(self, operand: str) -> Values:
        if operand.lstrip("-").isdigit():
            return np.full(self.count, int(operand) != 0)
        return self.read(operand, "pred")

    def _barrier(self, live: Mask, running: Mask) -> None:
        """Every running thread of a block that is here must be here."""
        here = np.zeros(self.count, bool)
        here[live] = True
        by_block = here.reshape(-1, self.program.threads)
        waiting = (running.reshape(by_block.shape) & ~by_block).any(1) & by_block.any(1)
        if waiting.any() or not self.active[live].all():
            raise Fault("barrier that some threads of a block do not reach")

    def _shuffle(self, mode: str, operands: tuple[str, ...]) -> None:
        value, by = self.read(operands[1], "b32"), self.read(operands[2], "s32").astype(np.int64)
        lane = self.thread % 32
        source = {"bfly": lane ^ by, "idx": by, "down": lane + by, "up": lane - by}[mode]
        source = np.where((source < 0) | (source > 31), lane, source)
        self.write(operands[0].split("|")[0], value[self.thread - lane + source], "b32")

    def _reduce(self, extreme: str, kind: str, operands: tuple[str, ...]) -> None:
        """Over the 32 lanes of a warp; of part of a warp it is not known here."""
        if not (self.whole and (self.read(operands[2], "s32") == -1).all()):
            raise Fault("redux.sync of part of a warp")
        lanes = self.read(operands[1], kind).reshape(-1, 32)
        extremes = lanes.max(1) if extreme == "max" else lanes.min(1)
        self.write(operands[0], np.repeat(extremes, 32), kind)

    def _matrices(self, matrices: re.Match[str], operands: tuple[str, ...]) -> None:
        verb, count, transposed = matrices.groups()
        target, data = (operands[1], operands[0]) if verb == "ld" else operands
        registers = _listed(data)
        if len(registers) != int(count) or not self.whole:
            raise Fault("a matrix instruction needs whole warps and a register for each matrix")
        offsets = self.shared_offsets(self.address(target), 16, self.thread)
        if verb == "ld":
            matrices_loaded = load_matrices(
                self.shared, offsets, int(count), transposed is not None
            )
            for register, values in zip(registers, matrices_loaded, strict=True):
                self.write(register, values, "b32")
        else:
            values = [self.read(register, "b32") for register in registers]
            store_matrices(self.shared, offsets, values, transposed is not None)

    def _product(self, kind: str, operands: tuple[str, ...]) -> None:
        if not self.whole:
            raise Fault("a matrix instruction needs whole warps")
        d, a, b, c = (_listed(operand) for operand in operands)
        left, right = ([self.read(r, "b32") for r in registers] for registers in (a, b))
        to_float = bf16_to_f32 if kind == "bf16" else _half_to_float
        result = multiply(left, right, [self.read(r, "f32") for r in c], to_float)
        for register, values in zip(d, result, strict=True):
            self.write(register, values, "f32")

    def _target(self, instruction: Instruction) -> int:
        if instruction.operands[0] not in self.program.labels:
            raise Fault("unknown label")
        return self.program.labels[instruction.operands[0]]

    def _width(self, register: str) -> int:
        if (width := self.widths.get(register)) is None:
            prefix = register.rstrip("0123456789")
            if (width := self.program.widths.get(prefix)) is None:
                raise Fault(f"register {register} is not declared")
            self.widths[register] = width
        return width

    def _special(self, grid: tuple[int, int, int]) -> dict[str, Values]:
        across, down, _ = grid
        block = self.block
        named: dict[str, Any] = {
            "%tid.x": self.thread % self.program.threads,
            "%laneid": self.thread % 32,
            "%ctaid.x": block % across,
            "%ctaid.y": block // across % down,
            "%ctaid.z": block // across // down,
        }
        for axis, size in zip("xyz", grid, strict=True):
            named[f"%nctaid.{axis}"] = np.full(self.count, size)
        return {name: values.astype(np.uint32) for name, values in named.items()}


def _listed(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


@cache
def _bits(kind: str) -> int:
    return {"pred": 1, "bf16": 16, "f16x2": 32, "bf16x2": 32}.get(kind) or int(kind.lstrip("busf"))


def _typed(raw: Values, kind: str) -> Any:
    """Unsigned bits as `kind`; a pair of 16-bit floats as two arrays, the low half first."""
    if kind == "pred":
        return raw
    if kind in ("f16x2", "bf16x2"):
        halves = (raw >> raw.dtype.type(16 * i) for i in (0, 1))
        return tuple(_typed(half & half.dtype.type(0xFFFF), kind[:-2]) for half in halves)
    raw = raw.astype(_UNSIGNED[_bits(kind)], copy=False)
    return bf16_to_f32(raw) if kind == "bf16" else raw.view(_type(kind))


@cache
def _type(kind: str) -> Any:
    by_width: dict[str, dict[int, Any]] = {"s": _SIGNED, "f": _FLOAT}
    return by_width.get(kind[0], _UNSIGNED)[_bits(kind)]


def _raw(values: Any, kind: str) -> Values:
    """Bits of `kind`: integers wrap, floats round; what is signed stays so, to be extended."""
    if kind in ("f16x2", "bf16x2"):
        low, high = (_raw(half, kind[:-2]).astype(np.uint32) for half in values)
        return low | (high << np.uint32(16))
    if kind == "bf16":
        return f32_to_bf16(values)
    if kind[0] == "f":
        bits = _bits(kind)
        return np.ascontiguousarray(values.astype(_FLOAT[bits])).view(_UNSIGNED[bits])
    return values.astype((_SIGNED if kind[0] == "s" else _UNSIGNED)[_bits(kind)])


def _half_to_float(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return bits.view(np.float16).astype(np.float32)
