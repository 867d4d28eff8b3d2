"""What can be measured: layers, presets and saved models, their operations, and where lines cross."""

import json
import math

import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from nl_kernels import delta_memory, newton_schulz
from nl_models import HopeConfig
from nl_models.data.tokenizer import ByteTokenizer
from nl_models.layers import ContinuumMemory, LevelConfig, SelfModifyingTitans, Titans
from nl_models.plots import model_looks
from nl_models.profile import main
from nl_models.profiling.choose import Sizes, choose_sources
from nl_models.profiling.flops import copy_ceiling, count_flops, count_moves, matmul_ceiling
from nl_models.profiling.measure import Measurement, Work, measure
from nl_models.profiling.report import find_crossings
from nl_models.profiling.run import ProfileSettings, profile_models
from nl_models.profiling.subjects import LAYERS, ConfiguredModel, LayerAlone, SavedModel, count_parameters
from nl_models.surgery import convert_mlp_to_continuum
from tools.op_inputs import delta_memory_inputs

CPU = torch.device("cpu")


def call(*arguments, code=0):
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [str(x) for x in (*arguments, "--device", "cpu")])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "my-llama"
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    levels = [{"fraction": 0.25, "chunk_size": 8}, {"fraction": 0.75, "chunk_size": 32}]
    convert_mlp_to_continuum(LlamaForCausalLM(config), levels).save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder


def test_operations_of_a_layer_are_those_of_its_products():
    """Of an MLP by hand; a pass back takes twice those of the pass forward."""
    batch, tokens, width = 2, 24, 16
    subject = LayerAlone("mlp", hidden_size=width, heads=2).build(CPU, torch.float32)
    x = subject.inputs(batch, tokens).requires_grad_()
    forward = 2 * 2 * batch * tokens * width * (4 * width)
    assert count_flops(lambda: subject.continued(x, None)) == forward
    assert count_flops(lambda: subject.loss(x).backward()) == 3 * forward


def test_operations_of_attention_and_of_sums_in_place_are_counted():
    """Both are operators that PyTorch's counter passes over. The causal half counts as a whole square."""
    width, tokens = 32, 96
    subject = LayerAlone("attention", hidden_size=width, heads=2).build(CPU, torch.float32)
    linear = sum(m.weight.numel() for m in subject.module.modules() if isinstance(m, torch.nn.Linear))
    x = subject.inputs(1, tokens)
    forward = count_flops(lambda: subject.continued(x, None))
    assert forward == 2 * tokens * linear + 2 * 2 * tokens**2 * width
    # Two products for each of the linear maps (but for the input of the first), five for attention's two.
    assert (
        count_flops(lambda: subject.loss(x).backward()) > 2.9 * 2 * tokens * width**2 + 7 * tokens**2 * width
    )
    a, b, c = (torch.ones(3, 4, 4) for _ in range(3))
    assert count_flops(lambda: a.baddbmm_(b, c)) == 3 * 2 * 4**3


def test_operations_inside_our_operators_are_seen():
    """A matrix of Gated DeltaNet is read and written by products that grow with the tokens."""
    subject = LayerAlone("gated_delta_net", hidden_size=32, heads=2).build(CPU, torch.float32)
    projections = sum(m.weight.numel() for m in subject.module.modules() if isinstance(m, torch.nn.Linear))
    short, long = (subject.inputs(1, tokens) for tokens in (128, 256))
    counted = [count_flops(lambda x=x: subject.continued(x, None)) for x in (short, long)]
    assert counted[1] - counted[0] > 1.2 * 2 * 128 * projections


@pytest.mark.interpreter
def test_operations_of_kernels_are_those_of_plain_pytorch():
    """Forward and backward, of each op that has kernels; no kernel runs for the count."""

    def delta(impl):
        inputs = delta_memory_inputs(1, 32, 1, 16)
        inputs["q"].requires_grad_()
        delta_memory(**inputs, impl=impl)[0].sum().backward()

    def titans(impl):
        layer = Titans(32, 2, chunk_size=16, impl=impl)
        layer(torch.randn(1, 32, 32, requires_grad=True))[0].sum().backward()

    def self_modifying(impl):
        layer = SelfModifyingTitans(32, 2, chunk_size=16, impl=impl)
        layer(torch.randn(1, 32, 32, requires_grad=True))[0].sum().backward()

    def continuum(impl):
        levels = [LevelConfig(hidden_size=32, chunk_size=16)]
        with torch.no_grad():
            ContinuumMemory(32, levels, impl=impl)(torch.randn(1, 40, 32))

    def orthogonal(impl):
        newton_schulz(torch.randn(2, 32, 48), impl=impl)

    for action in (delta, titans, self_modifying, continuum, orthogonal):
        counted = [count_flops(lambda action=action, impl=impl: action(impl)) for impl in ("triton", "eager")]
        assert counted[0] == counted[1] > 10_000, action


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mode", ["prefill", "training", "decode"])
def test_every_layer_in_every_mode(layer, mode):
    source = LayerAlone(layer, hidden_size=16, heads=2)
    result = measure(Work(layer, source, mode, 80, batch=3, segment=32, decode_tokens=2, enough_seconds=0.0))
    assert result.status == "ok"
    assert result.batch == 3
    tokens = 3 * (1 if mode == "decode" else 80)
    assert result.tokens_per_second == pytest.approx(tokens / result.seconds)
    if layer == "attention" and mode != "training":  # keys and values, and each sequence's position
        assert result.state_bytes == 3 * (80 * 2 * 16 * 4 + 8)


def test_a_converted_model_in_every_mode(converted):
    results = profile_models(
        {"llama": SavedModel(str(converted))},
        ProfileSettings(
            modes=("prefill", "training", "decode", "learning"), lengths=(64,), decode_after=(64,),
            batches=(1, 2), segment=32, decode_tokens=2, enough_seconds=0.0,
        ),
    )  # fmt: skip
    assert [(m.mode, m.batch, m.status) for m in results] == [
        (mode, batch, "ok") for mode in ("prefill", "training", "decode", "learning") for batch in (1, 2)
    ]
    sizes = {(m.mode, m.batch): m.state_bytes for m in results}
    # The keys and values of one layer; learning pays for a backward pass over what is read.
    assert sizes["prefill", 2] == sizes["decode", 2] == 2 * sizes["decode", 1] == 2 * 64 * 2 * 16 * 4
    flops = {(m.mode, m.batch): m.flops for m in results}
    assert flops["learning", 1] > 1.5 * flops["prefill", 1]


def test_what_cannot_learn_is_said(converted):
    with pytest.raises(ValueError, match=r"^modes: learning"):
        profile_models({"titans": LayerAlone("titans", 16, 2)}, ProfileSettings(modes=("learning",)))


def test_the_command_on_a_layer_and_on_a_folder(converted, tmp_path):
    few = ("--modes", "prefill", "--lengths", "16..32", "--batch", "1,2")
    one = ("--modes", "prefill", "--lengths", "16")
    small = ("--hidden-size", 16, "--heads", 2)
    trace = tmp_path / "traces" / "trace.json"
    said = call("--layer", "titans", *small, *few, "--output", tmp_path / "a", "--trace", trace)
    assert "titans is faster than attention" in said or "attention is faster than titans" in said
    assert any(
        "addmm" in event["name"] or "mm" in event["name"]
        for event in json.loads(trace.read_text())["traceEvents"]
    )
    content = json.loads((tmp_path / "a" / "profile.json").read_text())
    assert [(m["model"], m["batch"], m["context"]) for m in content["measurements"]] == [
        (name, batch, context)
        for batch in (1, 2)
        for context in (16, 32)
        for name in ("titans", "attention")
    ]  # fmt: skip
    assert content["settings"]["baseline"] == "attention"
    said = call("--model", converted, *one, "--output", tmp_path / "b")
    assert "my-llama: " in said
    assert "faster" not in said  # beside nothing
    said = call("--model", converted, "--baseline", converted, *one, "--output", tmp_path / "c")
    assert "my-llama (baseline)" in said
    for asked, message in (
        (("--layer", "titans", "--config", "tiny"), "give one of them"),
        (("--layer", "lstm"), "expected one of"),
        (("--config", "huge"), "expected one of"),
        (("--model", tmp_path / "nowhere"), "no folder"),
        (("--model", converted, "--baseline", "attention"), "give a folder"),
        (("--models", "hope", "--baseline", "attention"), "names all that is measured"),
        (("--config", "tiny", "--baseline", "lstm"), "baseline: expected"),
        (("--layer", "titans", "--modes", "learning"), "a layer alone"),
        (("--lengths", "512..many"), "lengths: expected"),
        (("--layer", "titans", *small, *few, "--time-limit", 1e-3), "nothing could be measured"),
    ):
        assert message in " ".join(call(*asked, "--output", tmp_path / "d", code=2).split())


def test_a_preset_stands_beside_attention_of_its_size():
    sources, baseline = choose_sources(config="tiny")
    assert (list(sources), baseline) == (["hope", "hope-attention"], "hope-attention")
    ours, theirs = (count_parameters(source) for source in sources.values())
    assert abs(ours - theirs) < 0.01 * ours
    sources, baseline = choose_sources(config="tiny", baseline="titans")
    assert sources["titans"].config["layer_types"] == "titans"
    assert choose_sources(config="tiny", baseline="none") == ({"hope": sources["hope"]}, None)
    sources, baseline = choose_sources(models="titans,transformer", sizes=Sizes(layers=1, vocab_size=64))
    assert baseline == "transformer"
    config = HopeConfig(**sources["transformer"].config)
    assert not config.use_short_convolution
    assert isinstance(sources["titans"], ConfiguredModel)


def test_where_lines_cross():
    def points(model, speeds, mode="prefill"):
        return [
            Measurement(model, mode, context, "ok", 1.0, speed)
            for context, speed in zip((100, 200, 400), speeds)
        ]

    flat, falling = points("hope", (10, 10, 10)), points("base", (40, 20, 5))
    (crossing,) = find_crossings([*flat, *falling], "base")
    # Between 200, where it is half as fast, and 400, where it is twice as fast.
    assert crossing.context == pytest.approx(math.sqrt(200 * 400))
    assert crossing.describe("base") == "Prefill: hope is faster than base from 283 tokens on"
    (never,) = find_crossings([*flat, *points("base", (99, 99, 99))], "base")
    assert never.describe("base") == "Prefill: base is faster than hope up to 400 tokens"
    (always,) = find_crossings([*flat, *points("base", (1, 1, 1))], "base")
    assert always.describe("base") == "Prefill: hope is faster than base at every context"
    assert find_crossings([*flat, *points("base", (1, 1, 1), "decode")], "base") == []


def test_a_model_looks_the_same_in_every_picture():
    demo = model_looks(["hope-attention", "transformer", "hope"])
    profile = model_looks(["hope", "hope-attention"])
    study = model_looks(
        ["hope", "hope_two_layer", "hope_attention", "titans", "gated_delta_net", "transformer"]
    )
    assert profile == {name: demo[name] for name in profile}
    assert study["hope_attention"] == demo["hope-attention"]
    assert study["transformer"] == demo["transformer"]
    assert len({look["color"] for look in study.values()}) == len(study)
    others = model_looks(["hope", "mine", "theirs"])
    assert len({look["color"] for look in others.values()}) == 3
    assert not {others["mine"]["color"], others["theirs"]["color"]} & {x["color"] for x in study.values()}


def test_the_ceiling_is_that_of_this_machine():
    assert 1e8 < matmul_ceiling("cpu", "fp32", 1) < 1e15
    assert 1e8 < copy_ceiling("cpu", 1) < 1e13


def test_bytes_moved_are_what_operators_read_and_write():
    a, b, table = torch.randn(8, 16), torch.randn(16, 4), torch.randn(1000, 16)

    def moved(action):
        return count_moves(action, torch.device("cpu"))

    assert moved(lambda: a @ b) == (4 * (8 * 16 + 16 * 4 + 8 * 4), 1)
    assert moved(lambda: a.t().reshape(-1)[2:]) == (2 * 4 * 8 * 16, 1)  # the copy alone
    assert moved(lambda: a.t()[0].view(8)) == (0, 0)
    assert moved(lambda: a.add_(a)) == (3 * 4 * 8 * 16, 1)
    assert moved(lambda: torch.empty(100)) == (0, 0)
    assert moved(lambda: a[:1].expand(8, 16) + a) == (3 * 4 * 8 * 16, 1)  # bounded by what there is
    picked = moved(lambda: torch.nn.functional.embedding(torch.tensor([3]), table))
    assert picked.bytes < 8 * 4 * 16  # not the table


def test_bytes_and_calls_are_those_inside_of_this_packages_operators():
    """The chunks of a memory are products of PyTorch: more of them move more."""
    subject = LayerAlone("titans", hidden_size=16, heads=2).build(torch.device("cpu"), torch.float32)
    short, long = (
        count_moves(lambda n=n: subject.loss(subject.inputs(1, n)), torch.device("cpu")) for n in (64, 256)
    )
    assert long.bytes > 3 * short.bytes
    assert long.calls > short.calls
