"""Layers of language models: token mixers and what surrounds them. All carry their state the same way.

Every layer is called as ``y, state = layer(x, state=None, mask=None, output_state=False)``,
with ``x [B, T, d]``, the state after the tokens before (``None`` at the start), and ``mask [B, T]``, True at
real tokens.
"""

from nl_models.layers.attention import Attention
from nl_models.layers.continuum import ContinuumMemory, LevelConfig
from nl_models.layers.gated_delta_net import GatedDeltaNet
from nl_models.layers.self_modifying_titans import SelfModifyingTitans
from nl_models.layers.short_convolution import ShortConvolution
from nl_models.layers.state import (
    AttentionState,
    detach_state,
    join_states,
    load_state,
    save_state,
    select_state,
)
from nl_models.layers.titans import Titans

__all__ = [
    "Attention",
    "AttentionState",
    "ContinuumMemory",
    "GatedDeltaNet",
    "LevelConfig",
    "SelfModifyingTitans",
    "ShortConvolution",
    "Titans",
    "detach_state",
    "join_states",
    "load_state",
    "save_state",
    "select_state",
]
