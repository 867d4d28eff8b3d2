"""No product takes a transposed accumulator: Triton 3.4 to 3.7.0 computes such products wrongly on Hopper.

What is looked at is Triton's own code before it is for any GPU, in which functions are inlined.
"""

import re
from collections import defaultdict

import pytest
import torch
import triton
import triton.language as tl

from nl_kernels.triton_support.kernel_call import KernelCall
from tests.nl_kernels.planned_calls import kind_of
from tools.ahead_of_time import intermediate_code
from tools.catalogue import collect_catalogue

pytestmark = pytest.mark.aot

OPS = ("delta_memory", "deep_memory", "self_modifying", "continuum", "newton_schulz")
NAME = r"%[\w.$]+(?:#\d+)?"
# Results of these are other numbers than their operands: not in the layout of a product.
ENDS = ("tt.reduce", "tt.scan", "tt.load", "tt.gather")


def names_in(text):
    return re.findall(NAME, text)


class Uses:
    """Of each value of a module those that it is made of, through loops and branches too.

    A name may come again in another loop or branch: values are told apart by where they are defined.
    """

    def __init__(self, module):
        self.sources, self.opcodes = defaultdict(set), {}
        self.products = []  # (line, left operand, right operand)
        self.values, self.count = {}, 0  # of each name in sight its value
        regions = []  # of what is open: (opcode, results, arguments, the names in sight outside)
        for whole in module.splitlines():
            whole = whole.strip()
            line = whole.split(" loc(")[0].strip()
            if line.startswith("}"):
                self.values = dict(regions[-1][3])
                if not whole.endswith("{"):  # "} else {"
                    regions.pop()
                continue
            head = re.match(rf'(?:({NAME})(:\d+)? = )?"?([a-z_]+\.[a-z_.]+|module)"?', line)
            if head is None:
                continue
            result, count, opcode = head.groups()
            rest = line[head.end() :]
            names = [] if result is None else [result]
            if count:
                names = [f"{result}#{i}" for i in range(int(count[1:]))]
            operands = self._uses(rest.split(" : ")[0])
            if opcode == "scf.yield":
                _, results, arguments, _ = regions[-1]
                for name, value in [*zip(results, operands), *zip(arguments, operands)]:
                    self.sources[name].add(value)
            elif opcode == "scf.for":
                pairs = re.search(r"iter_args\(([^)]*)\)", rest)
                given = names_in(pairs[1]) if pairs else []
                first = [self.values.get(name, name) for name in given[1::2]]
                results = [self._define(name) for name in names]
                outside = dict(self.values)
                arguments = [self._define(name) for name in given[::2]]
                regions.append((opcode, results, arguments, outside))
                for own, value in zip((*arguments, *results), 2 * first):
                    self.sources[own].add(value)
            elif whole.endswith(("{", "({")):
                assert opcode in ("module", "tt.func", "scf.if", *ENDS), line
                results = [self._define(name) for name in names]
                regions.append((opcode, results if opcode == "scf.if" else [], [], dict(self.values)))
            else:
                for name in names:
                    value = self._define(name)
                    self.opcodes[value] = opcode
                    self.sources[value].update(operands)
                if opcode == "tt.dot":
                    self.products.append((line, *operands[:2]))

    def _uses(self, text):
        return [self.values.get(name, name) for name in names_in(text)]

    def _define(self, name):
        self.count += 1
        self.values[name] = f"{name} {self.count}"
        return self.values[name]

    def reaches(self, start, opcodes):
        """The nearest values of these opcodes that ``start`` is made of."""
        found, todo, seen = set(), [start], set()
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            opcode = self.opcodes.get(name)
            if opcode in opcodes:
                found.add(name)
            elif opcode not in ENDS:
                todo += self.sources[name]
        return found


def transposed_accumulators(module):
    """The products of which an operand is made of what a transpose made of another product."""
    uses = Uses(module)
    found = []
    for line, *operands in uses.products:
        stops = {"tt.trans", "tt.dot"}
        turned = [
            x for operand in operands for x in uses.reaches(operand, stops) if uses.opcodes[x] == "tt.trans"
        ]
        while turned:
            name = turned.pop()
            for source in uses.sources[name]:
                for x in uses.reaches(source, stops):
                    if uses.opcodes[x] == "tt.dot":
                        found.append(line)
                    else:
                        turned.append(x)
    return found


@triton.jit
def planted_kernel(a, b, out, rounds, KIND: tl.constexpr):
    at = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)
    x, y = tl.load(a + at), tl.load(b + at)
    product = tl.dot(x, y)
    if KIND == "turned":
        product = tl.dot(tl.trans(product).to(tl.bfloat16), y)
    elif KIND == "scaled, turned, scaled":
        product = tl.dot(y, (2.0 * tl.trans(tl.exp(product))).to(tl.bfloat16))
    elif KIND == "in a loop":
        turned = y
        for _ in range(rounds):
            product = tl.dot(turned, y, product)
            turned = tl.trans(product).to(tl.bfloat16)
    elif KIND == "in a branch":
        turned = y
        if rounds > 3:
            turned = tl.trans(product).to(tl.bfloat16)
        product = tl.dot(x, turned)
    elif KIND == "as it is":
        product = tl.dot(product.to(tl.bfloat16), tl.trans(y))
    elif KIND == "sums":
        turned = tl.trans(x) * tl.sum(product, 0)[:, None].to(tl.bfloat16)
        product = tl.trans(tl.dot(turned, y))
    elif KIND == "from memory":
        tl.store(out + at, product)
        tl.debug_barrier()
        product = tl.dot(tl.trans(tl.load(out + at)).to(tl.bfloat16), y)
    tl.store(out + at, product)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("turned", 1),
        ("scaled, turned, scaled", 1),
        ("in a loop", 1),
        ("in a branch", 1),
        ("as it is", 0),
        ("sums", 0),
        ("from memory", 0),
    ],
)
def test_planted_products(kind, count):
    a, out = torch.empty(64, 64, dtype=torch.bfloat16, device="meta"), torch.empty(64, 64, device="meta")
    call = KernelCall(planted_kernel, (1,), {"a": a, "b": a, "out": out, "rounds": 9}, {"KIND": kind}, 4, 1)
    assert len(transposed_accumulators(intermediate_code(call, "sm_90"))) == count


@pytest.mark.parametrize("op", OPS)
def test_no_kernel_takes_a_transposed_accumulator(op):
    entries = {kind_of(entry.call): entry for entry in collect_catalogue("sm_90") if entry.op == op}
    assert entries
    found = defaultdict(list)
    for entry in entries.values():
        lines = transposed_accumulators(intermediate_code(entry.call, "sm_90"))
        if lines:
            found[entry.kernel].append(entry.variant)
    assert not found, dict(found)


def test_the_catalogue_has_these_ops():
    assert {entry.op for entry in collect_catalogue("sm_90")} == set(OPS)
