"""Every option of a training run, typed and checked, from code, a JSON file or the command line."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from nl_models.data.prepare import DataOptions

OPTIMIZERS = ("adamw", "muon", "m3", "delta_momentum", "deep_momentum")
MODELS = {
    "hope": "self_modifying_titans",
    "titans": "titans",
    "gated_delta_net": "gated_delta_net",
    "attention": "full_attention",
}
"""The layer type that each kind of model is made of."""

PANELS = {
    "corpus": "Data",
    "model": "Model",
    "steps": "Optimisation",
    "evaluate_every": "Evaluation and checkpoints",
    "device": "Execution",
}
"""What the command line shows together: the options from each of these on."""


# What an option may be, in words and as a test.
Expected = tuple[str, Callable[[typing.Any], bool]]
COUNT: Expected = "at least 1", lambda value: value >= 1
NOT_NEGATIVE: Expected = "at least 0", lambda value: value >= 0
POSITIVE: Expected = "a positive number", lambda value: 0 < value < math.inf
MEAN_DECAY: Expected = "a number in [0, 1)", lambda value: 0 <= value < 1
SHARE: Expected = "a share in [0, 1]", lambda value: 0 <= value <= 1


def one_of(*choices: str) -> Expected:
    return f"one of {choices}", choices.__contains__


def _option(default: object, text: str, expected: Expected | None = None) -> typing.Any:
    return field(default=default, metadata={"help": text, "expected": expected})


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Field metadata holds the help text of the command line."""

    corpus: str | None = _option(
        None, "Folder of UTF-8 text files. Without it: Python's own library and documentation topics."
    )
    text_column: str | None = _option(
        None,
        "Column with the text where the corpus is a dataset that Hugging Face datasets reads, as a stream: a "
        "folder of parquet, JSON-lines or CSV files, or a name on the Hub.",
    )
    tokenizer: str = _option(
        "bpe", "'bytes', 'bpe' trained on the training files, or the folder of a ready one."
    )
    vocab_size: int = _option(4096, "Ids of a BPE to train.")
    validation_fraction: float = _option(0.05, "Share of the files held out for validation.")

    model: str = _option("hope", f"One of {', '.join(MODELS)}.", one_of(*MODELS))
    hidden_size: int = _option(256, "Width of the residual stream.", COUNT)
    layers: int = _option(4, "Blocks.", COUNT)
    heads: int = _option(4, "Heads of the memory or attention.", COUNT)
    model_options: dict[str, typing.Any] = field(
        default_factory=dict,
        metadata={"help": "Any other field of HopeConfig as NAME=VALUE (JSON value). Repeatable."},
    )

    init_from: str | None = _option(
        None, "Folder of a run, a checkpoint or a saved model whose weights to begin with."
    )

    steps: int = _option(1000, "Optimiser steps; a continued run may be given more.", COUNT)
    batch_size: int = _option(8, "Windows in one forward pass, of all processes together.", COUNT)
    sequence_length: int = _option(512, "Tokens in a window.", ("at least 2", lambda value: value >= 2))
    gradient_accumulation: int = _option(1, "Forward passes in one optimiser step.", COUNT)
    carry_state: bool = _option(
        False,
        "Read documents in order, a window a step, and carry the state from each window to the next "
        "(truncated backpropagation through time); every row of a batch is a stream of its own.",
    )
    optimizer: str = _option(
        "adamw",
        f"One of {', '.join(OPTIMIZERS)}; all but 'adamw' are for hidden matrices, AdamW has the rest.",
        one_of(*OPTIMIZERS),
    )
    learning_rate: float = _option(2e-3, "Peak learning rate.", POSITIVE)
    final_learning_rate: float = _option(0.1, "Last learning rate, as a share of the peak.", SHARE)
    warmup_steps: int = _option(
        100,
        "Steps of linear warm-up, on the command line at most a tenth of all; a cosine follows.",
        NOT_NEGATIVE,
    )
    decay_steps: int | None = _option(
        None, "Step at which the cosine ends; the last rate stays. Default: the last step.", COUNT
    )
    weight_decay: float = _option(
        0.1, "Decoupled decay of matrices (never of norms, biases, gates, embeddings).", NOT_NEGATIVE
    )
    beta1: float = _option(0.9, "AdamW's decay of the first moment.", MEAN_DECAY)
    beta2: float = _option(0.95, "AdamW's decay of the second moment.", MEAN_DECAY)
    clip_norm: float = _option(1.0, "Gradients are scaled down to this global norm.", POSITIVE)
    gradient_checkpointing: bool = _option(
        False, "Recompute each block in the backward pass: less memory, more time."
    )
    seed: int = _option(0, "Of the initial weights and of the order of the data.", NOT_NEGATIVE)

    evaluate_every: int = _option(100, "Steps between evaluations (also after the last step).", COUNT)
    validation_windows: int = _option(64, "Windows of the fixed validation set.", COUNT)
    position_length: int | None = _option(
        None,
        "Tokens of held-out text by whose position the loss is measured after the last step; 0: none. "
        "Default: 16 windows.",
    )
    checkpoint_every: int = _option(100, "Steps between checkpoints (also after the last step).", COUNT)
    keep_checkpoints: int = _option(2, "Newest checkpoints to keep, besides the best.", COUNT)

    track: str | None = _option(
        None, "Tracker beside metrics.jsonl, of those that accelerate knows: 'tensorboard', 'wandb', …."
    )

    device: str = _option("auto", "'auto' (CUDA when there), 'cpu', 'cuda' or 'cuda:N'.")
    precision: str = _option(
        "auto",
        "'fp32' or 'bf16' (autocast); 'auto': bf16 on CUDA, fp32 elsewhere.",
        one_of("auto", "fp32", "bf16"),
    )
    compile: bool = _option(False, "Run the model under torch.compile.")
    fsdp: bool = _option(False, "Shard weights and optimiser over the processes (FSDP2); DDP without it.")
    mesh: str | None = _option(
        None,
        "How processes share the work, such as data=2,sequence=2: 'data' of them the windows of a batch, "
        "'sequence' each window, 'heads' the heads of each layer. Default: all of them the windows.",
    )
    threads: int | None = _option(None, "CPU threads; PyTorch's choice if not given.", COUNT)

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value, expected = getattr(self, option.name), option.metadata.get("expected")
            if expected is not None and value is not None and not expected[1](value):
                raise ValueError(f"{option.name}: expected {expected[0]}, got {value!r}")
        if self.position_length is not None and 0 != self.position_length < self.sequence_length:
            raise ValueError(
                "position_length: expected 0 (none) or at least "
                f"sequence_length = {self.sequence_length}, got {self.position_length!r}"
            )
        if self.warmup_steps >= self.steps and self.warmup_steps > 0:
            raise ValueError(
                f"warmup_steps: expected fewer than steps = {self.steps}, got {self.warmup_steps}"
            )
        if self.text_column is not None and self.corpus is None:
            raise ValueError("text_column: expected together with corpus, the dataset that has the column")

    @property
    def data_options(self) -> DataOptions:
        names = (option.name for option in dataclasses.fields(DataOptions))
        return DataOptions(**{name: getattr(self, name) for name in names})

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation * self.sequence_length

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


# What may differ between a run and its continuation, as it does not define the result.
FREE_ON_RESUME = frozenset(
    {"device", "threads", "fsdp", "mesh", "compile", "gradient_checkpointing", "track", "checkpoint_every"}
    | {"keep_checkpoints", "position_length"}
)


def config_from_dict(values: object, *, source: str) -> TrainConfig:
    """Build a config from JSON values, with ``source`` named in errors.

    Raises:
        ValueError: not an object, unknown name (the closest known one is suggested), or a bad value.
    """
    checked = typed_options(values, source=source)
    try:
        return TrainConfig(**checked)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def typed_options(values: object, *, source: str) -> dict[str, typing.Any]:
    """Some options from JSON values: names and types are checked, and not yet whether they go together.

    Raises:
        ValueError: not an object, unknown name (the closest known one is suggested), or another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected a JSON object of options, got {type(values).__name__}")
    hints = typing.get_type_hints(TrainConfig)
    known = {option.name: option for option in dataclasses.fields(TrainConfig)}
    checked = {}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"
            raise ValueError(f"{source}: unknown option {name!r}{hint}")
        kinds = typing.get_args(hints[name]) if isinstance(hints[name], types.UnionType) else (hints[name],)
        kinds = [typing.get_origin(kind) or kind for kind in kinds]
        if type(value) is int and float in kinds:
            value = float(value)
        # Exactly of the type, as a bool is an int, too.
        if type(value) not in kinds:
            raise ValueError(f"{source}: {name}: expected {known[name].type}, got {value!r}")
        checked[name] = value
    return checked


def load_config(path: str | Path) -> TrainConfig:
    """Read a config from a JSON file.

    Raises:
        ValueError: the file cannot be read, is not JSON, or holds unknown or bad options.
    """
    return config_from_dict(read_options(path), source=str(path))


def read_options(path: str | Path) -> dict[str, typing.Any]:
    """The options in a file, JSON or, by its name, YAML; unchecked."""
    is_yaml = Path(path).suffix in (".yaml", ".yml")
    try:
        text = Path(path).read_text()
        return yaml.safe_load(text) if is_yaml else json.loads(text)
    except OSError as error:
        raise ValueError(f"config: cannot read {path} ({error.strerror})") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"config: {path} is not {'YAML' if is_yaml else 'JSON'} ({error})") from error


def merged_options(*sources: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """Options of which those of later sources win; ``model_options`` do so one by one."""
    merged: dict[str, typing.Any] = {}
    for options in sources:
        both = {**merged.get("model_options", {}), **options.get("model_options", {})}
        merged |= {**options, **({"model_options": both} if both else {})}
    return merged
