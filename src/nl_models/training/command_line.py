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

_MAPPING = "model_options"


def with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter ``overrides`` of a typer command by one option per field of the config.

    Options not given on the command line are absent from ``overrides``, so that they can come from a file.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "overrides"]
    fields = dataclasses.fields(TrainConfig)
    hints = typing.get_type_hints(TrainConfig)
    generated, panel = [], ""
    for field in fields:
        panel = PANELS.get(field.name, panel)
        generated.append(_parameter(field, hints[field.name], panel))

    def wrapped(**values: typing.Any) -> None:
        overrides = {field.name: values.pop(field.name) for field in fields}
        overrides[_MAPPING] = _pairs(overrides[_MAPPING]) or None
        given = {name: value for name, value in overrides.items() if value is not None}
        command(**values, overrides=given)

    wrapped.__name__ = command.__name__
    wrapped.__doc__ = command.__doc__
    wrapped.__signature__ = signature.replace(parameters=own + generated)
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in own + generated}
    return wrapped


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


def _parameter(field: dataclasses.Field, hint: typing.Any, panel: str) -> inspect.Parameter:
    name = f"--{'model-option' if field.name == _MAPPING else field.name.replace('_', '-')}"
    if hint is bool and panel == "Execution":
        name += f"/--no-{field.name}"  # another machine may have to take back what the run was begun with
    text = field.metadata["help"]
    default = None if field.default is dataclasses.MISSING else field.default
    option = typer.Option(
        name,
        help=text if default in (None, False) else f"{text} Default: {default}.",
        rich_help_panel=panel,
        # The real default is the config's; None here means "not given".
        show_default=False,
    )
    kind = list[str] | None if field.name == _MAPPING else hint | None
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=typing.Annotated[kind, option],
    )


def _pairs(given: list[str] | None) -> dict[str, object]:
    """``["a=1", "b=text"]`` → ``{"a": 1, "b": "text"}``."""
    options: dict[str, object] = {}
    for pair in given or []:
        name, equals, text = pair.partition("=")
        if not (name and equals):
            fail(f"--model-option: expected NAME=VALUE, got {pair!r}")
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    return options
