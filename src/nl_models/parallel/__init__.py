"""One model over several ranks: a piece of each sequence on each, or some of the heads."""

from nl_models.parallel.exchange import SequenceRanks
from nl_models.parallel.heads import parallelize_heads
from nl_models.parallel.layers import over_ranks
from nl_models.parallel.model import SequenceParallel

__all__ = ["SequenceParallel", "SequenceRanks", "over_ranks", "parallelize_heads"]
