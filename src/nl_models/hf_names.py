"""The names that transformers has for the cache: ``cache`` since 5.24, ``past_key_values`` before.

Models of this package take it by each of these names, and their outputs have it under both, with every
supported transformers. Inside this package it is ``cache``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    CausalLMOutputWithPast,
)

CACHE_NAMES = ("cache", "past_key_values")
"""What an output has the cache under, newest name first."""

ARGUMENT_NAMES = (*CACHE_NAMES, "cache_params", "layer_past")
"""What a module may be given the cache by."""

_FIELDS = {field.name for field in fields(BaseModelOutputWithPast)}
CACHE_NAME: str = next(name for name in CACHE_NAMES if name in _FIELDS)
"""The installed transformers' own name: for its functions, and for the constructors of its outputs."""


def name_cache(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """``arguments`` with the cache, under whichever name it came, as ``name``.

    Raises:
        ValueError: several names have a cache.
        TypeError: a cache under a name that is none of :data:`ARGUMENT_NAMES`; it would be ignored silently.
    """
    given = [n for n in ARGUMENT_NAMES if arguments.get(n) is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]}: names the same argument as {', '.join(given[1:])}; pass one of them")
    rest = {key: value for key, value in arguments.items() if key not in ARGUMENT_NAMES}
    unknown = [key for key, value in rest.items() if isinstance(value, Cache)]
    if unknown:
        raise TypeError(f"{unknown[0]}: a cache comes by one of the names {ARGUMENT_NAMES}")
    if given:
        rest[name] = arguments[given[0]]
    return rest


def either_cache_name(function: Callable, name: str = "cache") -> Callable:
    """Let ``function``, which takes the cache as ``name``, take it by any name, and its output have both.

    ``inspect.signature`` goes on to show the parameters of ``function``.
    """

    @functools.wraps(function)
    def renaming(*args: Any, **kwargs: Any) -> Any:
        return _with_both_names(function(*args, **name_cache(kwargs, name)))

    return renaming


def _with_both_names(output: Any) -> Any:
    both = _BOTH_NAMES.get(type(output))
    if both is None:
        return output
    return both(**{field.name: getattr(output, field.name) for field in fields(output)})


class _BothCacheNames:
    """The cache under the name that the installed transformers does not have for it."""


for _name in CACHE_NAMES:
    if _name != CACHE_NAME:
        setattr(_BothCacheNames, _name, property(lambda output: getattr(output, CACHE_NAME)))


class BackboneOutput(_BothCacheNames, BaseModelOutputWithPast):
    """Of a backbone."""


class CrossBackboneOutput(_BothCacheNames, BaseModelOutputWithPastAndCrossAttentions):
    """Of a backbone of GPT-2."""


class CausalOutput(_BothCacheNames, CausalLMOutputWithPast):
    """Of a language model."""


class CrossCausalOutput(_BothCacheNames, CausalLMOutputWithCrossAttentions):
    """Of a language model of GPT-2."""


class GenerateOutput(_BothCacheNames, GenerateDecoderOnlyOutput):
    """Of ``generate``."""


class GenerateBeamOutput(_BothCacheNames, GenerateBeamDecoderOnlyOutput):
    """Of ``generate`` with beams."""


_BOTH_NAMES = {
    output.__mro__[2]: output
    for output in (
        BackboneOutput,
        CrossBackboneOutput,
        CausalOutput,
        CrossCausalOutput,
        GenerateOutput,
        GenerateBeamOutput,
    )
}
