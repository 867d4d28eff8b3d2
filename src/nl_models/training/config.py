"""Every option of a training run, typed and checked, from code, a JSON file or the command line."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import typer
import yaml

from nl_models.data.prepare import DataOptions, option

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
SEED: Expected = "an integer of at least 0 and 63 bits at most", lambda value: 0 <= value < 2**63
POSITIVE: Expected = "a positive number", lambda value: 0 < value < math.inf
MEAN_DECAY: Expected = "a number in [0, 1)", lambda value: 0 <= value < 1
SHARE: Expected = "a share in [0, 1]", lambda value: 0 <= value <= 1


def one_of(*choices: str) -> Expected:
    return f"one of {choices}", choices.__contains__


@dataclass(frozen=True)
class TrainConfig(DataOptions):
    """A training run. Field metadata holds the help text of the command line, and what a value may be.

    Raises:
        ValueError: another type, or a value that the option cannot have, alone or with the others.
    """

    model: str = option("hope", f"One of {', '.join(MODELS)}.", one_of(*MODELS))
    hidden_size: int = option(256, "Width of the residual stream.", COUNT)
    layers: int = option(4, "Blocks.", COUNT)
    heads: int = option(4, "Heads of the memory or attention.", COUNT)
    model_options: dict = field(
        default_factory=dict,
        metadata={"help": "Any other field of HopeConfig as NAME=VALUE (JSON value). Repeatable."},
    )

    init_from: str | None = option(
        None, "Folder of a run, a checkpoint or a saved model whose weights to begin with."
    )

    steps: int = option(1000, "Optimiser steps; a continued run may be given more.", COUNT)
    batch_size: int = option(8, "Windows in one forward pass, of all processes together.", COUNT)
    sequence_length: int = option(512, "Tokens in a window.", ("at least 2", lambda value: value >= 2))
    gradient_accumulation: int = option(1, "Forward passes in one optimiser step.", COUNT)
    carry_state: bool = option(
        False,
        "Read documents in order, a window a step, and carry the state from each window to the next "
        "(truncated backpropagation through time); every row of a batch is a stream of its own.",
    )
    optimizer: str = option(
        "adamw",
        f"One of {', '.join(OPTIMIZERS)}; all but 'adamw' are for hidden matrices, AdamW has the rest.",
        one_of(*OPTIMIZERS),
    )
    learning_rate: float = option(2e-3, "Peak learning rate.", POSITIVE)
    final_learning_rate: float = option(0.1, "Last learning rate, as a share of the peak.", SHARE)
    warmup_steps: int = option(
        100,
        "Steps of linear warm-up, on the command line at most a tenth of all; a cosine follows.",
        NOT_NEGATIVE,
    )
    decay_steps: int | None = option(
        None, "Step at which the cosine ends; the last rate stays. Default: the last step.", COUNT
    )
    weight_decay: float = option(
        0.1, "Decoupled decay of matrices (never of norms, biases, gates, embeddings).", NOT_NEGATIVE
    )
    beta1: float = option(0.9, "AdamW's decay of the first moment.", MEAN_DECAY)
    beta2: float = option(0.95, "AdamW's decay of the second moment.", MEAN_DECAY)
    clip_norm: float = option(1.0, "Gradients are scaled down to this global norm.", POSITIVE)
    gradient_checkpointing: bool = option(
        False, "Recompute each block in the backward pass: less memory, more time."
    )
    seed: int = option(0, "Of the initial weights and of the order of the data.", SEED)

    evaluate_every: int = option(100, "Steps between evaluations (also after the last step).", COUNT)
    validation_windows: int = option(64, "Windows of the fixed validation set.", COUNT)
    position_length: int | None = option(
        None,
        "Tokens of held-out text by whose position the loss is measured after the last step; 0: none. "
        "Default: 16 windows.",
    )
    checkpoint_every: int = option(100, "Steps between checkpoints (also after the last step).", COUNT)
    keep_checkpoints: int = option(2, "Newest checkpoints to keep, besides the best.", COUNT)

    track: str | None = option(
        None, "Tracker beside metrics.jsonl, of those that accelerate knows: 'tensorboard', 'wandb', …."
    )

    device: str = option("auto", "'auto' (CUDA when there), 'cpu', 'cuda' or 'cuda:N'.")
    precision: str = option(
        "auto",
        "'fp32' or 'bf16' (autocast); 'auto': bf16 on CUDA, fp32 elsewhere.",
        one_of("auto", "fp32", "bf16"),
    )
    compile: bool = option(False, "Run the model under torch.compile.")
    fsdp: bool = option(False, "Shard weights and optimiser over the processes (FSDP2); DDP without it.")
    mesh: str | None = option(
        None,
        "How processes share the work, such as data=2,sequence=2: 'data' of them the windows of a batch, "
        "'sequence' each window, 'heads' the heads of each layer. Default: all of them the windows.",
    )
    threads: int | None = option(None, "CPU threads; PyTorch's choice if not given.", COUNT)

    def __post_init__(self) -> None:
        check_options(vars(self))
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
    def tokens_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation * self.sequence_length


# What may differ between a run and its continuation, as it does not define the result.
FREE_ON_RESUME = frozenset(
    {"device", "threads", "fsdp", "mesh", "compile", "gradient_checkpointing", "track", "checkpoint_every"}
    | {"keep_checkpoints", "position_length"}
)


def check_options(values: Mapping[str, typing.Any], source: str = "") -> None:
    """Raise ``ValueError`` at an unknown name (the closest is suggested), another type or a bad value."""
    known = {each.name: each for each in dataclasses.fields(TrainConfig)}
    hints = typing.get_type_hints(TrainConfig)
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"
            raise ValueError(f"{source}unknown option {name!r}{hint}")
        kinds = typing.get_args(hints[name]) or (hints[name],)
        # Exactly of the type, as a bool is an int, too; a whole number may stand for any number.
        if type(value) not in (*kinds, *((int,) if float in kinds else ())):
            raise ValueError(f"{source}{name}: expected {known[name].type}, got {value!r}")
        expected = known[name].metadata.get("expected")
        if expected is not None and value is not None and not expected[1](value):
            raise ValueError(f"{source}{name}: expected {expected[0]}, got {value!r}")


def load_config(path: str | Path) -> TrainConfig:
    """Read a config from a file.

    Raises:
        ValueError: as :func:`read_options`, or options that do not go together.
    """
    values = read_options(path)
    try:
        return TrainConfig(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_options(path: str | Path) -> dict[str, typing.Any]:
    """The options in a file, JSON or, by its name, YAML.

    Raises:
        ValueError: it cannot be read, is neither, or holds unknown or bad options.
    """
    is_yaml = Path(path).suffix in (".yaml", ".yml")
    try:
        text = Path(path).read_text()
        values = yaml.safe_load(text) if is_yaml else json.loads(text)
    except OSError as error:
        raise ValueError(f"config: cannot read {path} ({error.strerror})") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"config: {path} is not {'YAML' if is_yaml else 'JSON'} ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object of options, got {type(values).__name__}")
    check_options(values, source=f"{path}: ")
    return values


def merged_options(*sources: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """Options of which those of later sources win; ``model_options`` do so one by one."""
    merged: dict[str, typing.Any] = {}
    for options in sources:
        both = {**merged.get("model_options", {}), **options.get("model_options", {})}
        merged |= {**options, **({"model_options": both} if both else {})}
    return merged


def with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter ``overrides`` of a typer command by one option per field of the config.

    Options not given on the command line are absent from ``overrides``, so that they can come from a file.
    """
    signature = inspect.signature(command, eval_str=True)
    parameters = {name: value for name, value in signature.parameters.items() if name != "overrides"}
    hints, panel = typing.get_type_hints(TrainConfig), ""
    for each in dataclasses.fields(TrainConfig):
        panel = PANELS.get(each.name, panel)
        name, kind, text = f"--{each.name.replace('_', '-')}", hints[each.name], each.metadata["help"]
        if kind is dict:
            name, kind = name.removesuffix("s"), list[str]
        elif kind is bool and panel == "Execution":
            name += f"/--no-{each.name}"  # another machine may have to take back what the run was begun with
        elif each.default not in (None, False):
            text += f" Default: {each.default}."
        # The real default is the config's; None here means "not given".
        shown = typer.Option(name, help=text, rich_help_panel=panel, show_default=False)
        parameters[each.name] = inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=typing.Annotated[kind | None, shown],
        )

    def wrapped(**values: typing.Any) -> None:
        given = {each.name: values.pop(each.name) for each in dataclasses.fields(TrainConfig)}
        # What may be given several times is an empty list where it is not.
        given = {name: value for name, value in given.items() if value not in (None, [])}
        if "model_options" in given:
            given["model_options"] = dict(map(_pair, given["model_options"]))
        command(**values, overrides=given)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__signature__ = signature.replace(parameters=list(parameters.values()))
    wrapped.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return wrapped


def _pair(text: str) -> tuple[str, object]:
    """``"a=1"`` as ``("a", 1)``; a value that is no JSON is text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise typer.BadParameter(f"expected NAME=VALUE, got {text!r}", param_hint="--model-option")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
