"""Which implementation a call gets that does not say one."""

import warnings

import pytest
import torch

from nl_kernels import delta_memory, dispatch
from nl_kernels.dispatch import IMPLEMENTATIONS, choose_implementation, kernels_run_on
from nl_models.layers import GatedDeltaNet, SelfModifyingTitans, Titans


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "eager"), ((8, 0), "triton"), ((9, 0), "triton")]
)
def test_gpus_without_the_kernels_products_run_eager(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    assert kernels_run_on(device) == (expected == "triton")
    assert choose_implementation("delta_memory", None, device, IMPLEMENTATIONS) == expected
    assert choose_implementation("delta_memory", None, device, ("eager", "reference")) == "eager"
    assert not kernels_run_on(torch.device("cpu"))


@pytest.mark.parametrize(
    ("capability", "reason", "message"),
    [
        ((9, 0), "momentum: the kernels have none", "deep_memory on cuda runs in plain PyTorch: momentum"),
        ((7, 5), None, "plain PyTorch: the Triton kernels need a CUDA device of compute capability 8.0"),
        ((9, 0), None, None),
    ],
)
def test_plain_pytorch_on_cuda_by_default_is_said_once(monkeypatch, capability, reason, message):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dispatch._say_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for device in ("cpu", "cuda", "cuda"):
            chosen = choose_implementation(
                "deep_memory", None, torch.device(device), unsupported=lambda: reason
            )
            assert (chosen == "triton") == (device == "cuda" and message is None)
    assert [str(w.message) for w in said] == ([] if message is None else [str(said[0].message)])
    assert message is None or message in str(said[0].message)


def test_kernels_that_are_asked_for_say_why_they_do_not_take_a_call(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(NotImplementedError, match="momentum: none; use impl='eager'"):
        choose_implementation(
            "deep_memory", "triton", torch.device("cpu"), unsupported=lambda: "momentum: none"
        )


@pytest.mark.parametrize("layer", [Titans, SelfModifyingTitans, GatedDeltaNet])
def test_layers_refuse_an_unknown_implementation_at_once(layer):
    with pytest.raises(ValueError, match="impl: 'auto' is called None since version"):
        layer(8, 2, impl="auto")
    with pytest.raises(ValueError, match="impl: expected one of"):
        layer(8, 2, impl="cuda")


def test_an_op_says_the_new_name():
    x = torch.zeros(1, 1, 1, 2)
    with pytest.raises(ValueError, match="impl: 'auto' is called None"):
        delta_memory(x, x, x, x[..., 0], x[..., 0], impl="auto")
