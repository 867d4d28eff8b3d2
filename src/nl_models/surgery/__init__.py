"""Conversion of pre-trained transformers into models with memories, without a change of their outputs."""

from nl_models.surgery.cache import ContinuumCache
from nl_models.surgery.convert import convert_attention, convert_mlp_to_continuum
from nl_models.surgery.families import register_families
from nl_models.surgery.fast_weights import FastWeights, LayerFastWeights
from nl_models.surgery.levels import DEFAULT_LEVELS, ConversionLevel

__all__ = [
    "DEFAULT_LEVELS",
    "ContinuumCache",
    "ConversionLevel",
    "FastWeights",
    "LayerFastWeights",
    "convert_attention",
    "convert_mlp_to_continuum",
    "register_families",
]
