"""What turns a family's modules into those of a converted model: mixins, one for each kind of module."""

from __future__ import annotations

import functools
import inspect
from typing import ClassVar

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMode
from transformers.utils import TransformersKwargs

from nl_models.generation import StatefulGeneration
from nl_models.hf_names import CACHE_NAME, either_cache_name
from nl_models.layers.packing import PACKING_NAMES, Packing, current_mask, packed_bounds
from nl_models.layers.state_cache import StateCacheLayer
from nl_models.module_views import device_of, dtype_of
from nl_models.remote_code import OwnClasses
from nl_models.surgery.cache import ContinuumCache
from nl_models.surgery.fast_weights import FastWeights, LayerFastWeights, add_to_first, fast_product
from nl_models.surgery.mixers import MemoryMixer


class ContinuumMLP:
    """An MLP whose first hidden units have the fast weights that a call brings along.

    ``y = down σ(up x)``, every matrix with its sequence's fast weights added. Between two steps the levels
    are one product: Eq. 74's sum over levels, Σ_ℓ down_ℓ σ(up_ℓ x), is the product over all units. Without
    fast weights the family's own forward runs.
    """

    parts: ClassVar[dict[str, str]]
    """Names of the linear modules of "up", "down" and, with a gate, "gate"."""

    layer_index: int

    def linear(self, part: str, x: torch.Tensor, fast_weights: FastWeights) -> torch.Tensor:
        """The module of ``part`` on ``x``, whatever it is by now, and the fast weights on top."""
        y = self.get_submodule(self.parts[part])(x)
        if fast_weights.inputs is not None:
            fast_weights.inputs[self.layer_index, part] = x
        weight = getattr(fast_weights.layers[self.layer_index], part)
        if part == "down":
            return y + fast_product(x[..., : weight.shape[2]], weight)
        return add_to_first(y, fast_product(x, weight))


class GatedContinuumMLP(ContinuumMLP):
    """``down(act(gate x) ∘ up x)``, as in Llama and Qwen."""

    parts: ClassVar[dict[str, str]] = {"up": "up_proj", "down": "down_proj", "gate": "gate_proj"}

    def forward(self, x: torch.Tensor, fast_weights: FastWeights | None = None) -> torch.Tensor:
        """``x [B, T, D]`` to the same."""
        if fast_weights is None:
            return super().forward(x)
        hidden = self.act_fn(self.linear("gate", x, fast_weights)) * self.linear("up", x, fast_weights)
        return self.linear("down", hidden, fast_weights)


class PlainContinuumMLP(ContinuumMLP):
    """``down(act(up x))``, as in GPT-2 and GPT-NeoX, with their biases and GPT-2's dropout."""

    def forward(self, x: torch.Tensor, fast_weights: FastWeights | None = None) -> torch.Tensor:
        """``x [B, T, D]`` to the same."""
        if fast_weights is None:
            return super().forward(x)
        y = self.linear("down", self.act(self.linear("up", x, fast_weights)), fast_weights)
        return self.dropout(y) if hasattr(self, "dropout") else y


class ContinuumDecoderLayer:
    """A decoder layer that hands its MLP the fast weights of the call.

    A function of its arguments, so that activation checkpointing may replay it, and several threads run it.
    """

    layer_index: int
    has_memory: bool

    def forward(
        self,
        hidden_states,
        *args,
        fast_weights: FastWeights | None = None,
        padding_mask: torch.Tensor | None = None,
        packing: Packing | None = None,
        **kwargs,
    ):
        """The family's forward, with ``fast_weights`` of the whole model, or ``None``.

        ``padding_mask [B, T]`` and ``packing`` are for a memory in the place of the attention.
        """
        if self.has_memory:
            kwargs |= {"padding_mask": padding_mask, "packing": packing}
        if fast_weights is None or fast_weights.layers[self.layer_index] is None:
            return super().forward(hidden_states, *args, **kwargs)
        # The family's code calls ``self.mlp(x)``. A view of the layer for this call alone adds the argument.
        view = object.__new__(type(self))
        vars(view).update(vars(self), mlp=functools.partial(self.mlp, fast_weights=fast_weights))
        return super(ContinuumDecoderLayer, view).forward(hidden_states, *args, **kwargs)


class ContinuumBackbone(OwnClasses):
    """The model without its output layer: finds the fast weights of a call."""

    layers_name: ClassVar[str] = "layers"
    layer_class: ClassVar[type]
    mlp_class: ClassVar[type]
    attention_name: ClassVar[str] = "self_attn"
    keywords: ClassVar[frozenset[str]]
    """All that the family's forward takes. It ignores any other without a word."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        of_family = inspect.signature(super().forward).parameters
        known = (*of_family, *TransformersKwargs.__annotations__, *PACKING_NAMES)
        cls.keywords = frozenset(known) - {"self", "kwargs"}

    def __init__(self, config):
        super().__init__(config)
        for index, options in (config.memory_layers or {}).items():
            self.replace_attention(int(index), MemoryMixer(config, int(index), **options))
        self.adopt_layers()

    def adopt_layers(self) -> None:
        """Give the decoder layers that there are the classes of a converted model."""
        for index, layer in enumerate(self.decoder_layers()):
            layer.__class__, layer.mlp.__class__ = self.layer_class, self.mlp_class
            layer.layer_index = layer.mlp.layer_index = index
            layer.has_memory = isinstance(getattr(layer, self.attention_name), MemoryMixer)

    def replace_attention(self, index: int, mixer: MemoryMixer) -> None:
        """Put a memory in the place of the attention of a layer."""
        layer = self.decoder_layers()[index]
        setattr(layer, self.attention_name, mixer)
        layer.has_memory = True

    def decoder_layers(self) -> torch.nn.ModuleList:
        """The decoder layers in order."""
        return getattr(self, self.layers_name)

    @either_cache_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        fast_weights: FastWeights | None = None,
        **kwargs,
    ):
        """The family's forward with the fast weights given, else those in the cache, else none.

        ``past_key_values`` is the same argument as ``cache``.

        Raises:
            TypeError: ``fast_weights`` of another type, or a keyword that the family does not know.
            ValueError: fast weights for another number of layers, or that cannot serve the batch; with
                memories in the place of attention, a cache that has no place for their states, a mask of
                another shape than ``[B, T]`` or ``[B, S]`` with the past, or that
                contradicts what the states have read; packed sequences with a cache or a mask, or whose
                bounds contradict each other; a cache in training with activation checkpointing.
        """
        unknown = sorted(kwargs.keys() - self.keywords)
        if unknown:
            raise TypeError(f"{unknown[0]}: no argument of {type(self).__name__}, which would ignore it")
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if fast_weights is None and isinstance(cache, ContinuumCache):
            fast_weights = cache.fast_weights
        if fast_weights is not None:
            self._check(fast_weights, inputs)
            kwargs["fast_weights"] = fast_weights
        if isinstance(cache, ContinuumCache):
            cache.read_pending(self)
        whole = cache.whole_mask(attention_mask, inputs) if isinstance(cache, ContinuumCache) else None
        if whole is not None:
            attention_mask = whole
            if cache.is_ragged and kwargs.get("position_ids") is None:
                kwargs["position_ids"] = (whole.long().cumsum(1) - 1).clamp_min(0)[:, -inputs.shape[1] :]
        bounds = self._packed_bounds(inputs, attention_mask, cache, use_cache, kwargs)
        if bounds is not None:
            use_cache, attention_mask = False, None  # with either, the family would not look at the positions
        if self.config.memory_layers:
            kwargs["padding_mask"] = self._memory_mask(inputs, attention_mask, cache)
            kwargs["packing"] = None if bounds is None else Packing(bounds, inputs)
        checkpointing = self.training and self.gradient_checkpointing
        if checkpointing and cache is not None:
            raise ValueError(
                "cache: the family's layers leave it out in training with activation checkpointing, and the "
                "past with it; pass none (fast weights as fast_weights), or switch the checkpointing off"
            )
        if cache is None and (fast_weights is not None or self.config.memory_layers):
            wants_cache = self.config.use_cache if use_cache is None else use_cache
            if wants_cache and not checkpointing:
                cache = ContinuumCache(self.config, fast_weights)
        found = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        if isinstance(cache, ContinuumCache):
            given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "fast_weights": fast_weights}
            now = None if whole is None else whole[:, -inputs.shape[1] :]
            cache.record({**given, "attention_mask": now, "position_ids": kwargs.get("position_ids")})
            cache.mask = whole
        return found

    def _memory_mask(
        self,
        inputs: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
    ) -> torch.Tensor | None:
        """The mask ``[B, T]`` of the current tokens, which decoder layers do not get to see otherwise."""
        if cache is not None and not isinstance(cache, ContinuumCache):
            raise ValueError(
                f"cache: a {type(cache).__name__} has no place for the states of memories; "
                "make a ContinuumCache(model.config)"
            )
        if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
            raise ValueError(f"attention_mask: expected a tensor, got {type(attention_mask).__name__}")
        memory = None if cache is None else next(x for x in cache.layers if isinstance(x, StateCacheLayer))
        return current_mask(attention_mask, inputs.shape[0], inputs.shape[1], memory)

    def _packed_bounds(
        self,
        inputs: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
        kwargs: dict,
    ) -> torch.Tensor | None:
        """The bounds of packed sequences, which the family is then told by ``position_ids`` in ``kwargs``.

        Only those does each of its attentions follow.
        """
        names = {name: kwargs.pop(name) for name in PACKING_NAMES if kwargs.get(name) is not None}
        positions = kwargs.get("position_ids")
        if not names and not self.config.memory_layers and (cache is not None or inputs.shape[0] > 1):
            return None  # nothing here depends on it
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) else None
        bounds = packed_bounds(positions, mask, **names)
        if bounds is None:
            return None
        if cache is not None or use_cache or (mask is not None and not bool(mask.all())):
            raise ValueError("cu_seqlens: packed sequences take neither a padding mask nor a cache")
        Packing(bounds, inputs)  # checks them
        bounds = bounds.long()
        starts = bounds[:-1].repeat_interleave(bounds.diff())
        own = (torch.arange(inputs.shape[1], device=inputs.device) - starts)[None]
        if positions is None:
            kwargs["position_ids"] = own
        elif len(bounds) > 2 and not torch.equal(positions - positions[:, starts], own):
            raise ValueError(
                "position_ids: expected them to begin anew at each bound, and to count from there"
            )
        return bounds

    def _check(self, fast_weights: FastWeights, inputs: torch.Tensor) -> None:
        if not isinstance(fast_weights, FastWeights):
            raise TypeError(f"fast_weights: expected FastWeights, got {type(fast_weights).__name__}")
        if len(fast_weights.layers) != self.config.num_hidden_layers:
            raise ValueError(
                f"fast_weights: expected those of {self.config.num_hidden_layers} layers, "
                f"got {len(fast_weights.layers)}"
            )
        fast_weights.check_batch(inputs.shape[0])


class ContinuumCausalLM(OwnClasses, StatefulGeneration):
    """A converted language model. ``fast_weights`` go to ``forward`` by that name, or come with the cache."""

    backbone_class: ClassVar[type]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if ContinuumCausalLM in cls.__bases__:
            cls.forward = either_cache_name(super().forward, CACHE_NAME)

    def __init__(self, config):
        super().__init__(config)
        # transformers notes at construction which outputs of a model it can record: no class swap here.
        setattr(self, self.base_model_prefix, self.backbone_class(config))
        self.post_init()
        self.keeps_states = bool(config.memory_layers)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Start ``generate`` with a :class:`ContinuumCache` where there are states of memories to keep."""
        if not self.config.memory_layers:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation: the states of memories have their own cache, got "
                f"{generation_config.cache_implementation!r}; leave it unset"
            )
        if generation_config.use_cache and model_kwargs.get(CACHE_NAME) is None:
            model_kwargs[CACHE_NAME] = ContinuumCache(self.config)
        return None

    def initial_fast_weights(self, batch_size: int = 1) -> FastWeights:
        """Fast weights before any step: zeros, for ``batch_size`` sequences.

        Raises:
            ValueError: no MLP of this model has levels.
        """
        units = self.config.level_units()
        if not units:
            raise ValueError("initial_fast_weights: this model's MLPs have no levels")
        learned, width = units[-1].stop, self.config.hidden_size
        layers: list[LayerFastWeights | None] = []
        for index, layer in enumerate(self.base_model.decoder_layers()):
            if index not in self.config.continuum_layers:
                layers.append(None)
                continue
            dtype = torch.promote_types(dtype_of(self) or torch.float32, torch.float32)
            device = device_of(layer.mlp) or device_of(self)

            def zeros(*shape: int, dtype=dtype, device=device) -> torch.Tensor:
                return torch.zeros(batch_size, *shape, dtype=dtype, device=device)

            gate = zeros(learned, width) if "gate" in layer.mlp.parts else None
            layers.append(LayerFastWeights(zeros(learned, width), zeros(width, learned), gate))
        return FastWeights(layers)
