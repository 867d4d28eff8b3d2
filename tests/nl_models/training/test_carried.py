"""Training on streams: what a window carries on, what it does not, and that a checkpoint holds it."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from rich.console import Console

from nl_models import HopeCache
from nl_models.console import Display
from nl_models.data.batches import DocumentStreams
from nl_models.data.corpus import CorpusError
from nl_models.data.prepare import prepare_data
from nl_models.evaluation.position import loss_by_position
from nl_models.layers.state import describe_state, select_state
from nl_models.training.carried import CarriedStates
from nl_models.training.config import TrainConfig
from nl_models.training.loop import Trainer, create_run
from nl_models.training.metrics import read_metrics
from nl_models.training.model import build_model, build_optimizer, learning_rate_at

END = 99


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory):
    """From one to six windows long."""
    folder = tmp_path_factory.mktemp("short")
    for i in range(40):
        text = f"{i}: " + "the quick brown fox jumps over it. " * 3
        (folder / f"{i:02d}.txt").write_text(text[: 10 + 2 * i])
    return folder


@pytest.fixture(params=["hope", "titans", "gated_delta_net"])
def carrying(request, config, short_documents):
    """Windows of 16 are no multiple of chunks of 6, so that tokens wait for a step at their ends."""
    levels = [{"hidden_size": 8, "chunk_size": 6}]
    return dataclasses.replace(
        config, corpus=str(short_documents), model=request.param, hidden_size=16, layers=1, heads=2,
        carry_state=True, model_options={"memory_chunk_size": 5, "continuum_levels": levels},
    )  # fmt: skip


def make(folder, config):
    if not folder.exists():
        create_run(folder, config)
    data = prepare_data(config, folder / "data")
    return Trainer(folder, config, build_model(config, 257, 256), data)


def run(trainer, stop=lambda: False):
    console = Console(file=io.StringIO())
    trainer.run(Display(console, total=trainer.config.steps, start=trainer.step, label="x"), stop)


def losses(folder, kind="train"):
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == kind]


class KillAt:
    def __init__(self, step, trainer):
        self.step, self.trainer = step, trainer

    def __call__(self):
        if self.trainer.step == self.step:
            raise SystemExit("killed")
        return False


def test_streams_read_whole_documents_in_order():
    documents = [np.arange(n) for n in (3, 11, 0, 5, 7)]
    tokens = np.concatenate([np.append(d + 10 * i, END) for i, d in enumerate(documents)]).astype(np.uint16)
    streams = DocumentStreams(tokens, END, 4, batch_size=2, batches=1, seed=3)
    # ceil(4/4) + ceil(12/4) + 0 + ceil(6/4) + ceil(8/4) windows on two streams
    assert streams.windows == 4
    read = {0: [], 1: []}
    for step in range(streams.windows):
        batch = streams.batch(step)
        for stream, row, length, begins in zip((0, 1), *map(torch.Tensor.tolist, batch)):
            assert row[length:] == [END] * (4 - length)
            assert begins == (step == 0 or row[0] % 10 == 0)
            if not begins:
                assert row[0] == read[stream][-1] + 1
            read[stream] += row[:length]
    assert sorted(read[0] + read[1]) == sorted(t for t in tokens.tolist() if t != END) + [END] * 4
    again = DocumentStreams(tokens, END, 4, batch_size=2, batches=1, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(again.batch(9), streams.batch(9)))
    halves = DocumentStreams(tokens, END, 4, batch_size=1, batches=2, seed=3)
    assert torch.equal(torch.cat([halves.batch(6).tokens, halves.batch(7).tokens]), streams.batch(3).tokens)
    orders = {tuple(streams.batch(step).tokens[0].tolist()) for step in (0, 4, 8, 12)}
    assert len(orders) > 1


def test_a_single_token_at_a_documents_end_makes_no_window():
    streams = DocumentStreams(np.array([1, 2, 3, 4, END]), END, 4, batch_size=1, batches=1, seed=0)
    assert streams.windows == 1
    with pytest.raises(CorpusError, match="1 windows of up to 4 tokens, fewer than the 2 streams"):
        DocumentStreams(np.array([1, 2, 3, 4, END]), END, 4, batch_size=1, batches=2, seed=0)


def moved(state, level, starts):
    """With the level's weights as far from its parameters of now as they were from ``starts``."""
    fast = state.continuum[0]
    up, down = (
        w + (now - start) for w, now, start in zip((fast.up, fast.down), (level.up, level.down), starts)
    )
    return state._replace(continuum=(fast._replace(up=up, down=down),))


def test_states_are_carried_without_gradients_and_reset_at_documents(carrying, tmp_path):
    """The run is this loop, which reads every stream by itself and keeps its state as any user would."""
    torch.manual_seed(0)
    trainer = make(tmp_path / "run", carrying)
    model = build_model(carrying, 257, 256)
    optimizer = build_optimizer(model, carrying)
    caches: dict[tuple[int, int], HopeCache] = {}
    starts: dict[tuple[int, int], list[torch.Tensor]] = {}
    begun, found = 0, []
    for step in range(carrying.steps):
        batches = [trainer._batches.batch(2 * step + part) for part in (0, 1)]
        targets = sum(int((batch.lengths - 1).sum()) for batch in batches)
        optimizer.zero_grad()
        total = 0.0
        for part, batch in enumerate(batches):
            for row in range(2):
                if batch.begins[row]:
                    begun += step > 0
                    caches[part, row] = HopeCache(model.config)
                ids = batch.tokens[row : row + 1, : batch.lengths[row]]
                cache = caches[part, row]
                level = model.model.layers[0].continuum.levels[0]
                if not batch.begins[row]:
                    cache.layers[0].state = moved(cache.layers[0].state, level, starts[part, row])
                starts[part, row] = [w.detach().clone() for w in (level.up, level.down)]
                loss = model(ids, labels=ids, cache=cache, use_cache=True, num_items_in_batch=targets).loss
                loss.backward()
                cache.detach()
                total += loss.item()
        found.append(total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), carrying.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, carrying)
        optimizer.step()
    assert begun > 3  # rows of a batch that begin while others go on
    run(trainer)
    assert losses(tmp_path / "run") == pytest.approx(found, rel=2e-4)
    # What it is not: windows that begin anew.
    fresh = dataclasses.replace(carrying, carry_state=False)
    run(make(tmp_path / "fresh", fresh))
    assert losses(tmp_path / "fresh") != pytest.approx(found, rel=1e-2)


@pytest.mark.parametrize("carrying", ["hope"], indirect=True)
@pytest.mark.parametrize("step", [1, 7])
def test_a_killed_run_carries_on(step, carrying, tmp_path):
    run(make(tmp_path / "whole", carrying))
    trainer = make(tmp_path / "killed", carrying)
    with pytest.raises(SystemExit):
        run(trainer, KillAt(step, trainer))
    trainer = make(tmp_path / "killed", carrying)
    assert trainer.resume() == {1: 0, 7: 5}[step]
    run(trainer)
    for kind in ("train", "validation"):
        assert losses(tmp_path / "killed", kind) == losses(tmp_path / "whole", kind)


@pytest.mark.parametrize("carrying", ["hope"], indirect=True)
def test_recomputed_blocks_carry_the_same(carrying, tmp_path):
    run(make(tmp_path / "plain", carrying))
    run(make(tmp_path / "recomputed", dataclasses.replace(carrying, gradient_checkpointing=True)))
    assert losses(tmp_path / "recomputed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("carrying", ["hope"], indirect=True)
def test_a_compiled_model_carries_the_same(carrying, tmp_path, monkeypatch):
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled(module, backend="eager"))
    run(make(tmp_path / "plain", carrying))
    run(make(tmp_path / "compiled", dataclasses.replace(carrying, compile=True)))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


@pytest.mark.parametrize("carrying", ["hope"], indirect=True)
def test_a_cache_that_is_to_be_added_to_the_initial_state_goes_nowhere_else(carrying, tmp_path):
    model = build_model(carrying, 257, 256)
    cache = CarriedStates(model, [range(2)]).before(0, torch.ones(2, dtype=torch.bool))
    whole = HopeCache.initial(model, 1)
    for use in (
        lambda: cache.save(tmp_path / "x"),
        lambda: cache.reset([0], model),
        lambda: HopeCache.join([cache, whole]),
        lambda: HopeCache.join([whole, cache]),
    ):
        with pytest.raises(ValueError, match="cache: is to be added to the initial state"):
            use()
    model(torch.randint(257, (2, 16)), cache=cache, use_cache=True)
    cache.save(tmp_path / "x")


@pytest.mark.parametrize("carrying", ["hope"], indirect=True)
def test_whole_states_that_earlier_versions_kept_go_on(carrying):
    model = build_model(carrying, 257, 256)
    carried, begins = CarriedStates(model, [range(2)]), torch.ones(2, dtype=torch.bool)
    cache = carried.before(0, begins)
    ids, more = torch.randint(257, (2, 2, 16))
    model(ids, cache=cache, use_cache=True)
    carried.after(0, cache)
    states, structure, tensors = [layer.state for layer in cache.layers], None, {}
    for row in range(2):
        own = {}
        structure = describe_state(select_state(tuple(states), torch.tensor([row])), "", own)
        tensors |= {f"carried/{row}{name}": value for name, value in own.items()}
    again = CarriedStates(model, [range(2)])
    again.restore(structure, tensors)
    expected = model(more, cache=cache, use_cache=True).logits
    for goes_on in (carried, again):
        found = model(more, cache=goes_on.before(0, ~begins), use_cache=True).logits
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_what_is_carried_in_training_is_worth_more_beyond_the_window(tmp_path):
    """The first two runs of docs/training.md's table, seed 0."""
    config = TrainConfig(
        tokenizer="bytes", hidden_size=64, layers=2, heads=2, steps=200, warmup_steps=20, batch_size=32,
        sequence_length=64, learning_rate=6e-3, evaluate_every=200, device="cpu", threads=1,
        model_options={
            "initializer_range": 0.02, "continuum_levels": [{"hidden_size": 224, "chunk_size": 16}],
        },
    )  # fmt: skip
    found = {}
    for carry in (True, False):
        trainer = make(tmp_path / str(carry), dataclasses.replace(config, carry_state=carry))
        run(trainer)
        text = prepare_data(config, tmp_path / str(carry) / "data").validation[:2048]
        losses = loss_by_position(trainer.model, text, window=64, streams=8).between(512, 2048)
        found[carry] = losses.carried, losses.difference
    print(found)
    assert found[True][0] < found[False][0] + 0.02
    assert found[True][1] < 2 * found[False][1] < 0


def test_attention_has_no_state_to_carry():
    with pytest.raises(ValueError, match="carry_state: a model with attention layers"):
        build_model(TrainConfig(model="attention", carry_state=True), 257, 256)
