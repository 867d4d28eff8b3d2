"""Command-line options made from the fields of :class:`TrainConfig`, so that the two cannot drift apart."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import json
import sys
import typing
from collections.abc import Callable, Iterator

import typer
from rich.console import Console
from rich.markup import escape

from nl_models.training.config import PANELS, TrainConfig

OtherModel = typing.Annotated[
    bool,
    typer.Option("--allow-other-model", help="Use a memory that was made with other weights of the model."),
]


def with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter ``overrides`` of a typer command by one option per field of the config.

    Options not given on the command line are absent from ``overrides``, so that they can come from a file.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "overrides"]
    hints, panel, generated = typing.get_type_hints(TrainConfig), "", []
    for field in dataclasses.fields(TrainConfig):
        panel = PANELS.get(field.name, panel)
        name, kind, text = f"--{field.name.replace('_', '-')}", hints[field.name], field.metadata["help"]
        if kind is dict:
            name, kind = name.removesuffix("s"), list[str]
        elif kind is bool and panel == "Execution":
            name += f"/--no-{field.name}"  # another machine may have to take back what the run was begun with
        elif field.default not in (None, False):
            text += f" Default: {field.default}."
        # The real default is the config's; None here means "not given".
        option = typer.Option(name, help=text, rich_help_panel=panel, show_default=False)
        annotation = typing.Annotated[kind | None, option]
        generated.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )

    def wrapped(**values: typing.Any) -> None:
        given = {parameter.name: values.pop(parameter.name) for parameter in generated}
        # What may be given several times is an empty list where it is not.
        given = {name: value for name, value in given.items() if value not in (None, [])}
        if "model_options" in given:
            given["model_options"] = dict(map(_pair, given["model_options"]))
        command(**values, overrides=given)

    wrapped.__name__ = command.__name__
    wrapped.__doc__ = command.__doc__
    wrapped.__signature__ = signature.replace(parameters=own + generated)
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in own + generated}
    return wrapped


def _pair(text: str) -> tuple[str, object]:
    """``"a=1"`` as ``("a", 1)``; a value that is no JSON is text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        fail(f"--model-option: expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@contextlib.contextmanager
def explained_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Within the block, or in the command so decorated, bad input and what the disk refuses are one line.

    Args:
        kinds: further exceptions whose text says all.
    """
    try:
        yield
    except (ValueError, *kinds) as error:
        fail(error)
    except OSError as error:
        fail(_told(error))


_REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT): "free some space, or choose a place on another disk",
    (errno.EFBIG,): "choose a place on a disk that takes larger files",
    (errno.ENOTDIR,): "choose another place",
    (errno.EACCES, errno.EPERM, errno.EROFS): "choose a place that you may write to",
}


def _told(error: OSError) -> str:
    """What the system said of which file, and what to do about it."""
    where = f"{error.filename}: " if error.filename else ""
    remedies = (f"; {remedy}" for numbers, remedy in _REMEDIES.items() if error.errno in numbers)
    return f"{where}{error.strerror or error}{next(remedies, '')}"


def fail(message: object) -> typing.NoReturn:
    """Print an error for the user and leave with status 2, without a traceback."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(str(message))}", highlight=False, soft_wrap=True)
    sys.exit(2)


def token_count(name: str, text: str) -> int:
    """``512`` or ``16K`` as a number of tokens; K and M are 1024 and 1024².

    Raises:
        ValueError: something else; ``name`` is the option's.
    """
    factor = {"K": 2**10, "M": 2**20}.get(text[-1:].upper(), 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.isdigit() or int(digits) < 1:
        raise ValueError(f"{name}: expected numbers such as 512 or 16K, got {text!r}")
    return int(digits) * factor
