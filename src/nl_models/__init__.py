"""Layers, the Hope model, training and tools that wire :mod:`nl_kernels` into PyTorch."""

from nl_models.hope import HopeCache, HopeConfig, HopeForCausalLM, HopeModel

__all__ = ["HopeCache", "HopeConfig", "HopeForCausalLM", "HopeModel", "register"]


def register() -> None:
    """Make ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` know Hope and every converted model.

    Twice is harmless.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from nl_models.surgery import register_families

    AutoConfig.register(HopeConfig.model_type, HopeConfig, exist_ok=True)
    AutoModel.register(HopeConfig, HopeModel, exist_ok=True)
    AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM, exist_ok=True)
    register_families()
