"""What the loop around a bank sets and keeps to, whatever the op."""

import pytest
import torch

from nl_kernels import MemoryRule
from nl_kernels.dispatch import products_for
from nl_kernels.doctor import relative_error, tensors_of
from nl_kernels.memory.bank import Layout
from nl_kernels.memory.chunk import BankRule, Tokens, Weights, learn, prepare
from nl_kernels.memory.chunk_adjoint import learn_adjoint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_callers_of_16_bits_have_tf32_products_on_cuda(dtype):
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    with products_for(dtype, "cuda"):
        assert settings.fp32_precision == "tf32"
    assert settings.fp32_precision == before
    for other in ((torch.float32, "cuda"), (dtype, "cpu")):
        with products_for(*other):
            assert settings.fp32_precision == before


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("momentum", [False, True])
def test_a_chunk_and_its_adjoint_compile_without_a_graph_break(momentum, linear):
    """Whatever compiles PyTorch can fuse a chunk's element-wise work; the loop around it stays as it is."""
    layout = Layout(2, 4, True, linear)
    bank = BankRule(MemoryRule(), "running", layout)
    shapes = [(2, 14, 4)] if linear else [(10, 3, 4), (6, 4, 3), (4, 1, 3)]
    draw = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    base, running, anchor = (tuple(random(*shape) for shape in shapes) for _ in range(3))
    velocity = tuple(random(*shape) for shape in shapes) if momentum else ()
    gates = [
        random(2, 5, 1).sigmoid(),
        -random(2, 5, 1).abs(),
        random(2, 5, 1).sigmoid() if momentum else None,
    ]
    tokens = Tokens(random(2, 5, 4), random(2, 5, 4), random(2, 5, 4), *gates, None)

    def chunk(*banks):
        prepared = prepare(bank.rule, tokens)
        weights = Weights(*banks, anchor)
        o, after, velocity_after, learned = learn(bank, tokens, prepared, weights, True)
        given = (tokens, prepared, weights, learned, torch.ones_like(o))
        d = (tuple(map(torch.ones_like, after)), tuple(map(torch.ones_like, velocity_after)))
        return o, after, learn_adjoint(bank, *given, *d).base

    torch._dynamo.reset()
    compiled = torch.compile(chunk, backend="aot_eager", fullgraph=True)
    for found, expected in zip(
        tensors_of(compiled(base, running, velocity)), tensors_of(chunk(base, running, velocity))
    ):
        assert relative_error(found, expected) < 1e-12
