"""PTX text as basic blocks of instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: str
    offset: int


Operand = str | Address | list  # a list: the parts of a vector


@dataclass
class Instruction:
    """One instruction: its opcode split at dots, operands, and the predicate that guards it."""

    op: tuple[str, ...]
    args: list[Operand]
    predicate: str | None
    negated: bool
    text: str
    line: str  # of the kernel's source, from ``.loc``


@dataclass
class Block:
    """Instructions that run one after the other, and what ends them: a branch, a barrier, or nothing."""

    index: int
    instructions: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None
    target: int = -1

    def everything(self) -> list[Instruction]:
        return [*self.instructions, *([] if self.end is None else [self.end])]


@dataclass
class Function:
    """A kernel: its parameters in order, bits by register (1 of a predicate), blocks, threads a program."""

    name: str
    parameters: list[str]
    widths: dict[str, int]
    blocks: list[Block]
    threads: int


def parse(text: str) -> Function:
    """The one kernel in a PTX text."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.MULTILINE))
    text = re.sub(r"//[^\n]*", "", text)
    if ".func" in text:
        raise NotImplementedError("a PTX text with functions that are called")
    head = re.search(r"\.entry\s+(\w+)\s*\(([^)]*)\)", text)
    begin = text.index("{", head.end())
    threads = int(re.search(r"\.reqntid\s+(\d+)", text[head.end() : begin])[1])
    parameters = [line.split()[-1] for line in head[2].split(",") if line.strip()]
    body = text[begin + 1 : _end(text, begin) - 1]
    widths: dict[str, int] = {}
    items = list(_items(body, files, widths))
    return Function(head[1], parameters, widths, _blocks(items), threads)


def _end(text: str, begin: int) -> int:
    """Just after the brace that closes the one at ``begin``."""
    depth = 0
    for match in re.finditer(r"[{}]", text[begin:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return begin + match.end()
    raise ValueError("a PTX text that ends within a function")


def _items(body: str, files: dict[str, str], widths: dict[str, int]) -> Iterator[str | Instruction]:
    """Labels and instructions; declared registers go to ``widths``.

    Registers that are declared within braces get names of their own.
    """
    scopes: list[dict[str, str]] = []
    line, serial = "", 0
    for statement in _statements(body):
        if statement == "{":
            scopes.append({})
        elif statement == "}":
            scopes.pop()
        elif statement.endswith(":"):
            yield statement[:-1]
        elif statement.startswith(".loc"):
            _, file, number, *_ = statement.split()
            line = f"{files.get(file, '?').rsplit('/', 1)[-1]}:{number}"
        elif statement.startswith(".reg"):
            kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.DOTALL).groups()
            width = 1 if kind == "pred" else int(re.sub(r"\D", "", kind))
            for name in map(str.strip, names.split(",")):
                several = re.fullmatch(r"(.*)<(\d+)>", name)
                if several:
                    widths.update({f"{several[1]}{i}": width for i in range(int(several[2]))})
                    continue
                if scopes:
                    serial += 1
                    scopes[-1][name] = name = f"{name}__{serial}"
                widths[name] = width
        elif not statement.startswith("."):
            for scope in reversed(scopes):
                for old, new in scope.items():
                    statement = re.sub(rf"(?<![\w%$.]){re.escape(old)}(?![\w$])", new, statement)
            yield _instruction(statement, line)


def _statements(body: str) -> Iterator[str]:
    """Braces, labels, ``.loc`` lines, and what a semicolon ends."""
    for match in re.finditer(r"\s*([{}]|[\w$]+:|\.loc[^\n]*|[^;]*(?=;))[;\s]*", body):
        if match[1].strip():
            yield match[1].strip()


def _instruction(text: str, line: str) -> Instruction:
    predicate, negated, op, rest = re.fullmatch(r"(?:@(!?)([%\w]+)\s+)?(\S+)\s*(.*)", text, re.DOTALL).group(
        2, 1, 3, 4
    )
    # Commas within braces and brackets separate no operands.
    args = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
    return Instruction(
        tuple(op.split(".")), [_operand(x) for x in args], predicate, bool(negated), text, line
    )


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return [part.strip() for part in text[1:-1].split(",")]
    if text.startswith("["):
        base, offset = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text).groups()
        return Address(base, int(offset or "0", 0))
    return text


def _blocks(items: list[str | Instruction]) -> list[Block]:
    targets = {x.args[0] for x in items if isinstance(x, Instruction) and x.op[0] == "bra"}
    blocks, places = [Block(0)], {}
    for item in items:
        if isinstance(item, str):
            if item in targets:
                if blocks[-1].instructions:
                    blocks.append(Block(len(blocks)))
                places[item] = len(blocks) - 1
        elif item.op[0] in ("bra", "ret") or item.op[:2] == ("bar", "sync"):
            blocks[-1].end = item
            blocks.append(Block(len(blocks)))
        else:
            blocks[-1].instructions.append(item)
    for block in blocks:
        if block.end is not None and block.end.op[0] == "bra":
            block.target = places[block.end.args[0]]
    return blocks
