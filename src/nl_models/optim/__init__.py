"""Optimisers that orthogonalise the momentum of matrices and leave the rest to AdamW."""

from nl_models.optim.groups import split_parameters
from nl_models.optim.m3 import M3
from nl_models.optim.muon import Muon

__all__ = ["M3", "Muon", "split_parameters"]
