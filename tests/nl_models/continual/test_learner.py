"""The learner against the loop over tokens on the source model's own parameters, in fp64."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from nl_models.continual import ContinuumLearner, MemoryFileError, StepRule
from nl_models.hf_names import CACHE_NAME
from nl_models.surgery import convert_mlp_to_continuum
from tests.nl_models.continual.token_loop import cut, matrices_of_converted, read
from tests.nl_models.surgery.models import LEVELS, VOCABULARY, make_model

RULES = {
    "sgd": StepRule(rate=0.05),
    "dgd": StepRule(rule="dgd", rate=0.05),
    "dgd, anchored": StepRule(rule="dgd", rate=0.05, anchored=True),
    "momentum": StepRule(rule="momentum", rate=0.03, momentum_decay=0.7),
    "muon": StepRule(rule="muon", rate=0.03, momentum_decay=0.7),
    "sgd, norms": StepRule(rate=0.05, restore_norms=True),
    "muon, norms": StepRule(rule="muon", rate=0.03, restore_norms=True, retention=0.7),
    "sgd, retention": StepRule(rate=0.05, retention=0.6),
    "dgd, retention": StepRule(rule="dgd", rate=0.05, retention=0.6),
    "dgd, anchored, retention": StepRule(rule="dgd", rate=0.05, anchored=True, retention=0.6),
}


def stream(rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(VOCABULARY, (rows, length), generator=generator)


def assert_equals_the_loop(learner, report, model, tokens, **options):
    matrices = matrices_of_converted(model, learner.parameters.units)
    for row in range(len(tokens)):
        losses, weights = read(
            model,
            matrices,
            learner.chunk_sizes,
            learner.rules,
            tokens[row],
            new_cache=lambda: DynamicCache(config=model.config),
            **options,
        )
        # The norms of Llama and Qwen round to fp32 inside.
        atol = 1e-9 if model.config.model_type in ("gpt2", "gpt_neox") else 3e-6
        torch.testing.assert_close(report.loss[row], losses.mean(), atol=atol, rtol=0)
        for m in matrices:
            learned = m.of({m.parameter: model.get_parameter(m.parameter).detach()})
            learned = learned + learner.state.changes[m.name][row]
            torch.testing.assert_close(learned, m.of(weights), atol=atol, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_rule_is_the_loop_over_tokens(family, rule):
    model = make_model(family, torch.float64)
    learner = ContinuumLearner(convert_mlp_to_continuum(model, LEVELS), RULES[rule], batch_size=2)
    tokens = stream(2, 20)
    report = learner.learn(tokens)
    assert report.steps == [4, 2]
    assert_equals_the_loop(learner, report, model, tokens)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gpt_neox"])
def test_other_families_and_rules_for_each_level(family):
    model = make_model(family, torch.float64)
    rules = [StepRule(rate=0.05), StepRule(rule="momentum", rate=0.01)]
    learner = ContinuumLearner(convert_mlp_to_continuum(model, LEVELS), rules)
    tokens = stream(1, 18)
    assert_equals_the_loop(learner, learner.learn(tokens), model, tokens)


def test_the_context_starts_anew_and_what_was_learned_stays():
    model = make_model("llama", torch.float64)
    converted = convert_mlp_to_continuum(model, LEVELS)
    learner = ContinuumLearner(converted, RULES["sgd"], batch_size=2, context_length=6)
    tokens = stream(2, 25)
    assert_equals_the_loop(learner, learner.learn(tokens), model, tokens, context_length=6)


def test_a_level_of_period_one_is_online_gradient_descent():
    model = make_model("llama", torch.float64)
    converted = convert_mlp_to_continuum(model, [{"fraction": 1.0, "chunk_size": 1}])
    tokens = stream(1, 15)
    learner = ContinuumLearner(converted, StepRule(rate=0.05))
    report = learner.learn(tokens)

    plain = copy.deepcopy(model)
    names = [n for n, _ in plain.named_parameters() if ".mlp." in n and n.endswith("weight")]
    optimizer = torch.optim.SGD([plain.get_parameter(n) for n in names], lr=0.05)
    cache, losses = DynamicCache(config=plain.config), []
    for t in range(tokens.shape[1] - 1):
        output = plain(tokens[:, t : t + 1], **{CACHE_NAME: cache}, use_cache=True)
        loss = F.cross_entropy(output.logits[0], tokens[:, t + 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cut(cache)
        losses.append(loss.detach())
    torch.testing.assert_close(torch.stack(report.losses)[:, 0], torch.stack(losses), atol=1e-12, rtol=0)
    for name in names:
        layer, part = name.split(".")[2], name.split(".")[4].removesuffix("_proj")
        change = plain.get_parameter(name) - model.get_parameter(name)
        learned = learner.state.changes[f"layers.{layer}.levels.0.{part}"][0]
        torch.testing.assert_close(learned, change, atol=1e-12, rtol=0)


def test_sequences_side_by_side_do_not_see_each_other():
    converted = convert_mlp_to_continuum(make_model("llama", torch.float64), LEVELS)
    tokens = stream(3, 21)
    together = ContinuumLearner(converted, RULES["momentum"], batch_size=3)
    report = together.learn(tokens)
    for row in range(3):
        alone = ContinuumLearner(converted, RULES["momentum"])
        assert abs(alone.learn(tokens[row]).loss - report.loss[row]) < 1e-12
        for name, change in alone.state.changes.items():
            torch.testing.assert_close(together.state.changes[name][row], change[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("rule", ["sgd", "dgd", "muon, norms"])
def test_rates_of_each_sequence(rule):
    converted = convert_mlp_to_continuum(make_model("llama", torch.float64), LEVELS)
    tokens = stream(1, 21)
    rates = [0.0, 0.02, 0.05]
    several = dataclasses.replace(RULES[rule], rate=torch.tensor(rates, dtype=torch.float64))
    together = ContinuumLearner(converted, several, batch_size=3)
    report = together.learn(tokens.expand(3, -1))
    for row, rate in enumerate(rates):
        alone = ContinuumLearner(converted, dataclasses.replace(RULES[rule], rate=rate))
        assert abs(alone.learn(tokens).loss - report.loss[row]) < 1e-12
        for name, change in alone.state.changes.items():
            torch.testing.assert_close(together.state.changes[name][row], change[0], atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="rate: expected one, or 2, got 3"):
        ContinuumLearner(converted, several, batch_size=2)


@pytest.mark.parametrize("cut_at", [1, 2, 5, 9, 12, 21])
def test_a_cut_stream_is_the_uncut_one(cut_at):
    converted = convert_mlp_to_continuum(make_model("llama", torch.float64), LEVELS)
    tokens = stream(1, 22)
    whole, cut = (ContinuumLearner(converted, RULES["dgd"], context_length=16) for _ in range(2))
    report = whole.learn(tokens)
    parts = 0.0
    for part in (tokens[:, :cut_at], tokens[:, cut_at:]):
        piece = cut.learn(part)
        parts += sum(n * loss for n, loss in zip(piece.tokens, piece.losses))
    assert whole.tokens_per_level == cut.tokens_per_level == (20, 16)
    assert whole.tokens_read == cut.tokens_read == 22
    assert float(parts) == pytest.approx(21 * float(report.loss), abs=1e-6)
    for name, change in whole.state.changes.items():
        torch.testing.assert_close(cut.state.changes[name], change, atol=1e-12, rtol=0)


def test_without_a_rate_nothing_changes_by_a_bit():
    model = make_model("llama")
    converted = convert_mlp_to_continuum(model, LEVELS)
    learner = ContinuumLearner(converted, StepRule(rate=0.0))
    report = learner.learn(stream(1, 30))
    assert report.steps == [0, 0]
    tokens = stream(2, 12)
    with torch.no_grad():
        assert torch.equal(learner.predict(tokens), model(tokens).logits)


def test_the_models_parameters_do_not_change():
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    converted = convert_mlp_to_continuum(model, LEVELS).train()
    converted.model.layers[0].eval()
    learner = ContinuumLearner(converted, RULES["muon"])
    learner.learn(stream(1, 30))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert converted.training
    assert not converted.model.layers[0].mlp.training
    assert converted.model.layers[1].mlp.training


@pytest.mark.parametrize("rule", ["sgd", "dgd", "momentum", "muon, norms"])
def test_nested_levels_are_the_loop_in_which_faster_ones_start_over(rule):
    model = make_model("gpt2", torch.float64)
    converted = convert_mlp_to_continuum(model, LEVELS)
    learner = ContinuumLearner(converted, RULES[rule], nested=True)
    tokens = stream(1, 22)  # 21 tokens are learned: 5 steps of the fast level, 2 of the slow one
    report = learner.learn(tokens)
    assert_equals_the_loop(learner, report, model, tokens, nested=True)
    assert learner.fork().parameters.nested
    # A slow level of rate 0 stays, and what is below it starts over all the same.
    resting = ContinuumLearner(converted, [RULES[rule], StepRule(rate=0.0)], nested=True)
    assert resting.learn(tokens[:, :17]).steps == [4, 0]
    assert not any(change.any() for change in resting.state.changes.values())
    apart = ContinuumLearner(converted, RULES[rule])
    assert apart.learn(tokens).loss != report.loss
    with pytest.raises(MemoryFileError, match="nested = True, this learner has False"):
        apart.load_state_dict(learner.state_dict())
    with pytest.raises(TypeError, match="nested: expected a bool or None, got 1"):
        ContinuumLearner(converted, RULES[rule], nested=1)


class CountReads(TorchDispatchMode):
    """Counts how often a number is read from a tensor, for which an accelerator is waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", ["sgd", "dgd", "muon, norms"])
def test_reading_a_stream_waits_for_no_step(rule):
    converted = convert_mlp_to_continuum(make_model("llama"), LEVELS)
    reads = []
    for length in (9, 41):
        learner = ContinuumLearner(converted, RULES[rule])
        learner.parameters.level_norms  # noqa: B018  read once, and kept
        with CountReads() as counter:
            report = learner.learn(stream(1, length))
        reads.append(counter.count)
    assert reads[0] == reads[1] <= 2  # whether the tokens are in the vocabulary, and nothing of a step
    assert report.steps == [10, 5]
    assert [len(sizes) for sizes in report.update_sizes] == report.steps
    assert all(size > 0 for sizes in report.update_sizes for size in sizes)


def test_bf16_models_learn_in_fp32():
    converted = convert_mlp_to_continuum(make_model("llama", torch.bfloat16), LEVELS)
    learner = ContinuumLearner(converted, StepRule(rate=1e-4))
    report = learner.learn(stream(1, 30))
    assert report.loss.dtype == torch.float32
    changes = learner.state.changes.values()
    assert all(change.dtype == torch.float32 and change.abs().sum() > 0 for change in changes)


def test_it_learns_what_repeats():
    converted = convert_mlp_to_continuum(make_model("llama"), LEVELS)
    learner = ContinuumLearner(converted, StepRule(rate=0.03))
    pattern = torch.arange(5).repeat(60)
    before = learner.loss(pattern[:30])
    report = learner.learn(pattern)
    assert learner.loss(pattern[:30]) < 0.5 * before
    assert torch.stack(report.losses)[-10:].mean() < 0.6 * torch.stack(report.losses)[:3].mean()
    generated = learner.generate(pattern[:10], max_new_tokens=6, do_sample=False)
    assert generated[0].tolist() == pattern[:16].tolist()


def test_documents_start_new_contexts():
    model = make_model("gpt2", torch.float64)
    converted = convert_mlp_to_continuum(model, LEVELS)
    tokens = stream(1, 28)
    learner = ContinuumLearner(converted, RULES["dgd"])
    # Chunks run on across documents: here they end in the middle of two of them.
    report = learner.learn([tokens[:, :7], tokens[:, 7:9], tokens[:, 9:]])
    assert learner.state.documents == 3
    assert sum(report.tokens) == 25  # the first token of each is not predicted
    assert learner.tokens_per_level == (24, 24)
    assert_equals_the_loop(learner, report, model, tokens, starts=(7, 9))


def test_adapters_learn_on():
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    converted = convert_mlp_to_continuum(make_model("llama", torch.float64), LEVELS)
    adapted = peft.get_peft_model(converted, peft.LoraConfig(r=2, target_modules=["up_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    learner = ContinuumLearner(adapted, RULES["dgd"])
    tokens = stream(1, 20)
    learner.learn(tokens)
    merged = ContinuumLearner(adapted.merge_and_unload(), RULES["dgd"])
    merged.learn(tokens)
    for name, change in merged.state.changes.items():
        torch.testing.assert_close(learner.state.changes[name], change, atol=1e-10, rtol=0)


def test_bad_arguments_are_refused(tmp_path):
    model = make_model("llama")
    converted = convert_mlp_to_continuum(model, LEVELS)
    with pytest.raises(TypeError, match="model: expected a converted model"):
        ContinuumLearner(model, StepRule(rate=0.1))
    with pytest.raises(ValueError, match="rules: expected one, or one for each of 2 levels, got 3"):
        ContinuumLearner(converted, [StepRule()] * 3)
    with pytest.raises(ValueError, match="rule: expected one of"):
        StepRule(rule="adam")
    with pytest.raises(ValueError, match="rate: expected a finite number"):
        StepRule(rate=-0.1)
    with pytest.raises(ValueError, match="momentum_decay"):
        StepRule(momentum_decay=1.0)
    for options in ({"rule": "sgd"}, {"rule": "dgd", "restore_norms": True}):
        with pytest.raises(ValueError, match="anchored: of rule 'dgd' only, without restore_norms"):
            StepRule(anchored=True, **options)
    with pytest.raises(ValueError, match="rate: expected one number or one for each sequence"):
        StepRule(rate=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="batch_size: expected an integer"):
        ContinuumLearner(converted, StepRule(), batch_size=0)
    learner = ContinuumLearner(converted, StepRule(), batch_size=2)
    for bad, error in (
        ("text", TypeError),
        (torch.zeros(2, 5), TypeError),
        (3, TypeError),
        (stream(1, 5), ValueError),
        (torch.full((2, 5), VOCABULARY), ValueError),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError),
    ):
        with pytest.raises(error, match="stream: "):
            learner.learn(bad)
    with pytest.raises(ValueError, match="skip: the stream ends 3 tokens before"):
        learner.learn(stream(2, 5), skip=8)
    with pytest.raises(ValueError, match="save_every"):
        learner.learn(stream(2, 5), save_every=3)
    with pytest.raises(ValueError, match="text: expected at least two tokens"):
        learner.loss(stream(2, 1))
    with pytest.raises(FileNotFoundError, match="save_to: "):
        learner.learn(stream(2, 5), save_to=tmp_path / "missing" / "memory.safetensors")
    assert learner.tokens_read == 0
