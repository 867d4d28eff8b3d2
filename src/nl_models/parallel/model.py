"""A whole Hope model over ranks that each have a piece of every sequence."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from nl_kernels.checks import check_positive_int
from nl_models.hf_names import CACHE_NAME, CausalOutput
from nl_models.hope.cache_hope import BlockState, HopeCache
from nl_models.hope.modeling_hope import HopeBlock, HopeForCausalLM
from nl_models.layers.packing import current_mask
from nl_models.layers.state import State, detach_state, join_states, map_state
from nl_models.parallel.exchange import Agreement, SequenceRanks
from nl_models.parallel.layers import over_ranks


class SequenceParallel:
    """Calls a model on this rank's piece of each sequence; the ranks of ``mesh`` have the others, in order.

    Every rank has all weights. A rank begins a layer when the rank before is done with it, and works on the
    rows of the batch in turn, so ranks wait for each other at the beginning and at the end only.

    Args:
        model: the same on all ranks.
        mesh: of one dimension, for instance ``mesh["sequence"]``; see :class:`SequenceRanks`.
        micro_batches: parts of the batch that are worked on in turn.

    Attributes:
        ranks: counts what is sent.

    Raises:
        TypeError: another model.
        ValueError: as :class:`SequenceRanks`; or weights that are sharded.
    """

    def __init__(self, model: HopeForCausalLM, mesh: DeviceMesh, micro_batches: int = 1):
        if not isinstance(model, HopeForCausalLM):
            raise TypeError(f"model: expected a HopeForCausalLM, got {type(model).__name__}")
        check_positive_int("micro_batches", micro_batches)
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise ValueError("model: expected whole weights on every rank, got sharded ones (FSDP2)")
        self.model = model
        self.ranks = SequenceRanks(mesh)
        self.micro_batches = micro_batches

    def __call__(
        self,
        input_ids: torch.LongTensor,
        *,
        labels: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: HopeCache | None = None,
        num_items_in_batch: float | None = None,
    ) -> CausalOutput:
        """Logits of this rank's tokens, and its share of the loss.

        Args:
            input_ids: ``[B, T]``, the piece; T may differ by rank.
            labels: ``[B, T]`` likewise (shifted inside, across ranks, too), -100 where there is no loss.
            attention_mask: ``[B, T]`` likewise, 0 at padding.
            cache: on the first rank alone: the state before these tokens, which is replaced by that after the
                last rank's, without its graph. An empty one (``HopeCache(config)``) is filled.
            num_items_in_batch: what the sum of the losses is divided by; by default the number of targets.

        Returns:
            logits ``[B, T, vocab_size]`` and a loss, which sums over ranks to the mean over all targets.
            Every rank calls its ``backward``, then :meth:`reduce_gradients`.

        Raises:
            ValueError: on all ranks, if what they are called with does not fit together.
        """
        agreement = self._agree(input_ids, labels, attention_mask, cache)
        backbone, (B, T) = self.model.model, input_ids.shape
        mask = current_mask(attention_mask, B, T, None)
        before = [None] * len(backbone.layers) if cache is None else [layer.state for layer in cache.layers]
        parts, states = [], []
        for rows in torch.arange(B, device=input_ids.device).chunk(self.micro_batches):
            hidden, after = backbone.embed_tokens(input_ids[rows]), []
            row_mask = None if mask is None else mask[rows]
            for block, state in zip(backbone.layers, before):
                state = map_state(lambda t, rows=rows: t[rows], state)
                hidden, state = self._block(block, hidden, state, row_mask, agreement)
                after.append(state)
            parts.append(hidden)
            states.append(after)
        logits = self.model.lm_head(backbone.norm(torch.cat(parts)))
        loss = None if labels is None else self._loss(logits, labels, agreement, num_items_in_batch)
        if agreement.others[0]["cache"]:
            self._return_states([join_states(each) for each in zip(*states)], input_ids, mask, cache)
        self.ranks.finish()
        return CausalOutput(loss=loss, logits=logits, **{CACHE_NAME: cache})

    def reduce_gradients(self) -> None:
        """Sum the gradients over the ranks, in place: on each they are then those of one process.

        A parameter without a gradient on this rank counts as zeros.
        """
        self.ranks.finish()
        works = []
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                works.append(dist.all_reduce(parameter.grad, group=self.ranks.group, async_op=True))
        with self.ranks.waiting():
            for work in works:
                work.wait()

    def _block(
        self,
        block: HopeBlock,
        hidden: torch.Tensor,
        before: BlockState | None,
        mask: torch.Tensor | None,
        agreement: Agreement,
    ) -> tuple[torch.Tensor, BlockState]:
        """As :meth:`HopeBlock.forward`, each layer over the ranks."""
        checkpoint = block.gradient_checkpointing and block.training and torch.is_grad_enabled()

        def run(layer: nn.Module, x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
            keep = agreement.others[0]["cache"]
            return over_ranks(
                layer, x, self.ranks, state, mask, keep, agreement=agreement, checkpoint=checkpoint
            )

        before = BlockState(None, None, None) if before is None else before
        x, convolution = block.norm(hidden), None
        if block.convolution is not None:
            x, convolution = run(block.convolution, x, before.convolution)
        y, mixer = run(block.mixer, x, before.mixer)
        hidden, continuum = run(block.continuum, hidden + y, before.continuum)
        return hidden, BlockState(convolution, mixer, continuum)

    def _agree(self, input_ids, labels, attention_mask, cache) -> Agreement:
        """What all ranks are called with; all of them raise what is wrong on any."""
        shape, wrong = tuple(input_ids.shape), None
        for name, other in (("labels", labels), ("attention_mask", attention_mask)):
            if other is not None and other.shape != shape:
                wrong = f"{name}: expected shape {shape}, got {tuple(other.shape)}"
        if len(shape) != 2:
            wrong, shape = f"input_ids: expected shape [B, T], got {shape}", (0, 0)
        elif self.micro_batches > shape[0]:
            wrong = f"micro_batches: {self.micro_batches}, but the batch has {shape[0]} sequences"
        if cache is not None and self.ranks.rank:
            wrong = "cache: expected on the first rank alone"
        elif cache is not None and cache.fingerprint != self.model.config.fingerprint():
            wrong = "cache: this HopeCache was made for a model of another config"
        elif cache is not None and cache.batch_size not in (-1, shape[0]):
            wrong = f"cache: holds {cache.batch_size} sequences, the input has {shape[0]}"
        said = {"cache": cache is not None, "micro_batches": self.micro_batches}
        if labels is not None and wrong is None:
            said["first"], said["targets"] = labels[:, 0].tolist(), int((labels[:, 1:] != -100).sum())
        padded = attention_mask is not None and not bool(attention_mask.all())
        resumed = wrong is None and cache is not None and cache.batch_size > 0
        agreement = self.ranks.agree(*shape, padded, resumed, wrong, said)
        if len({said["micro_batches"] for said in agreement.others}) > 1:
            raise ValueError("micro_batches: differs by rank")
        if len({"first" in said for said in agreement.others}) > 1:
            raise ValueError("labels: expected on all ranks or on none")
        if agreement.others[0]["cache"] and agreement.padded and self.micro_batches > 1:
            raise ValueError("micro_batches: expected 1 for padded sequences with a cache")
        return agreement

    def _loss(
        self, logits: torch.Tensor, labels: torch.Tensor, agreement: Agreement, count: float | None
    ) -> torch.Tensor:
        """The targets of this rank's tokens end with the first label of the next rank."""
        first = torch.tensor([said["first"] for said in agreement.others])
        if count is None:
            count = sum(said["targets"] for said in agreement.others) + int((first[1:] != -100).sum())
        after = F.pad(first, (0, 0, 0, 1), value=-100)[self.ranks.rank + 1, :, None]
        targets = torch.cat([labels[:, 1:], after.to(labels.device)], 1)
        return self.model.loss_function(
            logits, None, self.model.vocab_size, num_items_in_batch=count, shift_labels=targets
        )

    @torch.no_grad()
    def _return_states(self, states, input_ids, mask, cache) -> None:
        """To the first rank, where what follows begins."""
        ranks, states = self.ranks, detach_state(tuple(states))
        read = [None] * ranks.size if ranks.rank == 0 else None
        if mask is None:
            mask = torch.ones_like(input_ids, dtype=torch.bool)
        dist.gather_object((input_ids.cpu(), mask.cpu()), read, group=ranks.group, group_dst=0)
        if ranks.is_last and ranks.rank:
            ranks.send(input_ids, states, [0], "cache")
        if ranks.rank:
            return
        if not ranks.is_last:
            _, states = ranks.receive(input_ids, ranks.size - 1, "cache")
        ids, mask = (torch.cat(pieces, 1).to(input_ids.device) for pieces in zip(*read))
        mask = None if bool(mask.all()) else mask
        for i, (layer, state) in enumerate(zip(cache.layers, states)):
            layer.commit(state, ids.shape[1], mask, ids if i == 0 else None)
