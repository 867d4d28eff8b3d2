"""What only a GPU can tell: steps do not wait for the device, and agree with the CPU's."""

import pytest
import torch

from nl_models.optim import M3, DeltaGradientDescent, MultiFrequency, Muon, split_parameters
from tests.nl_models.optim.problems import KINDS, groups_of, parameters

pytestmark = pytest.mark.gpu

CHOSEN = [name for name in KINDS if "literal" not in name]
every_kind = pytest.mark.parametrize(("kind", "options"), [KINDS[name] for name in CHOSEN], ids=CHOSEN)


def made(kind, options, device):
    matrices, others = (
        [torch.nn.Parameter(p.detach().to(device)) for p in part] for part in parameters(torch.float32)
    )
    return kind(groups_of(matrices, others), lr=0.02, **options), [*matrices, *others]


def set_gradients(params, seed):
    rng = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=rng).to(p.device)


@every_kind
def test_steps_equal_the_cpus(kind, options):
    options = {**options, "ns_dtype": torch.float32} if kind in (Muon, M3) else options
    (ours, params), (theirs, twins) = made(kind, options, "cuda"), made(kind, options, "cpu")
    for seed in range(7):
        set_gradients(params, seed)
        set_gradients(twins, seed)
        ours.step()
        theirs.step()
    for p, twin in zip(params, twins):
        torch.testing.assert_close(p.cpu(), twin, rtol=1e-3, atol=1e-4)


@every_kind
def test_a_step_does_not_wait_for_the_device(kind, options):
    optimizer, params = made(kind, options, "cuda")
    for seed in range(4):  # kernels compile, states are made
        set_gradients(params, seed)
        optimizer.step()
    set_gradients(params, 4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_kind
def test_a_saved_state_continues_bit_for_bit(kind, options):
    optimizer, params = made(kind, options, "cuda")
    for seed in range(4):
        set_gradients(params, seed)
        optimizer.step()
    other, twins = made(kind, options, "cuda")
    for p, twin in zip(params, twins):
        twin.data.copy_(p.data)
    other.load_state_dict(optimizer.state_dict())
    for seed in range(4, 8):
        for chosen, group in ((optimizer, params), (other, twins)):
            set_gradients(group, seed)
            chosen.step()
    assert all(torch.equal(p, twin) for p, twin in zip(params, twins))


def network_step(device, wrap):
    """Weights after steps of delta gradient descent, or of several frequencies; what made them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 7)).to(device)
    if wrap:
        optimizer = MultiFrequency(Muon(split_parameters(model), ns_dtype=torch.float32), [2, 3])
    else:
        optimizer = DeltaGradientDescent(split_parameters(model, linear_only=True), model=model)

    def backward(count):
        optimizer.zero_grad()
        x = torch.randn(count, 5, generator=torch.Generator().manual_seed(count)).to(device)
        model(x).square().mean().backward()

    for count in (3, 30, 3, 30, 3):
        backward(count)
        optimizer.step()
    return model, optimizer, backward


@pytest.mark.parametrize("wrap", [False, True], ids=["dgd", "multi-frequency"])
def test_hooks_and_frequencies_equal_the_cpus_and_do_not_wait(wrap):
    (model, optimizer, backward), (twin, *_) = network_step("cuda", wrap), network_step("cpu", wrap)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-3, atol=1e-4)
    for count in (3, 30):
        backward(count)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
