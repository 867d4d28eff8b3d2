"""Names that changed: an old one is an error that says the new one, and never without effect."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def check_renamed(given: Iterable[str], names: Mapping[str, str]) -> None:
    """Check that none of the names ``given`` is an old one; ``names`` leads from old to new.

    Raises:
        TypeError: naming both.
    """
    for name in given:
        if name in names:
            raise TypeError(f"{name}: is called {names[name]} since version 0.2")


def check_renamed_value(name: str, value: object, values: Mapping[str, str | None]) -> None:
    """Check that ``value`` of the option ``name`` is no old one; ``values`` leads from old to new.

    Raises:
        ValueError: naming both.
    """
    if isinstance(value, str) and value in values:
        raise ValueError(f"{name}: {value!r} is called {values[value]!r} since version 0.2")


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Of a function whose arguments had other names: ``old="new"``."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            check_renamed(kwargs, names)
            return function(*args, **kwargs)

        return checked

    return decorate


class RenamedAttribute:
    """In the place of an attribute that has another name now: who sets the old one would change nothing."""

    def __init__(self, new: str):
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = name

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise AttributeError(f"{self.old}: is called {self.new} since version 0.2")

    def __set__(self, instance: object, value: object) -> NoReturn:
        self.__get__(instance, type(instance))
