"""Learning from a stream while reading it: next-token steps of every level at its own frequency."""

from nl_models.continual.learner import ContinuumLearner, LevelDistance
from nl_models.continual.memory_file import MemoryFileError
from nl_models.continual.meta_learning import next_token_loss_through_steps
from nl_models.continual.report import LearningReport
from nl_models.continual.rules import StepRule

__all__ = [
    "ContinuumLearner",
    "LearningReport",
    "LevelDistance",
    "MemoryFileError",
    "StepRule",
    "next_token_loss_through_steps",
]
