"""States of layers alone: saved, selected, joined, cut from their graph."""

import pytest
import torch
import torch.distributed as dist

from nl_models.layers import (
    Attention,
    ContinuumMemory,
    GatedDeltaNet,
    LevelConfig,
    SelfModifyingTitans,
    ShortConvolution,
    Titans,
    detach_state,
    join_states,
    load_state,
    save_state,
    select_state,
)
from nl_models.layers.state import state_tensors
from tests.nl_models.parallel.processes import on_ranks

LAYERS = {
    "attention": lambda: Attention(16, 2),
    "continuum": lambda: ContinuumMemory(
        16, [LevelConfig(hidden_size=8, chunk_size=4), LevelConfig(hidden_size=8, chunk_size=8)]
    ),
    "resting level": lambda: ContinuumMemory(
        16,
        [LevelConfig(hidden_size=8, chunk_size=4), LevelConfig(hidden_size=8, chunk_size=8, max_rate=0)],
        variant="nested",
    ),
    "delta": lambda: GatedDeltaNet(16, 2),
    "self-modifying": lambda: SelfModifyingTitans(16, 2, memory_hidden_size=6, chunk_size=4, momentum=True),
    "convolution": lambda: ShortConvolution(16),
    "titans": lambda: Titans(16, 2, chunk_size=4),
}


@pytest.fixture(params=LAYERS)
def read(request):
    """A layer, what it has read, its state, and what follows."""
    torch.manual_seed(0)
    layer = LAYERS[request.param]().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(3, 14, 16, dtype=torch.float64, requires_grad=True)
    _, state = layer(x[:, :10], output_state=True)
    return layer, state, x[:, 10:]


def test_a_saved_state_goes_on(read, tmp_path):
    layer, state, x = read
    save_state(tmp_path / "state.safetensors", state)
    loaded = load_state(tmp_path / "state.safetensors")
    assert type(loaded) is type(state)
    assert torch.equal(layer(x, loaded)[0], layer(x, state)[0])


def save_and_go_on(mesh, folder):
    """What each layer says from its saved state, and from that in memory; each rank has a text of its own."""
    rank, found = mesh.get_rank(), {}
    for kind, make in LAYERS.items():
        torch.manual_seed(0)
        layer = make()  # the same on all ranks
        torch.manual_seed(1 + rank)
        x = torch.randn(1 + rank, 14, 16)  # of other sizes, too
        _, state = layer(x[:, :10], output_state=True)
        for _ in range(3):  # both at the same time, in one folder
            save_state(folder / f"{kind}-{rank}.safetensors", state)
        dist.barrier()
        loaded = load_state(folder / f"{kind}-{rank}.safetensors")
        found[kind] = layer(x[:, 10:], loaded)[0].detach(), layer(x[:, 10:], state)[0].detach()
    return found


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_what_each_rank_has_saved_goes_on_there(tmp_path):
    (tmp_path / "states").mkdir()
    for rank, found in enumerate(on_ranks(2, tmp_path, save_and_go_on, tmp_path / "states")):
        for kind, (loaded, whole) in found.items():
            assert loaded.shape == (1 + rank, 4, 16), kind
            assert torch.equal(loaded, whole), kind
    names = sorted(f"{kind}-{rank}.safetensors" for kind in LAYERS for rank in (0, 1))
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == names


def test_a_state_in_a_checkpoint_is_loaded_as_data(read, tmp_path):
    layer, state, x = read
    torch.save({"state": detach_state(state)}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]
    assert type(loaded) is type(state)
    assert torch.equal(layer(x, loaded)[0], layer(x, state)[0])


def test_selected_and_joined_sequences_go_on(read):
    layer, state, x = read
    expected = layer(x, state)[0]
    some = select_state(state, torch.tensor([2, 0]))
    torch.testing.assert_close(layer(x[[2, 0]], some)[0], expected[[2, 0]], rtol=0, atol=1e-12)
    masked = select_state(state, torch.tensor([False, True, False]))
    again = join_states([some, masked, masked])
    rows = [2, 0, 1, 1]
    torch.testing.assert_close(layer(x[rows], again)[0], expected[rows], rtol=0, atol=1e-12)


def test_a_detached_state_has_no_graph(read):
    layer, state, x = read
    assert any(t.requires_grad for t in state_tensors(state))
    cut = detach_state(state)
    assert not any(t.requires_grad for t in state_tensors(cut))
    assert torch.equal(layer(x, cut)[0], layer(x, state)[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_sequences_that_have_read_unequally_much_go_on_together(kind):
    torch.manual_seed(0)
    layer, x = LAYERS[kind]().double(), torch.randn(3, 14, 16, dtype=torch.float64)
    whole, _ = layer(x)
    read = [layer(x[row : row + 1, : 10 - 3 * row], output_state=True)[1] for row in range(3)]
    new = torch.stack([x[row, 10 - 3 * row : 14 - 3 * row] for row in range(3)])
    first, state = layer(new[:, :1], join_states(read), output_state=True)
    rows = torch.tensor([2, 1])
    second, _ = layer(new[rows, 1:], select_state(state, rows))
    for row in range(3):
        found = first[row] if row == 0 else torch.cat([first[row], second[2 - row]])
        torch.testing.assert_close(found, whole[row, 10 - 3 * row :][: len(found)], rtol=0, atol=1e-12)


def test_states_that_do_not_lie_together_are_refused():
    narrow, wide = (Attention(d, 2)(torch.randn(1, 5, d), output_state=True)[1] for d in (8, 16))
    with pytest.raises(ValueError, match="states: of different sizes"):
        join_states([narrow, wide])
    other = Titans(16, 2, chunk_size=4)(torch.randn(1, 5, 16), output_state=True)[1]
    with pytest.raises(ValueError, match="states: expected those of one layer"):
        join_states([wide, other])


def test_files_that_are_no_states_are_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_state(path)
    with pytest.raises(ValueError, match=r"state: expected that of a layer, got None; .* output_state=True"):
        save_state(path, None)  # as a call gives it that was not asked for it
    assert not path.exists()
    _, state = Titans(16, 2, chunk_size=4)(torch.randn(1, 5, 16), output_state=True)
    save_state(path, state)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="truncated, or no saved state"):
        load_state(path)
    path.write_bytes(b"some text that is long enough to be a header")
    with pytest.raises(ValueError, match="truncated, or no saved state"):
        load_state(path)
