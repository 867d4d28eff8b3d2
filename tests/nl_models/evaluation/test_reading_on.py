"""The standard of every default: a model that reads on beyond its training window stays as good as it was."""

import functools
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


NONSENSE = {
    "one byte": lambda count: torch.full((count,), ord("a")),
    "a pattern": lambda count: torch.arange(count) % 17 + 32,
    "noise": lambda count: torch.randint(256, (count,), generator=torch.Generator().manual_seed(0)),
}


@functools.cache
def trained(name):
    return train(MODELS[name])


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
    assert falls_behind(trained(name)) <= MARGIN


@pytest.mark.parametrize("name", ["default", pytest.param("nested", marks=pytest.mark.slow)])
@pytest.mark.parametrize("nonsense", NONSENSE)
def test_nonsense_read_before_a_text_is_soon_forgotten(name, nonsense):
    """From four windows of the text on, it is read as well as with a fresh state every window."""
    model, streams = trained(name), 16
    text = sources("asyncio", streams * 8 * WINDOW).view(streams, -1)
    before = NONSENSE[nonsense](16 * WINDOW).expand(streams, -1)
    with torch.no_grad():
        read = model(torch.cat([before, text], 1)).logits[:, before.shape[1] :]
        fresh = model(text.reshape(-1, WINDOW)).logits.view_as(read)
    # The first token of each window is predicted by the last of the one before, which a fresh state has not.
    losses = [
        torch.nn.functional.cross_entropy(
            logits.view(streams, -1, WINDOW, 256)[:, 4:, :-1].flatten(0, 2),
            text.view(streams, -1, WINDOW)[:, 4:, 1:].flatten(),
        ).item()
        for logits in (read, fresh)
    ]
    print(f"after {nonsense} {losses[0]:.3f}, fresh {losses[1]:.3f}")
    assert losses[0] - losses[1] <= MARGIN


@pytest.mark.slow
def test_a_level_that_retains_everything_falls_behind():
    """What the retention is for, and that the measurement above can fail."""
    levels = [{**LEARNING, "initial_retention": 1.0}]
    assert falls_behind(train({"continuum_levels": levels})) > 3 * MARGIN


@pytest.mark.slow
def test_a_million_tokens_on_it_is_as_good_as_with_a_fresh_state():
    model, length = trained("default"), 2**20
    text = sources("asyncio", length)
    text = text.repeat(-(-length // len(text)))[:length]
    losses = loss_by_position(model, text, window=WINDOW, streams=1, piece=32 * WINDOW)
    assert losses.between(length - 2**16, length).difference <= MARGIN
