"""All sizes and choices of a Hope model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from nl_kernels import MemoryRule
from nl_kernels.checks import check_choice, check_positive_int
from nl_kernels.dispatch import IMPLEMENTATIONS, WITH_COMPILED
from nl_kernels.ops.continuum.state import VARIANTS, check_chunk_sizes
from nl_kernels.renamed import RenamedAttribute, check_renamed
from nl_models.hf_names import CACHE_NAME
from nl_models.layers.attention import ATTENTION_IMPLEMENTATIONS
from nl_models.layers.continuum import LevelConfig
from nl_models.layers.self_modifying_titans import choose_values
from nl_models.remote_code import RemoteCodeConfig

PRESETS = {
    name: dict(zip(("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads"), sizes))
    for name, sizes in {
        "tiny": (256, 2, 128, 4),
        "340m": (32_000, 24, 1024, 16),
        "760m": (32_000, 24, 1536, 16),
        "1.3b": (32_000, 24, 2048, 16),
    }.items()
}
"""Vocabulary, layers, width and heads of :meth:`HopeConfig.preset`."""

RENAMED = {f"{part}_implementation": f"{part}_impl" for part in ("memory", "continuum", "attention")}
"""Fields that had another name before version 0.2."""

LAYER_TYPES = ("self_modifying_titans", "titans", "gated_delta_net", "full_attention")


@strict
class HopeConfig(RemoteCodeConfig, PreTrainedConfig):
    """Configuration of :class:`HopeModel`.

    A block is norm → short convolution → token mixer → continuum memory system. ``layer_types`` picks the
    mixer of each layer, so that Hope, its baselines and hybrids of them are configs of the same model.

    Args:
        vocab_size: number of tokens in the vocabulary.
        hidden_size: width of the model.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads of every token mixer; divides ``hidden_size``. Also called ``num_heads``.
        layer_types: the mixer of each layer, of :data:`LAYER_TYPES`; one name is repeated for all layers.
        use_short_convolution: whether a causal depthwise convolution precedes the mixer.
        convolution_window: tokens that it sees.
        rope_theta: base of the rotary frequencies (attention layers).
        attention_output_gate: whether attention has the norm and gate that the memories have.
        attention_impl: ``"sdpa"`` (``None``), ``"flash_attention_2"``, ``"flash_attention_3"`` or
            ``"flex_attention"``; see :class:`nl_models.layers.Attention`.
        memory_hidden_size: hidden width of each memory (Titans layers): the two-layer memories of the paper.
            ``None`` (default) makes them linear, which learns faster at small sizes (docs/defaults.md).
        memory_chunk_size: tokens between the states at which the memory that is read takes its gradients.
            Part of the model, not a tuning knob, as are all chunk sizes.
        memory_generator_chunk_size: the same for the memories that make keys, values and gates
            (self-modifying); default ``memory_chunk_size``. One of the two is a multiple of the other.
        memory_read: ``"snapshot"`` reads the state at the chunk's start, ``"running"`` that after each token.
        memory_rate_max: the largest learning rate, in [0, 2]. At 0 nothing is ever written: every memory
            stays at its learned initial state, the control for what a memory is worth. Above 1 an erase can
            turn the sign of what a key holds, which tracking a state (parity) needs; then it is Gated
            DeltaNet's, too, which has rates up to 1 otherwise.
        memory_rate_bias, memory_retention_bias: initial biases of the gates' logits. Rates near 1
            (a bias of 4) leave the stable region of ``self_modifying_titans`` (docs/defaults.md).
        memory_values: what queries, keys and values of ``self_modifying_titans`` are, "scaled" or "unit": see
            :class:`nl_models.layers.SelfModifyingTitans`. ``None``: scaled for linear memories.
        memory_momentum: whether writes have momentum: a running average, whose decay each token sets. It
            costs about twice the time, and has no Triton kernels.
        memory_rule: options of :class:`nl_kernels.memory_rule.MemoryRule` that differ from its default.
            ``{"momentum": "sum"}`` is momentum as Titans prints it, a sum of writes: chaotic in
            ``self_modifying_titans`` (docs/defaults.md). Models saved before the average existed have it.
            ``{"erase": "none"}`` leaves the stable region there too.
        memory_truncate_every: the outer gradient does not cross every n-th chunk boundary (self-modifying);
            ``None`` for full backpropagation through time.
        memory_impl: of the memories' ops: "triton", "eager" or "reference", which never fall back, or
            ``None``: Triton kernels on CUDA where they serve the options, eager elsewhere.
        memory_initializer_range: standard deviation of the initial last layer of every memory.
        continuum_levels: the levels of the continuum memory system, fast to slow, as options of
            :class:`nl_models.layers.continuum.LevelConfig`. By default one level of width
            3.5 ``hidden_size``, which learns every 32 tokens. A single level without ``chunk_size``
            is the MLP of a transformer. Rates and retention are filled in where they are not given.
        continuum_variant: how the levels are put together: ``"sequential"``, ``"nested"`` or
            ``"independent"``; see :func:`nl_kernels.continuum_memory`.
        continuum_detach_updates: no outer gradient through the levels' steps; their rates and projections
            then stay as initialised.
        continuum_checkpoint_every: steps of a level between the fast weights that its backward pass keeps,
            while it recomputes the rest; ``None``: as memory allows, see :func:`nl_kernels.continuum_memory`.
        continuum_impl: as ``memory_impl``, of the continuum memory, or "compiled". Kernels serve the levels'
            rules (not "dgd"), without gradients or with ``continuum_detach_updates``; on CUDA the default for
            the rest in training is "compiled".
        rms_norm_eps: of all norms.
        initializer_range: standard deviation of the initial embeddings and projections; by default
            √(0.4 / hidden_size), which is 0.02 at a width of 1,000.
        tie_word_embeddings: whether the output layer is the embedding.
        use_cache: whether inference returns the recurrent state by default.
        pad_token_id, bos_token_id, eos_token_id: special tokens.

    Raises:
        ValueError: sizes that do not fit together, unknown names, or an unknown option with the prefix of a
            known group.
        TypeError: an option by its name of before version 0.2.
    """

    model_type = "hope"
    memory_implementation = RenamedAttribute("memory_impl")
    continuum_implementation = RenamedAttribute("continuum_impl")
    attention_implementation = RenamedAttribute("attention_impl")
    keys_to_ignore_at_inference: ClassVar[list[str]] = [CACHE_NAME]
    attribute_map: ClassVar[dict[str, str]] = {"num_heads": "num_attention_heads"}

    vocab_size: int = 32_000
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    layer_types: list[str] | str = "self_modifying_titans"
    use_short_convolution: bool = True
    convolution_window: int = 4
    rope_theta: float | int = 10_000.0
    attention_output_gate: bool = True
    attention_impl: str | None = None
    memory_hidden_size: int | None = None
    memory_chunk_size: int = 16
    memory_generator_chunk_size: int | None = None
    memory_read: str = "running"
    memory_rate_max: float | int = 1.0
    memory_rate_bias: float | int = 0.0
    memory_retention_bias: float | int = 4.0
    memory_values: str | None = None
    memory_momentum: bool = False
    memory_rule: dict | None = None
    memory_truncate_every: int | None = None
    memory_impl: str | None = None
    memory_initializer_range: float | int = 0.02
    continuum_levels: list[dict] | None = None
    continuum_variant: str = "sequential"
    continuum_detach_updates: bool = False
    continuum_checkpoint_every: int | None = None
    continuum_impl: str | None = None
    rms_norm_eps: float | int = 1e-6
    initializer_range: float | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self.layer_types = kwargs.pop("mixer_types", self.layer_types)  # as :meth:`to_dict` names them
        self.num_attention_heads = kwargs.pop("num_heads", self.num_attention_heads)
        if isinstance(self.layer_types, str):
            self.layer_types = [self.layer_types] * self.num_hidden_layers
        if self.initializer_range is None:
            self.initializer_range = math.sqrt(0.4 / max(self.hidden_size, 1))
        self.memory_values = choose_values("memory_values", self.memory_values, self.memory_hidden_size)
        if self.memory_rule is None:
            self.memory_rule = {}
        if self.continuum_levels is None:
            width = 7 * self.hidden_size // 2
            self.continuum_levels = [{"hidden_size": width, "chunk_size": 32, "key_projection": False}]
        self._check(kwargs)
        defaults = {name: getattr(LevelConfig, name) for name in _OLDER_LEVELS}
        self.continuum_levels = _filled_in(self.continuum_levels, defaults)
        super().__post_init__(**kwargs)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> HopeConfig:
        """A config of one of the :data:`PRESETS`: "tiny", "340m", "760m" or "1.3b".

        The paper has no table of Hope's sizes; these are the depths, widths, heads and vocabulary of its
        family's. Everything else is the default, save that from "340m" on the continuum is 2.5 times as wide
        as the model, which makes the parameter counts what the names say, and learns every 128 tokens, so
        that windows of 4,096 hold as many chunks as those of the trials (docs/defaults.md).

        Args:
            name: of the preset.
            overrides: any fields of the config; they replace those of the preset.

        Raises:
            ValueError: another name, or as :class:`HopeConfig`.
        """
        check_choice("name", name, tuple(PRESETS))
        fields = {**PRESETS[name], **overrides}
        if name != "tiny":
            width = 5 * fields["hidden_size"] // 2
            levels = [{"hidden_size": width, "chunk_size": 128, "key_projection": False}]
            fields.setdefault("continuum_levels", levels)
        return cls(**fields)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> HopeConfig:
        """A config from what a file holds.

        Files say the rates and retention of every level that learns, and what :func:`name_rule` names. Those
        that are older do not: their models were trained to keep everything, with the sum of the writes, with
        errors at the snapshot and values of unit length. Old names of fields (:data:`RENAMED`) are those of
        files alone; ``kwargs`` have today's.
        """
        check_renamed(kwargs, RENAMED)
        config_dict = current_names(config_dict)
        levels = config_dict.get("continuum_levels")
        if levels is not None:
            config_dict = {**config_dict, "continuum_levels": _filled_in(levels, _OLDER_LEVELS)}
        return super().from_dict(name_rule(config_dict, older=True), **kwargs)

    @classmethod
    def auto_classes(cls) -> dict[str, type]:
        from nl_models.hope.modeling_hope import HopeForCausalLM, HopeModel

        return {"AutoConfig": HopeConfig, "AutoModel": HopeModel, "AutoModelForCausalLM": HopeForCausalLM}

    def to_dict(self) -> dict:
        """All fields, ``layer_types`` as ``mixer_types``, and what the memories' rule leaves open by name.

        The library reads the files of any model by its base class, too (a ``Trainer`` that resumes), which
        refuses ``layer_types`` other than its own.
        """
        fields = super().to_dict()
        fields["mixer_types"] = fields.pop("layer_types")
        return name_rule(fields)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    def make_memory_rule(self) -> MemoryRule:
        """``memory_rule`` as the ops take it."""
        return MemoryRule(**self.memory_rule)

    def make_continuum_levels(self) -> list[LevelConfig]:
        """``continuum_levels`` as the layer takes them."""
        return [LevelConfig(**level) for level in self.continuum_levels]

    def fingerprint(self) -> str:
        """A digest of all fields that shape the recurrent state: equal for models that can share a cache."""
        shaping = {name: getattr(self, name) for name in _STATE_FIELDS}
        # Digests of saved caches are older than these options.
        if self.continuum_variant != "sequential":
            shaping["continuum_variant"] = self.continuum_variant
        shaping["continuum_levels"] = [
            {name: value for name, value in level.items() if _OLDER_LEVELS.get(name) != value}
            for level in self.continuum_levels
        ]
        rule = {n: value for n, value in self.memory_rule.items() if n not in ("momentum", "error_at")}
        made = self.make_memory_rule()
        if self.memory_momentum and made.momentum == "average":
            rule["momentum"] = "average"
        if self.memory_values != "unit":
            shaping["memory_values"] = self.memory_values
        if made.errs_at_anchor(linear=self.memory_hidden_size is None):
            rule["error_at"] = "anchor"
        shaping["memory_rule"] = rule
        return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()

    def validate_layer_type(self) -> None:
        """Replaces the library's check, which knows only its own names; the base class calls it."""
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"layer_types: expected names of {LAYER_TYPES}, got {unknown}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types: expected one per layer, {self.num_hidden_layers}, got {len(self.layer_types)}"
            )

    def _check(self, unknown: dict) -> None:
        """Checks that raise plain ValueErrors (the base class wraps those of its validators)."""
        check_renamed(unknown, RENAMED)
        for name in unknown:
            if name.startswith(_OWN_PREFIXES):
                raise ValueError(f"{name}: HopeConfig has no such option")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of hidden_size={self.hidden_size}, "
                f"got {self.num_attention_heads}"
            )
        self.validate_layer_type()
        if "full_attention" in self.layer_types and self.head_dim % 2:
            raise ValueError(f"num_attention_heads: attention needs an even head width, got {self.head_dim}")
        if self.convolution_window < 2:
            raise ValueError(f"convolution_window: expected at least 2, got {self.convolution_window}")
        self._check_memory()
        self._check_continuum()
        check_choice("attention_impl", self.attention_impl, (*ATTENTION_IMPLEMENTATIONS, None))

    def _check_memory(self) -> None:
        chunk, generator_chunk = self.memory_chunk_size, self.memory_generator_chunk_size
        for name in ("hidden_size", "chunk_size", "generator_chunk_size", "truncate_every"):
            value = getattr(self, f"memory_{name}")
            if value is not None:
                check_positive_int(f"memory_{name}", value)
        if generator_chunk is not None and max(chunk, generator_chunk) % min(chunk, generator_chunk):
            raise ValueError(
                f"memory_generator_chunk_size: one of it and memory_chunk_size={chunk} must be a multiple of "
                f"the other, got {generator_chunk}"
            )
        if self.memory_read not in ("snapshot", "running"):
            raise ValueError(f"memory_read: expected 'snapshot' or 'running', got {self.memory_read!r}")
        if not 0 <= self.memory_rate_max <= 2:
            raise ValueError(f"memory_rate_max: expected a number in [0, 2], got {self.memory_rate_max}")
        check_choice("memory_impl", self.memory_impl, (*IMPLEMENTATIONS, None))
        try:
            rule = self.make_memory_rule()
        except TypeError as error:
            raise ValueError(f"memory_rule: {_expected_options(MemoryRule)}: {error}") from error
        if rule.error_at == "anchor" and self.memory_hidden_size is not None:
            raise ValueError(
                "memory_rule: memories of two layers have errors at the snapshot; leave error_at out"
            )

    def _check_continuum(self) -> None:
        check_choice("continuum_impl", self.continuum_impl, (*WITH_COMPILED, None))
        if self.continuum_checkpoint_every is not None:
            check_positive_int("continuum_checkpoint_every", self.continuum_checkpoint_every)
        if self.continuum_variant not in VARIANTS:
            raise ValueError(f"continuum_variant: expected one of {VARIANTS}, got {self.continuum_variant!r}")
        try:
            levels = self.make_continuum_levels()
        except TypeError as error:
            raise ValueError(f"continuum_levels: {_expected_options(LevelConfig)}: {error}") from error
        if not levels:
            raise ValueError("continuum_levels: expected at least one level, got none")
        check_chunk_sizes([level.chunk_size for level in levels], "continuum_levels")


_OLDER_LEVELS = {
    "max_rate": 1.0,
    "initial_rate": 0.5,
    "initial_retention": 1.0,
    "max_retention": 0.9,
    "error_bound": 1.0,
    "predict_next": False,
}
"""What was so, and not in files, before levels forgot, predicted what comes next or remembered longer."""


def _filled_in(levels: list[dict], options: dict) -> list[dict]:
    """The levels, with these options of those that learn where they are not given."""
    learns = [level.get("chunk_size") is not None and level.get("max_rate", 1.0) > 0 for level in levels]
    return [{**options, **level} if does else level for level, does in zip(levels, learns)]


def current_names(options: dict) -> dict:
    """Fields of a config with names and choices of before version 0.2, as they are now."""
    fields = {RENAMED.get(name, name): value for name, value in options.items()}
    automatic = {name: None for name in RENAMED.values() if fields.get(name) == "auto"}
    if fields.get("attention_impl") == "flash":
        automatic["attention_impl"] = "flash_attention_2"
    return {**fields, **automatic}


def name_rule(options: dict, *, older: bool = False) -> dict:
    """Fields of a config that say by name what values are, where errors are taken and what momentum is.

    Saved fields always do, so that those of ``older`` versions, which had unit values, the snapshot and the
    sum alone, are told apart. What is not said becomes that, or else the default.
    """
    rule = dict(options.get("memory_rule") or {})
    if rule.get("error_at") is None:
        rule.pop("error_at", None)
    open_rule = MemoryRule(**{n: rule[n] for n in ("erase", "anchored") if n in rule})
    anchor = open_rule.errs_at_anchor(linear=options.get("memory_hidden_size") is None) and not older
    named = {"error_at": "anchor" if anchor else "snapshot"}
    if options.get("memory_momentum"):
        named["momentum"] = "sum" if older else MemoryRule.momentum
    unit = older or options.get("memory_hidden_size") is not None
    values = options.get("memory_values") or ("unit" if unit else "scaled")
    return {**options, "memory_rule": {**named, **rule}, "memory_values": values}


def _expected_options(options: type) -> str:
    names = [field.name for field in dataclasses.fields(options)]
    return f"expected options of {options.__name__}, which are {', '.join(names)}"


_OWN_PREFIXES = ("memory_", "continuum_", "convolution_", "attention_")
_STATE_FIELDS = (
    "memory_hidden_size",
    "memory_chunk_size",
    "memory_generator_chunk_size",
    "memory_read",
    "memory_rate_max",
    "memory_momentum",
    "memory_rule",
    "continuum_levels",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "layer_types",
    "use_short_convolution",
    "convolution_window",
    "rope_theta",
)
