"""One sequence over several ranks, forward and backward."""

from nl_models.parallel.exchange import SequenceRanks
from nl_models.parallel.layers import over_ranks
from nl_models.parallel.model import SequenceParallel

__all__ = ["SequenceParallel", "SequenceRanks", "over_ranks"]
