"""Hope learns by its next-token loss as the loop over tokens does, beside what its memories keep."""

import pytest
import torch
import torch.nn.functional as F

from nl_models import HopeCache, HopeConfig, HopeForCausalLM
from nl_models.continual import ContinuumLearner, StepRule
from tests.nl_models.continual.token_loop import Matrix, read

VOCABULARY = 43
LEVELS = [
    {"hidden_size": 12, "chunk_size": 4, "max_rate": 0.0, "gated": True},
    {"hidden_size": 10, "chunk_size": 8, "max_rate": 0.0},
    {"hidden_size": 8},
]
RULES = {
    "sgd": StepRule(rate=0.2),
    "dgd": StepRule(rule="dgd", rate=0.05),
    "muon": StepRule(rule="muon", rate=0.1, restore_norms=True),
}


def make_model(
    levels=LEVELS, layer_types=("self_modifying_titans", "full_attention"), variant="sequential"
) -> HopeForCausalLM:
    torch.manual_seed(2)
    config = HopeConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        layer_types=list(layer_types),
        memory_chunk_size=4,
        continuum_levels=levels,
        continuum_variant=variant,
    )
    return HopeForCausalLM(config).double().eval()


def stream(rows: int, length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(8))


def matrices(model: HopeForCausalLM) -> list[Matrix]:
    every = slice(None)
    return [
        Matrix(
            name=f"layers.{layer}.levels.{level}.{part}",
            level=level,
            parameter=f"model.layers.{layer}.continuum.levels.{level}.{part}",
            rows=every,
            columns=every,
            transposed=False,
            module=f"model.layers.{layer}.continuum",
        )
        for layer in range(2)
        for level in range(2)
        for part in ("up", "down", *(("gate",) if level == 0 else ()))
    ]


@pytest.mark.parametrize("rule", ["sgd", "muon"])
def test_it_is_the_loop_over_tokens(rule):
    model = make_model()
    learner = ContinuumLearner(model, RULES[rule], batch_size=2)
    tokens = stream(2, 20)
    report = learner.learn(tokens)
    for row in range(2):
        losses, weights = read(
            model,
            matrices(model),
            learner.chunk_sizes,
            learner.rules,
            tokens[row],
            new_cache=lambda: HopeCache(model.config),
        )
        torch.testing.assert_close(report.loss[row], losses.mean(), atol=1e-9, rtol=0)
        for m in matrices(model):
            learned = model.get_parameter(m.parameter).detach() + learner.state.changes[m.name][row]
            torch.testing.assert_close(learned, weights[m.parameter], atol=1e-8, rtol=0)


@pytest.mark.parametrize("variant", ["sequential", "independent"])
def test_dgd_erases_what_the_levels_read(variant):
    """One step of every level against the definition, with the inputs that the blocks' own formula gives."""
    levels = [LEVELS[0], {**LEVELS[1], "chunk_size": 4}, LEVELS[2]]
    model = make_model(levels, layer_types=("full_attention", "full_attention"), variant=variant)
    rate = 0.05
    plain, erasing = (ContinuumLearner(model, StepRule(rule=rule, rate=rate)) for rule in ("sgd", "dgd"))
    tokens = stream(1, 9)
    seen = []
    for block in model.model.layers:
        block.continuum.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0][0]))
    model(tokens[:, :4])
    plain.learn(tokens[:, :5])
    erasing.learn(tokens[:, :5])
    for layer, x in enumerate(seen[:2]):
        first, second, _ = model.model.layers[layer].continuum.levels
        inner = F.rms_norm(x, x.shape[-1:], first.norm, model.config.rms_norm_eps)
        hidden = F.silu(inner @ first.gate.T) * (inner @ first.up.T)
        x = x if variant == "independent" else x + hidden @ first.down.T
        below = F.rms_norm(x, x.shape[-1:], second.norm, model.config.rms_norm_eps)
        for place, level, part, inputs in (
            (0, first, "up", inner),
            (0, first, "gate", inner),
            (0, first, "down", hidden),
            (1, second, "up", below),
            (1, second, "down", F.gelu(below @ second.up.T)),
        ):
            name, weight = f"layers.{layer}.levels.{place}.{part}", getattr(level, part)
            eye = torch.eye(inputs.shape[1], dtype=torch.float64)
            expected = weight + plain.state.changes[name][0]
            expected = expected @ torch.linalg.inv(eye + rate * inputs.T @ inputs)
            found = weight + erasing.state.changes[name][0]
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("cut_at", [1, 3, 7, 12])
def test_a_cut_and_saved_stream_is_the_uncut_one(cut_at, tmp_path):
    tokens = stream(2, 19)
    whole, cut, loaded = (ContinuumLearner(make_model(), RULES["dgd"], batch_size=2) for _ in range(3))
    whole.learn(tokens)
    cut.learn(tokens[:, :cut_at])
    cut.save(tmp_path / "memory.safetensors")
    loaded.load(tmp_path / "memory.safetensors").learn(tokens[:, cut_at:])
    assert loaded.tokens_read == whole.tokens_read
    for name, change in whole.state.changes.items():
        torch.testing.assert_close(loaded.state.changes[name], change, atol=1e-10, rtol=0)


def test_before_the_first_step_it_is_the_model():
    model = make_model().float()
    learner = ContinuumLearner(model, StepRule(rate=0.1), batch_size=2)
    tokens = stream(2, 12)
    with torch.no_grad():
        expected = model(tokens).logits
        # Products with weights of each sequence may round otherwise; those of one sequence do not.
        torch.testing.assert_close(learner.predict(tokens), expected, atol=1e-6, rtol=0)
        assert torch.equal(ContinuumLearner(model, StepRule()).predict(tokens), expected)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(learner.generate(tokens, **options), model.generate(tokens, **options))


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
@pytest.mark.parametrize("rule", ["dgd", "muon"])
def test_sequences_side_by_side_are_each_as_alone(rule, variant):
    model = make_model(variant=variant)
    tokens = stream(3, 21)
    together = ContinuumLearner(model, RULES[rule], batch_size=3, context_length=7)
    report = together.learn(tokens)
    held_out = stream(6, 11)  # two rows for each sequence
    predicted, losses = together.predict(held_out), together.loss(held_out)
    for row in range(3):
        alone = ContinuumLearner(model, RULES[rule], context_length=7)
        torch.testing.assert_close(alone.learn(tokens[row]).loss[0], report.loss[row], atol=1e-10, rtol=0)
        for name, change in alone.state.changes.items():
            torch.testing.assert_close(together.state.changes[name][row], change[0], atol=1e-10, rtol=0)
        own = slice(2 * row, 2 * row + 2)
        torch.testing.assert_close(predicted[own], alone.predict(held_out[own]), atol=1e-10, rtol=0)
        torch.testing.assert_close(losses[own], alone.loss(held_out[own]), atol=1e-10, rtol=0)


def test_it_learns_what_repeats_and_generates_it():
    model = make_model().float()
    learner = ContinuumLearner(model, StepRule(rate=0.2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pattern = torch.arange(5).repeat(60)
    first = learner.loss(pattern[:30])
    learner.learn(pattern)
    assert learner.loss(pattern[:30]) < 0.5 * first
    generated = learner.generate(pattern[:10], max_new_tokens=6, do_sample=False)
    greedy = learner.predict(generated)[0].argmax(-1)
    assert generated[0, 10:].tolist() == greedy[9:15].tolist()
    assert not torch.equal(generated, model.generate(pattern[None, :10], max_new_tokens=6, do_sample=False))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_step_of_a_nested_level_takes_the_faster_ones_back():
    nested, apart = (
        ContinuumLearner(make_model(variant=variant), RULES["muon"]) for variant in ("nested", "sequential")
    )
    for learner in (nested, apart):
        learner.learn(stream(1, 9))  # the slow level's first step
    for name, change in nested.state.changes.items():
        slow = ".levels.1." in name
        torch.testing.assert_close(change, apart.state.changes[name] if slow else torch.zeros_like(change))
        assert (name in nested.state.momenta) == slow
    nested.learn(stream(1, 4))
    assert all(change.abs().sum() > 0 for change in nested.state.changes.values())


def test_levels_that_step_by_themselves_are_left_alone():
    own = [{"hidden_size": 12, "chunk_size": 4}, {"hidden_size": 10, "chunk_size": 8, "max_rate": 0.0}]
    learner = ContinuumLearner(make_model(own), StepRule(rate=0.1))
    assert learner.chunk_sizes == (8,)
    assert {p.name.split(".")[-1] for p in learner.parameters.parameters} == {"up", "down"}
    learner.learn(stream(1, 30))
    assert all(change.abs().sum() > 0 for change in learner.state.changes.values())
    with pytest.raises(ValueError, match="steps by itself stands among the learner's"):
        ContinuumLearner(make_model(own), StepRule(rule="dgd", rate=0.1)).learn(stream(1, 30))
    with pytest.raises(TypeError, match="only converted models take them"):
        learner.fast_weights()


OWN = [
    {"hidden_size": 12, "chunk_size": 4, "gated": True},
    {"hidden_size": 10, "chunk_size": 8},
    {"hidden_size": 8},
]


def test_of_a_default_hope_the_weights_that_levels_start_from_learn():
    """A loop that changes a copy of the model, with what levels learned in the text on top of the change."""
    model, tokens, chunk, rate = make_model(OWN), stream(1, 25), 8, 0.05
    learner = ContinuumLearner(model, StepRule(rate=rate), chunk_size=chunk)
    report = learner.learn(tokens)
    assert report.steps == [3]
    copy, cache, losses = make_model(OWN), HopeCache(model.config), []
    learning = {n: p for n, p in copy.named_parameters() if n.split(".")[-1] in ("up", "down", "gate")}
    for start in range(0, 24, chunk):
        piece = tokens[:, start : start + chunk + 1]
        before = {name: p.detach().clone() for name, p in learning.items()}
        for layer in cache.layers:  # every level: its own weights, and what it has learned, a constant
            if layer.state is not None:
                layer.state = layer.state._replace(continuum=_on_top(copy, cache, layer, before))
        logits = copy(input_ids=piece[:, :-1], cache=cache).logits
        loss = F.cross_entropy(logits[0], piece[0, 1:], reduction="sum")
        losses.append(loss.detach())
        gradients = torch.autograd.grad(loss, list(learning.values()))
        cache.detach()
        with torch.no_grad():
            for p, gradient in zip(learning.values(), gradients, strict=True):
                p -= rate * gradient
        cache.started_from = before
    torch.testing.assert_close(report.loss[0], sum(losses) / 24, atol=1e-9, rtol=0)
    assert len(learner.state.changes) == len(learning)
    for name, p in learning.items():
        _, _, layer, _, _, level, part = name.split(".")
        change = learner.state.changes[f"layers.{layer}.levels.{level}.{part}"][0]
        torch.testing.assert_close(change, (p - model.get_parameter(name)).detach(), atol=1e-9, rtol=0)


def _on_top(copy, cache, layer, now):
    index = next(i for i, other in enumerate(cache.layers) if other is layer)
    entries = []
    for place, entry in enumerate(layer.state.continuum):
        if entry is not None:
            path = f"model.layers.{index}.continuum.levels.{place}."
            moved = {}
            for part in ("up", "down", "gate"):
                if getattr(entry, part) is not None:
                    learned = getattr(entry, part) - cache.started_from[path + part]
                    moved[part] = copy.get_parameter(path + part) + learned
            entry = entry._replace(**moved)
        entries.append(entry)
    return tuple(entries)


def test_rows_of_a_default_hope_learn_apart_and_are_saved(tmp_path):
    model, tokens = make_model(OWN, layer_types=("self_modifying_titans",) * 2), stream(2, 45)
    learner = ContinuumLearner(model, RULES["muon"], batch_size=2, chunk_size=8)
    loss = learner.learn(tokens[:, :30]).loss
    for row in range(2):
        alone = ContinuumLearner(model, RULES["muon"], chunk_size=8)
        torch.testing.assert_close(alone.learn(tokens[row, :30]).loss[0], loss[row], atol=1e-9, rtol=0)
        torch.testing.assert_close(alone.loss(tokens[row]), learner.loss(tokens)[row : row + 1])
    learner.save(tmp_path / "memory")
    again = ContinuumLearner(model, RULES["muon"], batch_size=2, chunk_size=8).load(tmp_path / "memory")
    assert torch.equal(learner.learn(tokens[:, 30:]).loss, again.learn(tokens[:, 30:]).loss)
    assert torch.equal(learner.fork([1]).loss(tokens[1:]), again.loss(tokens)[1:])
    assert learner.generate(tokens[:, :5], max_new_tokens=3).shape == (2, 8)


def test_a_chunk_size_is_of_models_that_have_none():
    with pytest.raises(ValueError, match="have chunk sizes of their own"):
        ContinuumLearner(make_model(), StepRule(rate=0.1), chunk_size=8)
    with pytest.raises(ValueError, match="chunk_size: expected an integer of at least 1, got 0"):
        ContinuumLearner(make_model(OWN), StepRule(rate=0.1), chunk_size=0)
