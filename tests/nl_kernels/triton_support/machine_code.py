"""Two faults of compilers that only the machine code of Hopper shows.

A product of wgmma (HGMMA) runs on while the program goes on, until the wait for it (WARPGROUP.DEPBAR). Looked
for are, along every path through a kernel,

- operands in registers that are written before the wait: ptxas 12.8 and 12.9 may do so;
- stores to shared memory between a wait and the next barrier, where a program has several groups of four
  warps: the wait of Triton 3.7.1 is for the own group's products, others may still read what is overwritten.
"""

import re
import subprocess
from pathlib import Path

import pytest
import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
MOST_GROUPS = 8  # that a wait may leave to run
ASSEMBLERS = ("ptxas", "ptxas-blackwell")
NO_REGISTER = re.compile(
    r"(ST|STS|STG|STL|STSM|STAS|LDGSTS|RED|R2UR|R2P|VOTE|VOTEU|BAR|BRA|EXIT|NOP|MEMBAR|WARPGROUP|REDUX|FCHK)\b"
    r"|\w*SETP\b|\w*DEPBAR\b|WARPSYNC|U[A-Z0-9]+\b"
)


def assemble(ptx, assembler, folder):
    """The machine code of a PTX text for sm_90, as text."""
    source, target = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(ptx)
    command = [TOOLS / assembler, "--gpu-name=sm_90a", source, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True)
    if "Unsupported .version" in done.stderr:
        pytest.skip(f"{assembler} is too old for this Triton, which takes another")
    assert done.returncode == 0, done.stderr
    listing = subprocess.run([TOOLS / "nvdisasm", "-c", target], check=True, capture_output=True, text=True)
    return listing.stdout


class Listing:
    """Instructions, and what each may be followed by."""

    def __init__(self, text):
        self.lines, labels, branches = [], {}, {}
        for line in text.splitlines():
            label = re.match(r"\s*(\.L_\w+):", line)
            if label:
                labels[label[1]] = len(self.lines)
            found = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)
            if found:
                target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", found[1])
                if target:
                    branches[len(self.lines)] = target[1]
                self.lines.append(found[1])
        self.targets = {at: labels[name] for at, name in branches.items()}

    def following(self, at):
        goes_on = not re.match(r"(EXIT|RET|BRA)\b(?!.*\b!?U?P\d)", self.lines[at])
        places = [at + 1] if goes_on else []
        if at in self.targets:
            places.append(self.targets[at])
        return [place for place in places if place < len(self.lines)]

    def walk(self, start, step):
        """``step(line, state)`` along every path, each (place, state) once; it returns the state after."""
        todo, seen = [(0, start)], set()
        while todo:
            at, state = todo.pop()
            if (at, state) in seen:
                continue
            seen.add((at, state))
            after = step(self.lines[at], state)
            todo += [(place, after) for place in self.following(at)]


def opcode_of(line):
    """Opcode with its suffixes, and the operands."""
    line = re.sub(r"^@!?U?P\w+\s+", "", line)
    opcode, _, rest = line.partition(" ")
    return opcode, [x.strip() for x in rest.split(",")]


def written(line):
    """The registers that an instruction writes."""
    opcode, operands = opcode_of(line)
    if NO_REGISTER.match(opcode):
        return set()
    register = next((x for x in operands if not re.fullmatch(r"!?U?P(T|\d)", x)), "")
    first = re.fullmatch(r"R(\d+)(\.\w+)*", register)
    if first is None:
        return set()
    size = re.match(r"HGMMA\.64x(\d+)x", opcode)
    if size:
        count = int(size[1]) // 2
    elif ".128" in opcode or ".M88.4" in opcode or opcode.startswith("HMMA"):
        count = 4
    elif re.search(r"\.64\b|\.WIDE\b|\.M88\.2|\.F64\.", opcode) or re.match(
        r"D(ADD|MUL|FMA)|CS2R(?!\.32)", opcode
    ):
        count = 2
    else:
        count = 1
    return {int(first[1]) + i for i in range(count)}


def operands_overwritten(text):
    """Instructions that write an operand of a product before it is waited for."""
    found = set()

    def step(line, pending):
        opcode, operands = opcode_of(line)
        if opcode.startswith("WARPGROUP.DEPBAR"):
            kept = int(operands[-1], 16)
            return frozenset((register, age) for register, age in pending if age <= kept)
        overwritten = written(line) & {register for register, _ in pending}
        if overwritten:
            found.add(line)
        pending = frozenset((r, age) for r, age in pending if r not in overwritten)
        if opcode.startswith("HGMMA"):
            left = re.fullmatch(r"R(\d+)(\.\w+)*", operands[1])
            if left:
                pending |= {(int(left[1]) + i, 0) for i in range(4)}
            if "gsb0" in operands:
                pending = frozenset((register, min(age + 1, MOST_GROUPS)) for register, age in pending)
        return pending

    Listing(text).walk(frozenset(), step)
    return sorted(found)


def unordered_stores(text):
    """Stores to shared memory between a wait for products and the next barrier."""
    found = set()

    def step(line, waited):
        opcode, _ = opcode_of(line)
        if opcode.startswith("WARPGROUP.DEPBAR"):
            return True
        if opcode.startswith("BAR."):
            return False
        if waited and re.match(r"(STS|STSM|LDGSTS)\b", opcode):
            found.add(line)
        return waited

    Listing(text).walk(False, step)
    return sorted(found)
