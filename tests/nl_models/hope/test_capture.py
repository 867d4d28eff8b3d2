"""A CUDA graph may be captured: the host reads nothing that is on the device, and no value changes."""

import pytest
import torch

from nl_kernels import chunk_alignment
from nl_kernels.dispatch import kernels_planned
from nl_kernels.ops.continuum import grid, state
from nl_models import HopeCache, HopeConfig, HopeForCausalLM
from nl_models.layers import packing

LENGTH = 40
KINDS = ["self_modifying_titans", "titans", "gated_delta_net", "full_attention"]


def config_of(kind, **options):
    levels = [{"hidden_size": 12, "chunk_size": 8}, {"hidden_size": 8, "chunk_size": 16}, {"hidden_size": 16}]
    return HopeConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, layer_types=kind,
        memory_chunk_size=4, continuum_levels=levels, **options,
    )  # fmt: skip


def train(model, ids, **given):
    output = model(input_ids=ids, labels=ids, use_cache=False, **given)
    output.loss.backward()
    return output.logits


def decode(model, ids, cut, masks=(None, None)):
    cache = HopeCache(model.config)
    with torch.no_grad():
        logits = [
            model(input_ids=part, attention_mask=mask, cache=cache, use_cache=True).logits
            for part, mask in zip(ids.split([cut, ids.shape[1] - cut], dim=1), masks)
        ]
    return torch.cat(logits, dim=1)


def masked(model, ids):
    mask = torch.ones_like(ids)
    mask[0, 30:], mask[1, :7] = 0, 0
    return train(model, ids, attention_mask=mask)


def packed(model, ids):
    bounds = torch.tensor([0, 9, 30, 80], dtype=torch.int32).to(ids.device)
    return train(model, ids.reshape(1, -1), cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=56)


def decode_masked(model, ids):
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return decode(model, ids, 36, (mask[:, :36], mask))


CALLS = {
    "training": train,
    "training, padded": masked,
    "training, packed": packed,
    "decoding": lambda model, ids: decode(model, ids, LENGTH - 1),
    "a piece": lambda model, ids: decode(model, ids, 13),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("detach_updates", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_host_reads_nothing(kind, detach_updates, call):
    # a meta tensor that is read is an error; the implementations are those of CUDA
    with torch.device("meta"), kernels_planned():
        model = HopeForCausalLM(config_of(kind, continuum_detach_updates=detach_updates)).train()
        CALLS[call](model, torch.zeros(2, LENGTH, dtype=torch.int64))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_read_changes_no_value(kind, call, monkeypatch):
    torch.manual_seed(0)
    model, ids = HopeForCausalLM(config_of(kind)).double(), torch.randint(32, (2, LENGTH))

    def run():
        model.zero_grad()
        logits = CALLS[call](model, ids)
        return [logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = run()
    for module in (chunk_alignment, grid, packing, state):
        monkeypatch.setattr(module, "has_readable_data", lambda value: False)
    for f, e in zip(run(), expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-12)


def test_what_the_host_must_know_is_asked_for():
    with torch.device("meta"), kernels_planned():
        model, ids = HopeForCausalLM(config_of(KINDS[0])), torch.zeros(1, LENGTH, dtype=torch.int64)
        with pytest.raises(ValueError, match="max_length_q: expected an int while a CUDA graph is captured"):
            train(model, ids, cu_seqlens=torch.zeros(3, dtype=torch.int32))
        ids = torch.zeros(2, LENGTH, dtype=torch.int64)
        with pytest.raises(ValueError, match="position: the host must know them"):
            decode_masked(model, ids)
