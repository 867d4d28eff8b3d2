"""All of an optimiser's state is where torch.distributed.checkpoint looks: in state and param_groups."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from nl_models.optim import (
    M3,
    DeepMomentum,
    DeltaGradientDescent,
    DeltaMomentum,
    MultiFrequency,
    Muon,
    split_parameters,
)

PLAIN = {
    "muon": lambda model: Muon(split_parameters(model), lr=0.05),
    "m3": lambda model: M3(split_parameters(model), lr=0.05, frequency=2, second_moment=True),
    "delta": lambda model: DeltaMomentum(split_parameters(model), lr=0.05, preconditioner="rms"),
    "deep": lambda model: DeepMomentum(split_parameters(model), lr=0.05),
    "dgd": lambda model: DeltaGradientDescent(
        split_parameters(model, linear_only=True), lr=0.05, model=model
    ),
    "dgd of matrices only": lambda model: DeltaGradientDescent([model[0].weight], lr=0.05, model=model),
}
SLOW = {
    f"slow {name}": lambda model, make=make: MultiFrequency(make(model), [3, 2])
    for name, make in {
        **{name: PLAIN[name] for name in ("muon", "m3", "delta", "deep")},
        "adamw": lambda model: torch.optim.AdamW(split(model), lr=0.05),
        "sgd": lambda model: torch.optim.SGD(split(model), lr=0.05),
    }.items()
}


def split(model):
    return [{"params": [p for p in model.parameters() if p.ndim == 2]}, {"params": [model[0].bias]}]


def made(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3, bias=False))
    return model, make(model)


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(5, 4, generator=generator)).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("way", ["dictionary", "flat", "file"])
@pytest.mark.parametrize("make", [*PLAIN.values(), *SLOW.values()], ids=[*PLAIN, *SLOW])
def test_training_goes_on_as_if_it_had_not_stopped(make, way, tmp_path):
    """Saved at a call at which both groups have stepped, and within the periods of both."""
    model, optimizer = made(make)
    train(model, optimizer, range(5))
    # Strict, PyTorch wants a state of each parameter; there is none of SGD's kind of rule.
    strict = not isinstance(optimizer, DeltaGradientDescent)
    options = StateDictOptions(flatten_optimizer_state_dict=way != "dictionary", strict=strict)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    other, fresh = made(make)
    other.load_state_dict(model.state_dict())
    if way == "file":
        dcp.save({"optimizer": saved}, checkpoint_id=tmp_path)
        saved = {"optimizer": get_optimizer_state_dict(other, fresh, options=options)}
        dcp.load(saved, checkpoint_id=tmp_path)
        saved = saved["optimizer"]
    set_optimizer_state_dict(other, fresh, copy.deepcopy(saved), options=options)
    train(model, optimizer, range(5, 12))
    train(other, fresh, range(5, 12))
    for name, parameter in model.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter), name


@pytest.mark.parametrize("make", SLOW.values(), ids=SLOW)
def test_a_flat_checkpoint_of_before_the_first_step(make):
    model, optimizer = made(make)
    train(model, optimizer, range(1))
    options = StateDictOptions(flatten_optimizer_state_dict=True, strict=False)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other, fresh = made(make)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, fresh, saved, options=options)
    for one, its in ((model, optimizer), (other, fresh)):
        train(one, its, range(1, 7))
    for expected, got in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("make", SLOW.values(), ids=SLOW)
def test_asking_for_the_state_is_no_call(make):
    """Before the first step, and before any group has stepped, when PyTorch makes a step to have states."""
    model, optimizer = made(make)
    pair = _, alone = made(make)
    train(model, optimizer, range(1))
    train(*pair, range(1))
    get_optimizer_state_dict(model, optimizer)
    assert optimizer._calls == alone._calls == 1
    assert all(
        torch.equal(total, alone_total)
        for total, alone_total in zip(optimizer._sums.values(), alone._sums.values())
    )
    train(model, optimizer, range(1, 7))
    train(*pair, range(1, 7))
    for a, b in zip(model.parameters(), pair[0].parameters()):
        assert torch.equal(a, b)


def test_a_state_of_the_older_form_is_read():
    """The sums were once in an entry of their own, which PyTorch's tools drop."""
    make = SLOW["slow muon"]
    model, optimizer = made(make)
    train(model, optimizer, range(5))
    numbers = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    sums = {numbers[p]: total.clone() for p, total in optimizer._sums.items()}
    assert sums
    older = copy.deepcopy(optimizer.optimizer.state_dict())
    older["multi_frequency"] = {"calls": 5, "reduction": "mean", "sums": sums}
    other, fresh = made(make)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(older)
    train(model, optimizer, range(5, 12))
    train(other, fresh, range(5, 12))
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)
