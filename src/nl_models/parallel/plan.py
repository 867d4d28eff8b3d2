"""What ranks will send and for how long they will wait, from formulas, without running anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from nl_kernels.checks import check_positive_int
from nl_kernels.ops.continuum.state import RULES_WITH_MOMENTUM
from nl_models.console import explained_errors, token_count
from nl_models.hope import HopeConfig, HopeForCausalLM
from nl_models.hope.modeling_hope import HopeBlock
from nl_models.layers import Attention, ContinuumMemory, GatedDeltaNet, ShortConvolution
from nl_models.layers.initial_memory import InitialMemory
from nl_models.parallel.exchange import Agreement
from nl_models.parallel.layers import form_of, gathered, relayed, stateless


def state_bytes(layer: nn.Module, batch: int, past: int, element: int = 4) -> tuple[int, int]:
    """Bytes of the state that a layer hands on after ``past`` tokens: of what has a gradient, of counters.

    ``element``: bytes of a number of the activations; fast weights have 4, or 8 beside fp64.
    """
    fast = max(element, 4)
    if isinstance(layer, ShortConvolution):
        return batch * (layer.window - 1) * layer.hidden_size * element, 0
    if isinstance(layer, GatedDeltaNet):
        return batch * layer.num_heads * layer.head_dim**2 * fast, 0
    if isinstance(layer, Attention):
        return 2 * batch * past * layer.num_heads * layer.head_dim * element, 8 * batch
    if isinstance(layer, ContinuumMemory):
        numbers = clocks = 0
        for i, level in enumerate(layer.levels):
            config, faster = level.config, layer.levels[i - 1].config if i else None
            if config.steps:
                weights = sum(w.numel() for w in (level.up, level.down, level.gate) if w is not None)
                pending = past % config.chunk_size * (layer.hidden_size + 1)
                numbers += weights * (1 + (config.rule in RULES_WITH_MOMENTUM)) + pending
            resets = layer.variant == "nested" and faster is not None and faster.steps
            clocks += config.steps or (resets and config.chunk_size is not None)
        return batch * numbers * fast, 8 * batch * clocks
    memories = [module for module in layer.modules() if isinstance(module, InitialMemory)]
    weights = sum(p.numel() for memory in memories for p in memory.parameters())
    copies = 2 if layer.momentum_proj is None else 3  # snapshot, running, momentum
    return batch * weights * copies * fast, 8 * batch


def sent_bytes(
    layer: nn.Module, batch: int, lengths: Sequence[int], rank: int, element: int = 4
) -> tuple[int, int]:
    """Bytes that a rank sends for a layer, without padding or an earlier state: forward, backward.

    ``lengths`` are the tokens of each rank's piece.
    """
    form = form_of(layer, Agreement(tuple(lengths), padded=False, resumed=False, others=()))
    before, last = sum(lengths[:rank]), len(lengths) - 1
    if form is stateless:
        return 0, 0
    if form is gathered:
        token = state_bytes(layer, batch, 1, element)[0]
        return token * lengths[rank] * (last - rank), token * before
    forward = sum(state_bytes(layer, batch, before + lengths[rank], element))
    return forward if rank < last else 0, state_bytes(layer, batch, before, element)[0] if rank else 0


def messages(model: HopeForCausalLM, batch: int, lengths: Sequence[int], element: int = 4) -> list[int]:
    """Bytes of states and of their gradients that each rank sends in a pass of a whole model."""
    layers = [layer for block in model.model.layers for layer in layers_of(block)]
    return [
        sum(sum(sent_bytes(layer, batch, lengths, rank, element)) for layer in layers)
        for rank in range(len(lengths))
    ]


def idle_share(model: nn.Module, ranks: int, micro_batches: int = 1) -> float:
    """The part of a step for which a rank waits, were all blocks equally long and messages instantaneous.

    Each rank begins when the one before is done with the first block, and ends as much later. Zero where no
    layer has to wait for the rank before.
    """
    blocks = [module for module in model.modules() if isinstance(module, HopeBlock)]
    agreement = Agreement((2**31,) * ranks, padded=False, resumed=False, others=())
    if not any(form_of(layer, agreement) is relayed for block in blocks for layer in layers_of(block)):
        return 0.0
    return (ranks - 1) / (len(blocks) * micro_batches + ranks - 1)


def main(
    preset: Annotated[str, typer.Option(help="tiny, 340m, 760m or 1.3b.")] = "340m",
    layer_types: Annotated[str, typer.Option(help="Of all blocks.")] = "self_modifying_titans",
    ranks: Annotated[int, typer.Option(help="Ranks that share each sequence.")] = 8,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    length: Annotated[
        str, typer.Option(help="Their tokens, of all ranks. K and M are 1024 and 1024².")
    ] = "128K",
    micro_batches: Annotated[int, typer.Option(help="Parts of the batch that are worked on in turn.")] = 1,
) -> None:
    """Print the most that a rank sends in a training step in fp32, and the share of it that ranks wait."""
    with explained_errors():
        for name, value in (("ranks", ranks), ("batch", batch), ("micro_batches", micro_batches)):
            check_positive_int(name, value)
        tokens, rest = divmod(token_count("length", length), ranks)
        if rest:
            raise ValueError(f"length: expected a multiple of ranks={ranks}, got {length}")
        with torch.device("meta"):
            model = HopeForCausalLM(HopeConfig.preset(preset, layer_types=layer_types))
    sums: dict[str, list[Counter]] = {}
    for block in model.model.layers:
        for layer in layers_of(block):
            counters = sums.setdefault(type(layer).__name__, [Counter(), Counter()])
            for rank in range(ranks):
                for counter, n in zip(counters, sent_bytes(layer, batch, [tokens] * ranks, rank)):
                    counter[rank] += n
    table = Table("", "MB forward", "MB backward", box=None, title_justify="left")
    for name, counters in sums.items():
        table.add_row(name, *(f"{max(counter.values()) / 1e6:,.2f}" for counter in counters))
    console = Console()
    console.print(f"{preset}, {ranks} ranks, {batch} x {tokens * ranks:,} tokens: the most that a rank sends")
    console.print(table)
    console.print(f"idle: {idle_share(model, ranks, micro_batches):.1%}")


def layers_of(block: HopeBlock) -> list[nn.Module]:
    """The layers of a block that know other tokens, in their order."""
    return [layer for layer in (block.convolution, block.mixer, block.continuum) if layer is not None]


if __name__ == "__main__":
    typer.run(main)
