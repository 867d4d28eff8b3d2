"""The families of models that can be converted, each with its config, layer, model and language model."""

from __future__ import annotations

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Block
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXMLP
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3MLP

from nl_models.surgery.levels import ContinuumConfigMixin
from nl_models.surgery.modules import (
    ContinuumBackbone,
    ContinuumCausalLM,
    ContinuumDecoderLayer,
    GatedContinuumMLP,
    PlainContinuumMLP,
)


@strict
class ContinuumLlamaConfig(ContinuumConfigMixin, LlamaConfig):
    """A Llama config with levels (see :func:`nl_models.surgery.convert_mlp_to_continuum`)."""

    model_type = "continuum_llama"

    continuum_levels: list[dict] | None = None
    continuum_layers: list[int] | None = None
    memory_layers: dict[str, dict] | None = None


class ContinuumLlamaMLP(GatedContinuumMLP, LlamaMLP):
    """Llama's MLP with levels."""


class ContinuumLlamaDecoderLayer(ContinuumDecoderLayer, LlamaDecoderLayer):
    """Llama's decoder layer with levels."""


class ContinuumLlamaModel(ContinuumBackbone, LlamaModel):
    """Llama with levels, without its output layer."""

    config_class = ContinuumLlamaConfig
    _no_split_modules: ClassVar[list[str]] = ["ContinuumLlamaDecoderLayer"]
    layer_class = ContinuumLlamaDecoderLayer
    mlp_class = ContinuumLlamaMLP


class ContinuumLlamaForCausalLM(ContinuumCausalLM, LlamaForCausalLM):
    """Llama with levels."""

    config_class = ContinuumLlamaConfig
    _no_split_modules: ClassVar[list[str]] = ["ContinuumLlamaDecoderLayer"]
    backbone_class = ContinuumLlamaModel


@strict
class ContinuumQwen2Config(ContinuumConfigMixin, Qwen2Config):
    """A Qwen2 config with levels."""

    model_type = "continuum_qwen2"

    continuum_levels: list[dict] | None = None
    continuum_layers: list[int] | None = None
    memory_layers: dict[str, dict] | None = None


class ContinuumQwen2MLP(GatedContinuumMLP, Qwen2MLP):
    """Qwen2's MLP with levels."""


class ContinuumQwen2DecoderLayer(ContinuumDecoderLayer, Qwen2DecoderLayer):
    """Qwen2's decoder layer with levels."""


class ContinuumQwen2Model(ContinuumBackbone, Qwen2Model):
    """Qwen2 with levels, without its output layer."""

    config_class = ContinuumQwen2Config
    _no_split_modules: ClassVar[list[str]] = ["ContinuumQwen2DecoderLayer"]
    layer_class = ContinuumQwen2DecoderLayer
    mlp_class = ContinuumQwen2MLP


class ContinuumQwen2ForCausalLM(ContinuumCausalLM, Qwen2ForCausalLM):
    """Qwen2 with levels."""

    config_class = ContinuumQwen2Config
    _no_split_modules: ClassVar[list[str]] = ["ContinuumQwen2DecoderLayer"]
    backbone_class = ContinuumQwen2Model


@strict
class ContinuumQwen3Config(ContinuumConfigMixin, Qwen3Config):
    """A Qwen3 config with levels."""

    model_type = "continuum_qwen3"

    continuum_levels: list[dict] | None = None
    continuum_layers: list[int] | None = None
    memory_layers: dict[str, dict] | None = None


class ContinuumQwen3MLP(GatedContinuumMLP, Qwen3MLP):
    """Qwen3's MLP with levels."""


class ContinuumQwen3DecoderLayer(ContinuumDecoderLayer, Qwen3DecoderLayer):
    """Qwen3's decoder layer with levels."""


class ContinuumQwen3Model(ContinuumBackbone, Qwen3Model):
    """Qwen3 with levels, without its output layer."""

    config_class = ContinuumQwen3Config
    _no_split_modules: ClassVar[list[str]] = ["ContinuumQwen3DecoderLayer"]
    layer_class = ContinuumQwen3DecoderLayer
    mlp_class = ContinuumQwen3MLP


class ContinuumQwen3ForCausalLM(ContinuumCausalLM, Qwen3ForCausalLM):
    """Qwen3 with levels."""

    config_class = ContinuumQwen3Config
    _no_split_modules: ClassVar[list[str]] = ["ContinuumQwen3DecoderLayer"]
    backbone_class = ContinuumQwen3Model


@strict
class ContinuumGPTNeoXConfig(ContinuumConfigMixin, GPTNeoXConfig):
    """A GPT-NeoX config with levels."""

    model_type = "continuum_gpt_neox"

    continuum_levels: list[dict] | None = None
    continuum_layers: list[int] | None = None
    memory_layers: dict[str, dict] | None = None


class ContinuumGPTNeoXMLP(PlainContinuumMLP, GPTNeoXMLP):
    """GPT-NeoX's MLP with levels."""

    parts: ClassVar[dict[str, str]] = {"up": "dense_h_to_4h", "down": "dense_4h_to_h"}


class ContinuumGPTNeoXLayer(ContinuumDecoderLayer, GPTNeoXLayer):
    """GPT-NeoX's decoder layer with levels."""


class ContinuumGPTNeoXModel(ContinuumBackbone, GPTNeoXModel):
    """GPT-NeoX with levels, without its output layer."""

    config_class = ContinuumGPTNeoXConfig
    _no_split_modules: ClassVar[list[str]] = ["ContinuumGPTNeoXLayer"]
    layer_class = ContinuumGPTNeoXLayer
    mlp_class = ContinuumGPTNeoXMLP
    attention_name = "attention"


class ContinuumGPTNeoXForCausalLM(ContinuumCausalLM, GPTNeoXForCausalLM):
    """GPT-NeoX with levels."""

    config_class = ContinuumGPTNeoXConfig
    _no_split_modules: ClassVar[list[str]] = ["ContinuumGPTNeoXLayer"]
    backbone_class = ContinuumGPTNeoXModel


@strict
class ContinuumGPT2Config(ContinuumConfigMixin, GPT2Config):
    """A GPT-2 config with levels."""

    model_type = "continuum_gpt2"

    continuum_levels: list[dict] | None = None
    continuum_layers: list[int] | None = None
    memory_layers: dict[str, dict] | None = None

    @property
    def mlp_width(self) -> int:
        """Hidden units of every MLP."""
        return 4 * self.hidden_size if self.n_inner is None else self.n_inner


class ContinuumGPT2MLP(PlainContinuumMLP, GPT2MLP):
    """GPT-2's MLP with levels."""

    parts: ClassVar[dict[str, str]] = {"up": "c_fc", "down": "c_proj"}


class ContinuumGPT2Block(ContinuumDecoderLayer, GPT2Block):
    """GPT-2's decoder layer with levels."""


class ContinuumGPT2Model(ContinuumBackbone, GPT2Model):
    """GPT-2 with levels, without its output layer."""

    config_class = ContinuumGPT2Config
    _no_split_modules: ClassVar[list[str]] = ["ContinuumGPT2Block"]
    layers_name = "h"
    layer_class = ContinuumGPT2Block
    mlp_class = ContinuumGPT2MLP
    attention_name = "attn"


class ContinuumGPT2LMHeadModel(ContinuumCausalLM, GPT2LMHeadModel):
    """GPT-2 with levels."""

    config_class = ContinuumGPT2Config
    _no_split_modules: ClassVar[list[str]] = ["ContinuumGPT2Block"]
    backbone_class = ContinuumGPT2Model


FAMILIES: dict[type[PreTrainedModel], type[PreTrainedModel]] = {
    LlamaForCausalLM: ContinuumLlamaForCausalLM,
    Qwen2ForCausalLM: ContinuumQwen2ForCausalLM,
    Qwen3ForCausalLM: ContinuumQwen3ForCausalLM,
    GPTNeoXForCausalLM: ContinuumGPTNeoXForCausalLM,
    GPT2LMHeadModel: ContinuumGPT2LMHeadModel,
}
"""The language model of each family, and what it is converted to."""


def register_families() -> None:
    """Make the auto classes of transformers know every converted model; twice is harmless."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    for converted in FAMILIES.values():
        config: type[PreTrainedConfig] = converted.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, converted.backbone_class, exist_ok=True)
        AutoModelForCausalLM.register(config, converted, exist_ok=True)
