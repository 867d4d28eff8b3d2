"""A sequence cut anywhere and continued from its state is the uncut one; padding is as if not there."""

import copy

import pytest
import torch

from nl_models import HopeCache
from nl_models.hope.configuration_hope import LAYER_TYPES

KINDS = [*LAYER_TYPES, list(LAYER_TYPES[:3:2])]
TIGHT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(params=KINDS, ids=str)
def kind(request):
    return request.param


def run(model, ids, cache, **options):
    with torch.no_grad():
        return model(ids, cache=cache, use_cache=True, **options).logits


@pytest.fixture
def full(make_model, tokens, kind):
    model, ids = make_model(kind), tokens(2, 21)
    with torch.no_grad():
        return model, ids, model(ids, use_cache=False).logits


def test_tokens_one_by_one_equal_the_whole(full):
    model, ids, expected = full
    cache = HopeCache(model.config)
    steps = [run(model, ids[:, t : t + 1], cache) for t in range(ids.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), expected, **TIGHT)
    assert cache.get_seq_length() == ids.shape[1]


def test_a_cut_anywhere_changes_nothing(full):
    model, ids, expected = full
    for cut in range(1, ids.shape[1]):
        cache = HopeCache(model.config)
        parts = [run(model, ids[:, :cut], cache), run(model, ids[:, cut:], cache)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, **TIGHT)


def test_pieces_of_several_sizes_equal_the_whole(full):
    model, ids, expected = full
    cache = HopeCache(model.config)
    parts = [run(model, piece, cache) for piece in ids.split([5, 1, 8, 4, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, **TIGHT)


def test_fp32_decode_is_as_exact_as_the_fp32_forward(make_model, tokens, kind):
    model, ids = make_model(kind, noise=0.05), tokens(2, 19)
    exact = run(model, ids, None)
    single = copy.deepcopy(model).float()
    forward_error = (run(single, ids, None) - exact).abs().max()
    cache = HopeCache(model.config)
    steps = torch.cat([run(single, ids[:, t : t + 1], cache) for t in range(ids.shape[1])], 1)
    # Another order of the same sums: a small multiple of the forward's own error, and a few roundings.
    budget = 4 * forward_error + 8 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (steps - exact).abs().max() <= budget


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_if_it_were_not_there(make_model, tokens, kind, side):
    model, ids = make_model(kind), tokens(3, 15)
    lengths = [15, 6, 1]
    mask = torch.zeros(3, 15, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, slice(15 - length, None) if side == "left" else slice(length)] = 1
    padded = torch.zeros_like(ids)
    padded[mask.bool()] = ids[mask.bool()]
    cache = HopeCache(model.config)
    logits = run(model, padded, cache, attention_mask=mask)
    following = tokens(3, 4, seed=1)
    after = run(model, following, cache, attention_mask=torch.cat([mask, torch.ones_like(following)], 1))
    for row in range(3):
        alone = HopeCache(model.config)
        real = mask[row].bool()
        expected = run(model, padded[row, real][None], alone)
        torch.testing.assert_close(logits[row, real][None], expected, **TIGHT)
        torch.testing.assert_close(after[row : row + 1], run(model, following[row : row + 1], alone), **TIGHT)


def test_padding_in_a_later_piece_changes_nothing(make_model, tokens, kind):
    model, ids = make_model(kind), tokens(2, 12)
    later = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]])
    cache = HopeCache(model.config)
    run(model, ids[:, :6], cache)
    logits = run(model, ids[:, 6:], cache, attention_mask=torch.cat([torch.ones_like(later), later], 1))
    last = run(model, ids[:, :1], cache)
    real = torch.tensor([True] * 6 + [False, False, True, True, False, True])
    alone = HopeCache(model.config)
    expected = run(model, ids[:1, real], alone)
    torch.testing.assert_close(logits[:1, real[6:]], expected[:, 6:], **TIGHT)
    torch.testing.assert_close(last[:1], run(model, ids[:1, :1], alone), **TIGHT)


def test_a_sequence_of_padding_only_keeps_its_state(make_model, tokens, kind):
    model, ids = make_model(kind), tokens(2, 8)
    cache = HopeCache(model.config)
    run(model, ids[:, :5], cache)
    alone = copy.deepcopy(cache)
    run(model, ids[:, 5:7], cache, attention_mask=torch.tensor([[1, 1], [0, 0]]))
    last = run(model, ids[:, 7:], cache)
    torch.testing.assert_close(last[1:], run(model, ids[:, 7:], alone)[1:], **TIGHT)


def test_packed_sequences_equal_separate_ones(make_model, tokens, kind):
    model, ids = make_model(kind), tokens(1, 20)
    bounds = torch.tensor([0, 3, 4, 13, 20])
    packed = model(ids, cu_seqlens=bounds, labels=ids)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
        separate = model(ids[:, start:end]).logits
        torch.testing.assert_close(packed.logits[:, start:end], separate, **TIGHT)
    lengths = bounds.diff().tolist()
    separate = [
        model(piece, labels=piece).loss * (length - 1)
        for piece, length in zip(ids.split(lengths, 1), lengths)
        if length > 1
    ]
    torch.testing.assert_close(packed.loss, sum(separate) / (20 - 4))  # the library takes losses in fp32


def test_the_state_does_not_grow(make_model, tokens):
    model = make_model([t for t in LAYER_TYPES if t != "full_attention"], num_hidden_layers=3)
    cache = HopeCache(model.config)
    sizes = []
    for length in (1, 30, 60):  # to the same place in the chunks of every level, which keep the tokens since
        run(model, tokens(2, length), cache)
        sizes.append(cache.num_bytes())
    assert sizes[0] == sizes[1] == sizes[2]
