"""Orthogonalisation shared out over two processes (gloo) gives the steps of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from nl_models.optim import M3, DeltaMomentum, Muon, orthogonalise, split_parameters
from nl_models.optim.shared_work import owners, run_shared
from tests.nl_models.parallel.processes import on_ranks

KINDS = [
    (Muon, {}),
    (M3, {"frequency": 2}),
    (M3, {"frequency": 2, "second_moment": True}),
    (M3, {"frequency": 2, "literal": True}),
]
STEPS = 5


def network():
    """Sizes that two processes divide, do not divide, and of which one gets nothing; a stack too."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1), nn.Linear(1, 6)]
    model = nn.Sequential(*layers).double()
    model.register_parameter("stack", nn.Parameter(torch.randn(3, 4, 2, dtype=torch.float64)))
    return model


def train(model, kind, options):
    """The optimiser after some steps on one batch, which every process sees whole."""
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    optimizer = kind(split_parameters(model), lr=0.05, **options)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        stack = model.stack
        stack = stack.full_tensor() if isinstance(stack, DTensor) else stack
        (loss + (stack - 1).square().mean()).backward()
        optimizer.step()
    return optimizer


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def count_matrices(function):
    """How many matrices this process orthogonalises while ``function`` runs."""
    done, original = [], orthogonalise.newton_schulz
    orthogonalise.newton_schulz = lambda x, **options: done.append(x.shape[0]) or original(x, **options)
    try:
        function()
    finally:
        orthogonalise.newton_schulz = original
    return sum(done)


def check_training(rank, kind, options):
    alone = network()
    everything = count_matrices(lambda: train(alone, kind, options))

    copies = network()
    share = count_matrices(lambda: train(copies, kind, {**options, "process_group": dist.group.WORLD}))
    shares = [None, None]
    dist.all_gather_object(shares, share)
    assert sum(shares) == everything
    assert min(shares) > 0
    for p, q in zip(copies.parameters(), alone.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
        others = [torch.empty_like(p) for _ in range(2)]
        dist.all_gather(others, p.detach())
        assert torch.equal(*others)

    sharded = network()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    share = count_matrices(lambda: train(sharded, kind, options))
    dist.all_gather_object(shares, share)
    assert sum(shares) == everything
    assert min(shares) > 0
    for p, q in zip(sharded.parameters(), alone.parameters()):
        assert isinstance(p, DTensor)
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-9, atol=1e-9)


def check_a_sharded_state_is_restored():
    first, second = network(), network()
    for model in (first, second):
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    options = {"frequency": 2}
    optimizer = train(first, M3, options)
    other = M3(split_parameters(second), lr=0.05, **options)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for chosen, model in ((optimizer, first), (other, second)):
        for p in model.parameters():
            p.grad = p.detach() * 0.1
        chosen.step()
    for p, q in zip(first.parameters(), second.parameters()):
        assert torch.equal(p.to_local(), q.to_local())


def check_placements():
    mesh, flat = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    rng = torch.Generator().manual_seed(2)
    tensors = [torch.randn(s, generator=rng) for s in [(5, 3), (4, 6), (3, 2, 4), (1, 3), (2, 2), (7, 2)]]
    run = lambda xs: [x / x.norm(dim=(-2, -1), keepdim=True) for x in xs]  # noqa: E731
    expected = run(tensors)
    for placement in (Shard(0), Shard(1), Replicate()):
        given = [distribute_tensor(x, mesh, [placement]) for x in tensors]
        for x, y in zip(run_shared(given, run, None), expected):
            assert x.placements == (placement,)
            torch.testing.assert_close(x.full_tensor(), y)
    given = [distribute_tensor(x, flat, [Replicate(), Shard(0)]) for x in tensors]
    mixed = [*given, *tensors]
    for x, y in zip(run_shared(mixed, run, dist.group.WORLD), expected * 2):
        torch.testing.assert_close(whole(x), y)
    for placements in ([Shard(0), Shard(1)], [Replicate(), Partial()]):
        refused = DTensor.from_local(tensors[1], flat, placements)
        with pytest.raises(NotImplementedError, match="placements"):
            run_shared([refused], run, None)
    with pytest.raises(ValueError, match="parameter 0 is a DTensor, which DeltaMomentum does not take"):
        DeltaMomentum([nn.Parameter(given[0])])


def check(mesh):
    check_placements()
    for kind, options in KINDS:
        check_training(mesh.get_rank(), kind, options)
    check_a_sharded_state_is_restored()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_give_the_steps_of_one(tmp_path):
    on_ranks(2, tmp_path, check)


def test_the_dearest_go_to_the_least_loaded():
    assert owners([1, 5, 3, 3, 1], 2) == [0, 0, 1, 1, 0]
    assert owners([], 3) == []
    assert set(owners([4] * 6, 3)) == {0, 1, 2}
    assert owners([7, 1], 1) == [0, 0]
