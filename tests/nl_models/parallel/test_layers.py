"""Every layer over ranks is the layer on whole sequences: outputs, states and all gradients."""

import pytest
import torch

from nl_models.layers import (
    Attention,
    AttentionState,
    ContinuumMemory,
    GatedDeltaNet,
    LevelConfig,
    SelfModifyingTitans,
    ShortConvolution,
    Titans,
)
from nl_models.layers.state import map_state, state_tensors
from nl_models.parallel import SequenceRanks, over_ranks
from tests.nl_models.parallel.processes import on_ranks, pieces

D, H = 8, 2
LEVELS = [
    LevelConfig(hidden_size=6, chunk_size=3, rule="momentum"),
    LevelConfig(hidden_size=5, chunk_size=6, gated=True),
    LevelConfig(hidden_size=7),
]
CLOCKED = [LEVELS[0], LevelConfig(hidden_size=5, chunk_size=6, max_rate=0)]
LAYERS = {
    "convolution": lambda: ShortConvolution(D, 4),
    "attention": lambda: Attention(D, H),
    "gated_delta_net": lambda: GatedDeltaNet(D, H),
    "titans": lambda: Titans(D, H, memory_hidden_size=5, chunk_size=4, momentum=True),
    "self_modifying": lambda: SelfModifyingTitans(D, H, chunk_size=4, generator_chunk_size=2),
    "continuum": lambda: ContinuumMemory(D, LEVELS),
    "nested": lambda: ContinuumMemory(D, CLOCKED, variant="nested"),
    "static": lambda: ContinuumMemory(D, LEVELS[2:]),
}


def make(name, dtype=torch.float64):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer.to(dtype)


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def prepared(name, lengths, resumed=False, padded=False, dtype=torch.float64):
    """The layer, its input, cotangent, mask and first state."""
    layer, T = make(name, dtype), sum(lengths)
    x, dy = draw(2, T, D, seed=1, dtype=dtype), draw(2, T, D, seed=2, dtype=dtype)
    mask = state = None
    if padded:
        mask = draw(2, T, seed=3) > -0.5
    if resumed:
        _, state = layer(draw(2, 5, D, seed=4, dtype=dtype), output_state=True)
        state = map_state(lambda t: t.detach().requires_grad_(t.is_floating_point()), state)
    return layer, x.requires_grad_(), dy, mask, state


def results(layer, x, y, dy, before, after):
    """Everything that may depend on everything, with a cotangent of the state after."""
    if isinstance(after, AttentionState) and after.mask is not None:  # padded keys hold anything
        real = after.mask[:, None, :, None]
        after = after._replace(keys=after.keys * real, values=after.values * real)
    loss = (y * dy).sum()
    for i, tensor in enumerate(state_tensors(after)):
        if tensor.requires_grad:
            loss = loss + (tensor * draw(*tensor.shape, seed=10 + i, dtype=tensor.dtype)).sum()
    loss.backward()
    of_weights, of_state = (
        [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors if t.is_floating_point()]
        for tensors in (layer.parameters(), state_tensors(before))
    )
    return y.detach(), x.grad, of_weights, [t.detach() for t in state_tensors(after)], of_state


def run_layer(mesh, name, lengths, options, checkpoint=False):
    ranks = SequenceRanks(mesh)
    layer, x, dy, mask, state = prepared(name, lengths, **options)
    x, dy = (pieces(t.detach(), lengths)[ranks.rank] for t in (x, dy))
    mask = None if mask is None else pieces(mask, lengths)[ranks.rank]
    state = None if ranks.rank else state
    x.requires_grad_()
    calls = []
    part = layer.levels[0] if isinstance(layer, ContinuumMemory) else getattr(layer, "k_proj", layer)
    part.register_forward_pre_hook(lambda *_: calls.append(1))
    y, after = over_ranks(layer, x, ranks, state, mask, output_state=True, checkpoint=checkpoint)
    assert ranks.is_last or after is None
    found = results(layer, x, y, dy, state, after)
    assert len(calls) == 1 + checkpoint
    ranks.finish()
    return found


def check(name, lengths, folder, checkpoint=False, tolerance=1e-9, **options):
    found = on_ranks(len(lengths), folder, run_layer, name, lengths, options, checkpoint)
    layer, x, dy, mask, state = prepared(name, lengths, **options)
    y, after = layer(x, state, mask, True)
    y, dx, gradients, after, of_state = results(layer, x, y, dy, state, after)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(torch.cat([piece[0] for piece in found], 1), y, **close)
    torch.testing.assert_close(torch.cat([piece[1] for piece in found], 1), dx, **close)
    sums = [sum(each) for each in zip(*(piece[2] for piece in found))]
    torch.testing.assert_close(sums, gradients, **close)
    torch.testing.assert_close(found[-1][3], after, **close)
    torch.testing.assert_close(found[0][4], of_state, **close)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_states_and_gradients_are_those_of_one_process(name, size, tmp_path):
    check(name, [7] * size, tmp_path)


@pytest.mark.parametrize("name", LAYERS)
def test_uneven_pieces_behind_a_state(name, tmp_path):
    """The second is shorter than the convolution's window."""
    check(name, [6, 1, 8], tmp_path, resumed=True)


@pytest.mark.parametrize("name", LAYERS)
def test_padding(name, tmp_path):
    check(name, [5, 2, 6], tmp_path, padded=True)


@pytest.mark.parametrize("name", ["attention", "gated_delta_net", "self_modifying", "continuum"])
def test_single_precision(name, tmp_path):
    check(name, [7, 7], tmp_path, dtype=torch.float32, tolerance=1e-5)


@pytest.mark.parametrize("name", ["attention", "gated_delta_net", "titans", "continuum"])
def test_checkpointing_receives_nothing_twice(name, tmp_path):
    check(name, [7, 7, 7], tmp_path, checkpoint=True)


def under_autocast(mesh, lengths):
    ranks = SequenceRanks(mesh)
    layer, x, _, _, _ = prepared("gated_delta_net", lengths, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = over_ranks(layer, pieces(x, lengths)[ranks.rank], ranks, output_state=True)
    ranks.finish()
    return y.detach(), state


def test_autocast_does_not_round_the_memory(tmp_path):
    found = on_ranks(3, tmp_path, under_autocast, [20, 20, 20])
    layer, x, _, _, _ = prepared("gated_delta_net", [60], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x, output_state=True)
    torch.testing.assert_close(found[-1][1], state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([piece[0] for piece in found], 1), y.detach(), rtol=2e-2, atol=2e-2)


def agreed_once(mesh):
    ranks = SequenceRanks(mesh)
    layers = [make(name) for name in ("convolution", "gated_delta_net", "continuum")]
    agreement = ranks.agree(2, 6, padded=False, resumed=False)
    x = pieces(draw(2, 12, D, seed=1), [6, 6])[ranks.rank]
    for layer in layers:
        x, _ = over_ranks(layer, x, ranks, agreement=agreement)
    ranks.finish()
    return x.detach()


def test_layers_in_a_row_agree_once(tmp_path):
    y = torch.cat(on_ranks(2, tmp_path, agreed_once), 1)
    x = draw(2, 12, D, seed=1)
    for name in ("convolution", "gated_delta_net", "continuum"):
        x, _ = make(name)(x)
    torch.testing.assert_close(y, x.detach(), rtol=1e-9, atol=1e-9)


def states_by_rank(mesh):
    ranks, layer = SequenceRanks(mesh), make("titans")
    _, state = layer(draw(2, 3, D, seed=1), output_state=True)
    with pytest.raises(ValueError, match="state: expected on the first rank alone"):
        over_ranks(layer, draw(2, 3, D, seed=1), ranks, state)


def test_a_state_of_a_later_rank_is_refused(tmp_path):
    on_ranks(2, tmp_path, states_by_rank)
