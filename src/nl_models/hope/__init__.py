"""Hope as a transformers model."""

from nl_models.hope.cache_hope import HopeCache
from nl_models.hope.configuration_hope import HopeConfig
from nl_models.hope.modeling_hope import HopeForCausalLM, HopeModel

__all__ = ["HopeCache", "HopeConfig", "HopeForCausalLM", "HopeModel"]
