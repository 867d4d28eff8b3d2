"""Hope as a transformers model: blocks of a token mixer and a continuum memory system (arXiv 2512.24695)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import GenerationConfig, GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import can_return_tuple

from nl_models.generation import StatefulGeneration
from nl_models.hf_names import CACHE_NAME, CACHE_NAMES, BackboneOutput, CausalOutput, either_cache_name
from nl_models.hope.cache_hope import BlockState, HopeCache
from nl_models.hope.configuration_hope import HopeConfig
from nl_models.layers.attention import Attention
from nl_models.layers.continuum import ContinuumBlock, ContinuumMemory
from nl_models.layers.gated_delta_net import GatedDeltaNet
from nl_models.layers.initial_memory import InitialMemory
from nl_models.layers.packing import Packing, current_mask, packed_bounds
from nl_models.layers.self_modifying_titans import SelfModifyingTitans
from nl_models.layers.short_convolution import ShortConvolution
from nl_models.layers.state import combine_states
from nl_models.layers.titans import Titans
from nl_models.remote_code import OwnClasses


class CarriedState:
    """An opaque box round the state of a block.

    FSDP2 casts every tensor to bf16 that it finds among a module's arguments, in tuples and dataclasses too.
    Reentrant checkpointing, which looks for tensors among the arguments itself, is refused for that reason.

    Attributes:
        relative: whether ``state`` is what is to be added to the initial one.
    """

    def __init__(self, state: BlockState | None, relative: bool = False):
        self.state = state
        self.relative = relative
        self.recorded = torch.is_grad_enabled()  # when it was put in, outside of any checkpoint


class HopeBlock(GradientCheckpointingLayer):
    """``x + mixer(conv(norm(x)))``, then the continuum memory system, whose levels have their own residuals.

    The block is a function of its arguments: it returns its new state, which the model commits to the cache,
    so that a replay by activation checkpointing writes nothing twice.
    """

    def __init__(self, config: HopeConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.convolution = (
            ShortConvolution(config.hidden_size, config.convolution_window)
            if config.use_short_convolution
            else None
        )
        self.mixer = _make_mixer(config, config.layer_types[layer_idx])
        self.continuum = ContinuumMemory(
            config.hidden_size,
            config.make_continuum_levels(),
            variant=config.continuum_variant,
            detach_updates=config.continuum_detach_updates,
            norm_eps=config.rms_norm_eps,
            checkpoint_every=config.continuum_checkpoint_every,
            impl=config.continuum_impl,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        carried: CarriedState | None = None,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        output_state: bool = False,
    ) -> tuple[torch.Tensor, BlockState | None]:
        """``hidden_states [B, T, d]`` to the same, and the state after them if ``output_state``.

        ``mask [B, T]`` is True at real tokens; padding changes no state. ``positions [B, T]`` replaces the
        count of real tokens in attention.
        """
        if carried is not None and carried.recorded and not torch.is_grad_enabled():
            raise ValueError(
                "past_key_values: checkpointing with use_reentrant=True loses the gradients of carried "
                "states; expected gradient_checkpointing_enable({'use_reentrant': False}), or no cache"
            )
        before = None if carried is None else carried.state
        before = BlockState(None, None, None) if before is None else before
        if carried is not None and carried.relative:
            # Here and not in a call of its own: under FSDP two calls of a block in one backward pass meet in
            # an order that depends on a rank's padding, and ranks wait for one another.
            padding = torch.zeros_like(hidden_states[:, :1])
            _, begun = self.forward(padding, mask=padding[..., 0].bool(), output_state=True)
            before = combine_states(torch.add, before, begun)
        x = self.norm(hidden_states)
        convolution = None
        if self.convolution is not None:
            x, convolution = self.convolution(x, before.convolution, mask, output_state)
        options = {"positions": positions} if isinstance(self.mixer, Attention) else {}
        y, mixer = self.mixer(x, before.mixer, mask, output_state, **options)
        hidden_states, continuum = self.continuum(hidden_states + y, before.continuum, mask, output_state)
        return hidden_states, BlockState(convolution, mixer, continuum) if output_state else None


def _make_mixer(config: HopeConfig, layer_type: str) -> nn.Module:
    sizes = {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "eps": config.rms_norm_eps,
    }
    if layer_type == "full_attention":
        return Attention(
            **sizes,
            rope_theta=config.rope_theta,
            gated=config.attention_output_gate,
            impl=config.attention_impl,
        )
    if layer_type == "gated_delta_net":
        return GatedDeltaNet(**sizes, impl=config.memory_impl, rate_max=max(1.0, config.memory_rate_max))
    memory = {
        **sizes,
        "memory_hidden_size": config.memory_hidden_size,
        "chunk_size": config.memory_chunk_size,
        "read": config.memory_read,
        "rule": config.make_memory_rule(),
        "rate_max": config.memory_rate_max,
        "rate_bias": config.memory_rate_bias,
        "retention_bias": config.memory_retention_bias,
        "momentum": config.memory_momentum,
        "initializer_range": config.memory_initializer_range,
        "impl": config.memory_impl,
    }
    if layer_type == "titans":
        return Titans(**memory)
    return SelfModifyingTitans(
        **memory,
        values=config.memory_values,
        generator_chunk_size=config.memory_generator_chunk_size,
        truncate_every=config.memory_truncate_every,
    )


LAYERS_WITH_PARAMETERS = (
    ShortConvolution,
    GatedDeltaNet,
    Titans,
    SelfModifyingTitans,
    InitialMemory,
    ContinuumBlock,
    ContinuumMemory,
)
"""Layers with parameters of their own beside those of their linear children."""


class HopePreTrainedModel(OwnClasses, PreTrainedModel):
    """Loading, saving and initialization, common to the Hope models."""

    config_class = HopeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["HopeBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = list(CACHE_NAMES)
    _supports_sdpa = True
    keeps_states = True
    counts_tokens = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LAYERS_WITH_PARAMETERS):
            module.reset_parameters()


class HopeModel(HopePreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: HopeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([HopeBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @either_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: HopeCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> BackboneOutput:
        """Hidden states of a batch of sequences, or of the pieces of them that follow a cache.

        Args:
            input_ids: ``[B, T]`` tokens; or
            inputs_embeds: ``[B, T, hidden_size]`` instead of them.
            attention_mask: ``[B, T]``, or ``[B, S]`` with all columns of the past before; 0 at padding, on
                either side. Padding writes to no state.
            position_ids: ``[B, T]`` rotary positions of attention layers; by default the count of real
                tokens. The memories know no positions.
            cache: the state before these tokens, which is replaced by that after them;
                ``past_key_values`` is the same argument.
            use_cache: whether to return the state; by default ``config.use_cache`` outside of training.
            output_attentions: not available: memories have no attention weights.
            output_hidden_states: whether to return the input of every block, and the last output.
            cu_seqlens: ``[N + 1]``, the bounds of N packed sequences in a batch of one; they do not see each
                other. Not together with a cache or a mask.
            cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx: the same, as collators of
                transformers and TRL say it. They may come together, and with ``position_ids`` ``[1, T]`` that
                begin anew at each sequence, which are enough by themselves; all must agree.

        Raises:
            ValueError: no tokens, arguments that contradict each other, or a cache of another config.
        """
        if _default(output_attentions, self.config.output_attentions):
            raise ValueError("output_attentions: not available, a Hope model keeps no attention weights")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        cu_seqlens = packed_bounds(
            position_ids,
            attention_mask,
            cu_seqlens,
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_length_q,
            max_length_k,
            seq_idx,
        )
        if cache is not None:
            if not isinstance(cache, HopeCache):
                raise ValueError(
                    f"cache: expected a HopeCache, got {type(cache).__name__}; "
                    "make one with HopeCache(model.config)"
                )
            cache.check_config(self.config)
        elif _default(use_cache, self.config.use_cache and not self.training and cu_seqlens is None):
            cache = HopeCache(self.config)

        name, given = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
        if given.ndim != (2 if inputs_embeds is None else 3) or 0 in given.shape:
            raise ValueError(
                f"{name}: expected sequences of at least one token, got shape {tuple(given.shape)}"
            )
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = hidden_states.shape
        if cache is not None:
            cache.read_pending(self)
        past = cache.get_seq_length() if cache is not None else 0
        if cache is not None and cache.batch_size not in (-1, B):
            raise ValueError(f"cache: holds {cache.batch_size} sequences, the input has {B}")
        mask = current_mask(attention_mask, B, T, None if cache is None else cache.layers[0])
        packing = None
        if cu_seqlens is not None:
            if mask is not None or past or use_cache:
                raise ValueError("cu_seqlens: packed sequences take neither a padding mask nor a cache")
            packing = Packing(cu_seqlens, hidden_states, max_length_q or max_length_k)
            hidden_states, mask = packing.unpack(hidden_states), packing.mask
            if position_ids is not None:
                position_ids = packing.unpack(position_ids[..., None])[..., 0]

        keep_hidden_states = _default(output_hidden_states, self.config.output_hidden_states)
        all_hidden_states = []
        cache_layers = [None] * len(self.layers) if cache is None else cache.layers
        for i, (block, layer) in enumerate(zip(self.layers, cache_layers)):
            if keep_hidden_states:
                all_hidden_states.append(hidden_states)
            carried = None if layer is None else CarriedState(layer.state, cache.relative)
            hidden_states, state = block(hidden_states, carried, mask, position_ids, layer is not None)
            if layer is not None:
                layer.commit(state, T, mask, input_ids if i == 0 else None)
        if cache is not None:
            cache.relative = False
            given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
            cache.record({**given, "attention_mask": mask, "position_ids": position_ids})
        hidden_states = self.norm(hidden_states)
        all_hidden_states.append(hidden_states)
        if packing is not None:
            all_hidden_states = [packing.pack(h) for h in all_hidden_states]
        return BackboneOutput(
            last_hidden_state=all_hidden_states[-1],
            hidden_states=tuple(all_hidden_states) if keep_hidden_states else None,
            **{CACHE_NAME: cache},
        )


class HopeForCausalLM(HopePreTrainedModel, StatefulGeneration, GenerationMixin):
    """A language model: :class:`HopeModel` and an output layer, by default tied to the embedding."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = True  # num_items_in_batch

    def __init__(self, config: HopeConfig):
        super().__init__(config)
        self.model = HopeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @either_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: HopeCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cu_seqlens: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
    ) -> CausalOutput:
        """Logits ``[B, T, vocab_size]``, and the next-token loss where ``labels`` are given.

        Args:
            labels: ``[B, T]`` tokens (shifted inside), -100 where there is no loss. The first token of a
                packed sequence is never a target.
            logits_to_keep: number of last tokens to give logits for (0 is all), or their indices.
            num_items_in_batch: divisor of the summed loss, for accumulation over several batches; by default
                the mean over targets is taken.

        The other arguments are those of :meth:`HopeModel.forward`.
        """
        cu_seqlens = packed_bounds(
            position_ids,
            attention_mask,
            cu_seqlens,
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_length_q,
            max_length_k,
            seq_idx,
        )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            cu_seqlens=cu_seqlens,
            max_length_q=None if cu_seqlens is None else max_length_q or max_length_k,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            if cu_seqlens is not None:
                labels = labels.clone()
                labels[:, cu_seqlens[:-1].long()] = -100
            loss = self.loss_function(logits, labels, self.vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_NAME: outputs.cache},
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Start ``generate`` with a :class:`HopeCache`, the only kind that holds this model's state."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation: a Hope model has its own cache, got "
                f"{generation_config.cache_implementation!r}; leave it unset"
            )
        if generation_config.use_cache and model_kwargs.get(CACHE_NAME) is None:
            model_kwargs[CACHE_NAME] = HopeCache(self.config)


def _default(value: bool | None, default: bool | None) -> bool:
    return bool(default if value is None else value)
