"""Memories in the place of softmax attention: the modules, their projections, and how they are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from nl_kernels import MemoryRule
from nl_models.hf_names import either_cache_name
from nl_models.layers.gated_delta_net import GatedDeltaNet
from nl_models.layers.packing import Packing
from nl_models.layers.self_modifying_titans import SelfModifyingTitans
from nl_models.surgery.parts import matrix_of

MIXER_KINDS = ("self_modifying_titans", "delta_memory")


class MemoryMixer(nn.Module):
    """A memory that is called as the attention of its family is.

    Its state is carried by the cache: :class:`nl_models.surgery.ContinuumCache` has a layer for it. Positions
    and causal masks are no concern of a memory; padding writes nothing.

    Args:
        config: of the converted model.
        layer_index: of the decoder layer.
        kind: one of :data:`MIXER_KINDS`.
        chunk_size: of the memories of ``"self_modifying_titans"``.
        error_at: of their rule; configs older than this option have none, and errors at the snapshot.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        layer_index: int,
        *,
        kind: str,
        chunk_size: int | None = None,
        error_at: str = "snapshot",
    ):
        super().__init__()
        self.layer_index = layer_index
        sizes = (config.hidden_size, config.num_attention_heads)
        if kind == "self_modifying_titans":
            rule = MemoryRule(error_at=error_at)
            # The projections are those of an attention, which had no activation behind them.
            self.memory = SelfModifyingTitans(*sizes, chunk_size=chunk_size, rule=rule, values="unit")
        else:
            self.memory = GatedDeltaNet(*sizes)

    @either_cache_name
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: object = None,
        cache: Cache | None = None,
        padding_mask: torch.Tensor | None = None,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """``hidden_states [B, T, d]`` to the same, and no attention weights.

        ``padding_mask [B, T]`` is True at real tokens. The state after the tokens replaces that in the cache.
        ``packing`` is of sequences in one row that do not see each other; there is no cache then.
        """
        if packing is not None:
            return packing.pack(self.memory(packing.unpack(hidden_states), None, packing.mask)[0]), None
        carried = None if cache is None else cache.layers[self.layer_index]
        y, state = self.memory(
            hidden_states, None if carried is None else carried.state, padding_mask, carried is not None
        )
        if carried is not None:
            carried.commit(state, hidden_states.shape[1], padding_mask)
        return y, None


def projections(
    attention: nn.Module, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """The weights ``[d, d]`` of an attention's query, key, value and output projections, where they have one.

    Keys and values that several heads share are repeated for each. A projection of another width is left out.
    ``dtype`` and ``device`` are those of the model (see :func:`nl_models.surgery.parts.matrix_of`).

    Raises:
        TypeError: a module without the projections of a known attention.
    """
    heads, width = config.num_attention_heads, config.hidden_size

    def matrix(name: str) -> torch.Tensor:
        if not isinstance(getattr(attention, name, None), nn.Module):
            raise TypeError(
                f"model: expected attention of its family, got {type(attention).__name__} without {name}; "
                "put the family's own module in its place"
            )
        return matrix_of(getattr(attention, name), width, dtype, device).detach()

    if hasattr(attention, "c_attn"):  # GPT-2: one Conv1D [in, out]
        q, k, v = matrix("c_attn").chunk(3)
        found = {"q": q, "k": k, "v": v, "o": matrix("c_proj")}
    elif hasattr(attention, "query_key_value"):  # GPT-NeoX: [heads, (q, k, v), head width]
        fused = matrix("query_key_value").reshape(heads, 3, width // heads, width)
        q, k, v = (fused[:, i].flatten(0, 1) for i in range(3))
        found = {"q": q, "k": k, "v": v, "o": matrix("dense")}
    else:
        found = {"q": matrix("q_proj"), "o": matrix("o_proj")}
        for name in ("k", "v"):
            shared = matrix(f"{name}_proj").unflatten(0, (config.num_key_value_heads, -1))
            repeats = heads // config.num_key_value_heads
            found[name] = shared.repeat_interleave(repeats, dim=0).flatten(0, 1)
    return {name: weight for name, weight in found.items() if weight.shape == (width, width)}


def take_over(mixer: MemoryMixer, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy the projections of an attention into a memory."""
    memory = mixer.memory
    targets = {"q": memory.q_proj, "k": memory.k_proj, "v": memory.v_proj, "o": memory.output.o_proj}
    with torch.no_grad():
        for name, weight in weights.items():
            targets[name].weight.copy_(weight)


def check_kind(kind: object, chunk_size: object) -> None:
    """Raise ``ValueError`` unless there is such a memory with such chunks."""
    if kind not in MIXER_KINDS:
        raise ValueError(f"kind: expected one of {MIXER_KINDS}, got {kind!r}")
    if kind == "self_modifying_titans":
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
            raise ValueError(f"chunk_size: expected an integer of at least 1, got {chunk_size!r}")
    elif chunk_size is not None:
        raise ValueError(f"chunk_size: a {kind} has no chunks, got {chunk_size!r}")
