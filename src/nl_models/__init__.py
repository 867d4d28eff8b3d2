"""Layers, the Hope model, training and tools that wire :mod:`nl_kernels` into PyTorch.

The names of the model are looked up when they are first used: importing transformers takes seconds, and
``nl_models.layers`` and ``nl_models.optim`` do without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nl_models.hope import HopeCache, HopeConfig, HopeForCausalLM, HopeModel

__all__ = ["HopeCache", "HopeConfig", "HopeForCausalLM", "HopeModel", "register"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nl_models import hope

    return getattr(hope, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register() -> None:
    """Make ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` know Hope and every converted model.

    Twice is harmless.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from nl_models.hope import HopeConfig, HopeForCausalLM, HopeModel
    from nl_models.surgery import register_families

    AutoConfig.register(HopeConfig.model_type, HopeConfig, exist_ok=True)
    AutoModel.register(HopeConfig, HopeModel, exist_ok=True)
    AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM, exist_ok=True)
    register_families()
