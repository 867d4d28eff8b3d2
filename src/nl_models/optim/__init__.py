"""Optimisers for the hidden matrices of a model, which leave the rest to AdamW."""

from nl_models.optim.deep_momentum import DeepMomentum
from nl_models.optim.delta_gradient_descent import DeltaGradientDescent
from nl_models.optim.delta_momentum import DeltaMomentum
from nl_models.optim.groups import split_parameters
from nl_models.optim.m3 import M3
from nl_models.optim.multi_frequency import MultiFrequency
from nl_models.optim.muon import Muon

__all__ = [
    "M3",
    "DeepMomentum",
    "DeltaGradientDescent",
    "DeltaMomentum",
    "MultiFrequency",
    "Muon",
    "split_parameters",
]
