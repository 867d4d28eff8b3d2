"""How the hidden units of a pre-trained MLP are shared out among levels, and the configs that say so."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from nl_kernels.checks import check_positive_int
from nl_kernels.ops.continuum.state import check_chunk_sizes
from nl_models.remote_code import RemoteCodeConfig
from nl_models.surgery.mixers import check_kind


@dataclass(frozen=True, kw_only=True)
class ConversionLevel:
    """One level of a converted MLP.

    Attributes:
        fraction: share of the MLP's hidden units that belong to this level, more than 0.
        chunk_size: tokens between two steps of their weights; ``None``: they never change.
    """

    fraction: float
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.fraction, bool) or not isinstance(self.fraction, (int, float)):
            raise TypeError(f"fraction: expected a number, got {self.fraction!r}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction: expected more than 0 and at most 1, got {self.fraction}")
        if self.chunk_size is not None:
            check_positive_int("chunk_size", self.chunk_size)


@dataclass(frozen=True)
class LevelUnits:
    """The hidden units ``start <= i < stop`` of an MLP, and the tokens between two steps of their weights."""

    start: int
    stop: int
    chunk_size: int


DEFAULT_LEVELS = (
    ConversionLevel(fraction=1 / 6, chunk_size=32),
    ConversionLevel(fraction=1 / 6, chunk_size=256),
    ConversionLevel(fraction=1 / 6, chunk_size=2048),
)
"""Three levels, and half of every MLP as it was."""


def make_levels(levels: Sequence[ConversionLevel | Mapping]) -> tuple[ConversionLevel, ...]:
    """Levels from themselves or from their options, checked as a whole.

    Raises:
        TypeError: not a sequence of levels or of their options.
        ValueError: no level that steps, an order other than fast to slow with static levels last, chunk sizes
            that are no multiples of the one before, or fractions that sum to more than 1.
    """
    if isinstance(levels, (str, Mapping)) or not isinstance(levels, Sequence):
        raise TypeError(f"levels: expected a sequence of ConversionLevel, got {type(levels).__name__}")
    made = []
    for index, level in enumerate(levels):
        if isinstance(level, Mapping):
            try:
                level = ConversionLevel(**level)
            except TypeError as error:
                names = [field.name for field in fields(ConversionLevel)]
                raise TypeError(f"levels[{index}]: expected {names}, got {sorted(level)}") from error
        if not isinstance(level, ConversionLevel):
            raise TypeError(f"levels[{index}]: expected a ConversionLevel, got {type(level).__name__}")
        made.append(level)
    if not any(level.chunk_size is not None for level in made):
        raise ValueError("levels: expected at least one with a chunk_size, got none")
    check_chunk_sizes([level.chunk_size for level in made])
    total = sum(level.fraction for level in made)
    if total > 1 + 1e-9:
        raise ValueError(f"levels: expected fractions that sum to at most 1, got {total}")
    return tuple(made)


def share_units(levels: Sequence[ConversionLevel], width: int) -> tuple[LevelUnits, ...]:
    """The units of an MLP with ``width`` of them that each stepping level owns; the rest stays static.

    Raises:
        ValueError: a level that would own no unit.
    """
    bounds = [round(width * sum(part.fraction for part in levels[:i])) for i in range(len(levels) + 1)]
    shared = []
    for (start, stop), level in zip(itertools.pairwise(bounds), levels, strict=True):
        if start == stop:
            raise ValueError(f"levels: fraction {level.fraction} of {width} hidden units is none")
        if level.chunk_size is not None:
            shared.append(LevelUnits(start, stop, level.chunk_size))
    return tuple(shared)


class ContinuumConfigMixin(RemoteCodeConfig):
    """What a converted model's config knows beside its family's.

    Subclasses declare the fields ``continuum_levels``, ``continuum_layers`` and ``memory_layers``.
    """

    def __post_init__(self, **kwargs):
        if self.continuum_levels is not None:
            levels = make_levels(self.continuum_levels)
            self.continuum_levels = [asdict(level) for level in levels]
            self.continuum_layers = check_layers("continuum_layers", self.continuum_layers, self)
        if self.memory_layers is not None:
            check_layers("memory_layers", [int(index) for index in self.memory_layers], self)
            for options in self.memory_layers.values():
                check_kind(options.get("kind"), options.get("chunk_size"))
        super().__post_init__(**kwargs)
        if self.continuum_levels is not None:
            self.level_units()

    @classmethod
    def auto_classes(cls) -> dict[str, type]:
        from nl_models.surgery.families import FAMILIES

        model = next(converted for converted in FAMILIES.values() if issubclass(cls, converted.config_class))
        names = {"AutoModel": model.backbone_class, "AutoModelForCausalLM": model}
        return {"AutoConfig": model.config_class, **names}

    @property
    def mlp_width(self) -> int:
        """Hidden units of every MLP."""
        return self.intermediate_size

    def level_units(self) -> tuple[LevelUnits, ...]:
        """The units of each level that steps, fast to slow; empty without any."""
        return (
            share_units(make_levels(self.continuum_levels), self.mlp_width) if self.continuum_levels else ()
        )


def check_layers(name: str, layers: Sequence[int] | None, config: object) -> list[int]:
    """Sorted indices of layers; ``None`` is all of them.

    Raises:
        ValueError: not distinct indices of layers of ``config``, or none.
    """
    count = config.num_hidden_layers
    if layers is None:
        return list(range(count))
    layers = list(layers)
    if not layers or len(set(layers)) != len(layers) or not set(layers) <= set(range(count)):
        raise ValueError(f"{name}: expected distinct indices below {count}, got {layers}")
    return sorted(layers)
