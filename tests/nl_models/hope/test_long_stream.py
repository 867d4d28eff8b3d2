"""A Hope model that reads a long real text in one go stays finite, and its state bounded."""

import inspect
import pathlib

import pytest
import torch

from nl_models import HopeCache, HopeConfig, HopeForCausalLM
from nl_models.layers.state import map_state

SEGMENT = 4096
LONG = 2**20
SHORT = 2**13


def real_bytes(count):
    """``count`` bytes of the standard library's sources, as token ids."""
    folder = pathlib.Path(inspect.getfile(inspect)).parent
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= count:
            break
    text *= -(-count // len(text))
    return torch.frombuffer(text[:count], dtype=torch.uint8).long()[None]


def largest_norm(cache):
    """The largest Frobenius norm of a tensor of fast weights; NaN and Inf are found, too."""
    norms = []
    for layer in cache.layers:
        for state in (layer.state.mixer, layer.state.continuum):
            map_state(lambda t: norms.append(t.float().norm().item()) or t, state)
    assert all(torch.tensor(norms).isfinite())
    return max(norms)


def train_briefly(model, text, steps=30, length=256):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for window in text[0, : steps * length].view(steps, 1, length):
        loss = model(window, labels=window).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    return model


@pytest.mark.parametrize("length", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("hidden", [None, 32])
@pytest.mark.parametrize(
    "momentum", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "momentum"]
)
def test_a_long_stream_of_real_text_stays_finite(length, dtype, trained, hidden, momentum, record_property):
    torch.manual_seed(0)
    text = real_bytes(length)
    config = HopeConfig(
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        memory_hidden_size=hidden,
        memory_momentum=momentum,
    )
    model = HopeForCausalLM(config)
    if trained:
        train_briefly(model, text)
    model = model.to(dtype).eval()
    cache, norms = HopeCache(config), []
    with torch.no_grad():
        for start in range(0, length, SEGMENT):
            logits = model(text[:, start : start + SEGMENT], cache=cache, use_cache=True).logits
            assert logits.isfinite().all()
            norms.append(largest_norm(cache))
    record_property("largest_norm", max(norms))
    print(
        f"tokens {length}  {dtype}  trained {trained}  hidden {hidden}"
        f"  momentum {momentum}  largest norm {max(norms):.1f}"
    )
    # Far above what was seen, and far below a blow-up, which passes it within some thousand tokens.
    assert max(norms) < 500
    assert max(norms[len(norms) // 2 :]) < 4 * max(norms[: max(1, len(norms) // 2)])
