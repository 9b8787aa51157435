"""PTX text into a program: parameters, registers, shared arrays, instructions, labels."""

from __future__ import annotations

import re
from dataclasses import dataclass

from evidence.ptx.memory import Fault


@dataclass(frozen=True, slots=True)
class Instruction:
    """`@!%p1 add.s32 %r1, %r2, 4;` -> guard "%p1", negated, opcode "add.s32", its operands."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    text: str


@dataclass(frozen=True, slots=True)
class Program:
    """One kernel. `widths` are the declared bits of registers by prefix; predicates have 1."""

    name: str
    parameters: tuple[str, ...]
    threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    widths: dict[str, int]
    shared: dict[str, int]
    shared_bytes: int


_ENTRY = re.compile(r"\.entry\s+(\w+)\((.*?)\)(.*?)\{", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+[^,]*?(\w+)\s*(?:,|$)", re.DOTALL)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+([%\w]+?)(?:<\d+>)?\s*;")
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d*)\]")
_LABEL = re.compile(r"^\s*([$\w]+):(?!:)")
_GUARDED = re.compile(r"^@(!?)(%\w+)\s+(.*)$", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_DIRECTIVE = (".loc", ".file", ".pragma", ".reg", ".shared", ".section")


def parse(ptx: str) -> Program:
    """The first kernel of a module. Raises Fault for local memory, which means spilled registers,
    and for calls; an unknown instruction fails when it is met."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise Fault("no .entry in this PTX")
    name, parameters, directives = entry.groups()
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", directives)
    body = _body(ptx[entry.end() :])
    if ".local" in body or re.search(r"\bcall\b", body):
        raise Fault(f"{name}: local memory and calls are not emulated")
    shared, offset = dict[str, int](), 0
    for align, array, size in _SHARED.findall(ptx):
        offset = -(-offset // int(align)) * int(align)
        shared[array] = offset
        offset += int(size or 0)
    instructions, labels = _instructions(body)
    return Program(
        name=name,
        parameters=tuple(_PARAMETER.findall(parameters)),
        threads=int(threads[1]) if threads else 1,
        instructions=instructions,
        labels=labels,
        widths={reg: _width(kind) for kind, reg in _REGISTERS.findall(body)},
        shared=shared,
        shared_bytes=offset,
    )


def _width(kind: str) -> int:
    return 1 if kind == "pred" else int(re.sub(r"\D", "", kind))


def _body(text: str) -> str:
    """Up to the brace that closes the kernel."""
    depth = 1
    for index, letter in enumerate(text):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if not depth:
            return text[:index]
    raise Fault("the kernel's body has no end")


def _instructions(body: str) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    # Scopes open and close on lines of their own; directives end with their line.
    lines = (line.strip() for line in body.splitlines())
    statements = (line for line in lines if line not in "{}" and not line.startswith(_DIRECTIVE))
    for statement in "\n".join(statements).split(";"):
        while (label := _LABEL.match(statement)) is not None:
            labels[label[1]] = len(instructions)
            statement = statement[label.end() :]
        if statement.strip():
            instructions.append(_instruction(" ".join(statement.split())))
    return tuple(instructions), labels


def _instruction(text: str) -> Instruction:
    guarded = _GUARDED.match(text)
    negated, guard, rest = guarded.groups() if guarded else ("", None, text)
    opcode, _, operands = rest.partition(" ")
    return Instruction(opcode, tuple(_OPERAND.findall(operands)), guard, bool(negated), text)
