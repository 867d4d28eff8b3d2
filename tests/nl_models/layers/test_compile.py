"""torch.compile with its default backend: every layer, Hope and a converted Llama, forward and backward."""

import shutil

import pytest
import torch

from nl_models import HopeConfig, HopeForCausalLM
from nl_models.layers import Attention, GatedDeltaNet, SelfModifyingTitans, ShortConvolution, Titans
from nl_models.layers.continuum import ContinuumMemory, LevelConfig

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler"
)
WIDTH = 8


def continuum(variant, chunk_size):
    return ContinuumMemory(WIDTH, [LevelConfig(hidden_size=6, chunk_size=chunk_size)], variant=variant)


WHOLE = {
    "attention": lambda: Attention(WIDTH, 2),
    "convolution": lambda: ShortConvolution(WIDTH),
    "gated delta net": lambda: GatedDeltaNet(WIDTH, 2),
    "continuum without a step": lambda: continuum("nested", 16),
}
BROKEN = {
    "continuum": lambda: continuum("sequential", 4),
    "continuum, independent": lambda: continuum("independent", 4),
    "titans": lambda: Titans(WIDTH, 2, chunk_size=4),
    "titans, two layers, momentum": lambda: Titans(
        WIDTH, 2, memory_hidden_size=4, chunk_size=4, momentum=True
    ),
    "self-modifying": lambda: SelfModifyingTitans(WIDTH, 2),
    "self-modifying, two layers": lambda: SelfModifyingTitans(WIDTH, 2, memory_hidden_size=4, chunk_size=4),
}


def compare(module, run, **options):
    """Results and gradients of ``run(module)``, compiled and not."""
    found = []
    for call in (module, torch.compile(module, **options)):
        module.zero_grad()
        y = run(call)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def compare_layer(make, **options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(2, 9, WIDTH)
    compare(make(), lambda layer: layer(x)[0], **options)


def test_the_default_layer():
    """It stopped at an ``out=`` on a view, and inside inductor."""
    compare_layer(BROKEN["self-modifying"])


@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE.keys())
def test_layers_are_traced_whole(make):
    compare_layer(make, fullgraph=True, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE.keys())
def test_layers_in_one_graph(make):
    compare_layer(make, fullgraph=True)


@pytest.mark.slow
@pytest.mark.parametrize("make", BROKEN.values(), ids=BROKEN.keys())
def test_layers_around_their_loops(make):
    compare_layer(make)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hope", "converted"])
def test_models(kind):
    torch._dynamo.reset()
    torch.manual_seed(0)
    ids = torch.randint(1, 31, (2, 9))
    if kind == "hope":
        sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
        compare(HopeForCausalLM(HopeConfig(vocab_size=31, **sizes)).train(), lambda m: m(ids).logits)
        return
    transformers = pytest.importorskip("transformers")
    from nl_models.surgery import convert_mlp_to_continuum

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=31, **sizes))
    model = convert_mlp_to_continuum(llama, [{"fraction": 0.5, "chunk_size": 4}])
    for weights in (None, model.initial_fast_weights(2)):
        compare(model, lambda m, w=weights: m(ids, fast_weights=w, use_cache=False).logits)
