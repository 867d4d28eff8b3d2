"""Small random models of every family that can be converted."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from nl_models.surgery import FastWeights

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(intermediate_size=24, num_key_value_heads=1, mlp_bias=True, **SIZES),
    "qwen2": Qwen2Config(intermediate_size=24, num_key_value_heads=1, **SIZES),
    "qwen3": Qwen3Config(intermediate_size=24, num_key_value_heads=1, head_dim=8, **SIZES),
    "gpt_neox": GPTNeoXConfig(intermediate_size=24, **SIZES),
    "gpt2": GPT2Config(n_inner=24, **SIZES),
}
LEVELS = ({"fraction": 0.25, "chunk_size": 4}, {"fraction": 0.25, "chunk_size": 8})


def make_model(family: str, dtype: torch.dtype = torch.float32):
    """A model of ``family`` in which every parameter matters: biases and norms too are random."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def random_fast_weights(model, batch_size: int, scale: float = 0.1) -> FastWeights:
    """Fast weights that differ between sequences."""
    generator = torch.Generator().manual_seed(1)
    return model.initial_fast_weights(batch_size).map(
        lambda t: scale * torch.randn(t.shape, dtype=t.dtype, generator=generator)
    )


def with_weights_of(model, fast_weights: FastWeights, row: int):
    """A copy of ``model`` whose parameters hold the fast weights of one sequence."""
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for layer, fast in zip(merged.base_model.decoder_layers(), fast_weights.layers):
            if fast is None:
                continue
            for part, name in layer.mlp.parts.items():
                module, added = layer.mlp.get_submodule(name), getattr(fast, part)[row]
                # GPT-2's Conv1D keeps its weight as [in, out].
                weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T
                weight[: added.shape[0], : added.shape[1]] += added
    return merged
