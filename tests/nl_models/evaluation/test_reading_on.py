"""The standard of every default: a model that reads on beyond its training window stays as good as it was."""

import inspect
import pathlib

import pytest
import torch

from nl_models import HopeConfig, HopeForCausalLM
from nl_models.evaluation.position import loss_by_position

WINDOW = 128
MARGIN = 0.02  # nats a token

LEARNING = {"hidden_size": 128, "chunk_size": 16}
MODELS = {
    "default": {},
    "one level": {"continuum_levels": [LEARNING]},
    "nested": {
        "continuum_levels": [{**LEARNING, "hidden_size": 64}, {"hidden_size": 64, "chunk_size": 64}],
        "continuum_variant": "nested",
    },
    "rates up to two": {"memory_rate_max": 2.0},
    "titans": {"layer_types": "titans", "continuum_levels": [LEARNING]},
    "gated_delta_net": {"layer_types": "gated_delta_net", "continuum_levels": [LEARNING]},
}


def sources(folder, count):
    """Bytes of a folder of the standard library."""
    root = pathlib.Path(inspect.getfile(inspect)).parent / folder
    text = b"".join(path.read_bytes() for path in sorted(root.glob("*.py")))
    return torch.frombuffer(bytearray(text[:count]), dtype=torch.uint8).long()


def train(options, steps=200, batch=8):
    torch.manual_seed(0)
    config = HopeConfig(
        vocab_size=256,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.02,
        **options,
    )
    model = HopeForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps, pct_start=0.1)
    text = sources(".", steps * batch * WINDOW).view(-1, WINDOW)
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0))
    for window in text[order].view(steps, batch, WINDOW):
        model(window, labels=window).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def falls_behind(model, length=64 * WINDOW, streams=4):
    """Nats by which the carried state is worse from 8 windows on: than a fresh one, and than it was at first.

    Both are differences to the fresh state's loss of the same tokens, so that the text's own ups and downs
    are out of them.
    """
    losses = loss_by_position(model, sources("asyncio", length), window=WINDOW, streams=streams)
    late, early = (losses.between(a * WINDOW, b * WINDOW) for a, b in ((8, length // WINDOW), (1, 2)))
    print(f"carried / fresh: early {early.carried:.3f} / {early.fresh:.3f}", end=", ")
    print(f"late {late.carried:.3f} / {late.fresh:.3f}")
    return max(late.difference, late.difference - early.difference)


@pytest.mark.parametrize(
    "name", ["default", *(pytest.param(n, marks=pytest.mark.slow) for n in list(MODELS)[1:])]
)
def test_reading_on_does_not_make_a_model_worse(name):
    assert falls_behind(train(MODELS[name])) <= MARGIN


@pytest.mark.slow
def test_a_level_that_retains_everything_falls_behind():
    """What the retention is for, and that the measurement above can fail."""
    levels = [{**LEARNING, "initial_retention": 1.0}]
    assert falls_behind(train({"continuum_levels": levels})) > 3 * MARGIN


@pytest.mark.slow
def test_a_million_tokens_on_it_is_as_good_as_with_a_fresh_state():
    model, length = train(MODELS["default"]), 2**20
    text = sources("asyncio", length)
    text = text.repeat(-(-length // len(text)))[:length]
    losses = loss_by_position(model, text, window=WINDOW, streams=1, piece=32 * WINDOW)
    assert losses.between(length - 2**16, length).difference <= MARGIN
