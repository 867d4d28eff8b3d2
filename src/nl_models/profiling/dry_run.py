"""What a training run will take on each of its ranks, before any is there: ``nl train --dry-run``."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.filesize import decimal
from torch._subclasses.fake_tensor import FakeTensorMode

from nl_models.data.tokenizer import ByteTokenizer, open_tokenizer
from nl_models.hope import HopeConfig, HopeForCausalLM
from nl_models.hope.baseline import parameter_count
from nl_models.parallel.mesh import Mesh, parts_in_turn
from nl_models.parallel.plan import idle_share, messages
from nl_models.profiling.flops import count_flops
from nl_models.profiling.plan import Plan, of_depth, plan_training_step
from nl_models.training.config import TrainConfig
from nl_models.training.distributed import check_shares, computes_in_bf16
from nl_models.training.model import build_optimizer, hope_config


@dataclass(frozen=True)
class RunPlan:
    """A step of a run, of the rank that has most to do.

    Attributes:
        config, mesh: what is planned.
        parameters: of the model, all of them.
        rank: memory, operators and bytes sent.
        flops: of the model on one token, forward, backward and what checkpoints compute anew; products,
            convolutions and attention, counted in the PyTorch path.
        idle: the share of a step for which a rank waits for the one before.
    """

    config: TrainConfig
    mesh: Mesh
    parameters: int
    rank: Plan
    flops: float
    idle: float


def plan_run(config: TrainConfig, mesh: Mesh, flops: float | None = None) -> RunPlan:
    """Plan a step of a run on tensors without data; nothing is trained, read or allocated.

    ``device="cpu"`` is planned for CPUs, everything else for GPUs with the kernels. Ranks that share a window
    work as :class:`nl_models.parallel.SequenceParallel` does. ``flops``: of a token, if they are known.

    Raises:
        ValueError: a mesh that this run cannot have.
    """
    check_shares(config, mesh)
    model = hope_config(config, vocabulary(config), 0)
    batch, length = config.batch_size // mesh.data, config.sequence_length // mesh.sequence
    low = computes_in_bf16(config.precision, "cpu" if config.device == "cpu" else "cuda")
    plan = plan_training_step(
        model,
        batch=batch,
        length=length,
        precision="bf16" if low else "fp32",
        block_checkpoints=config.gradient_checkpointing,
        passes=config.gradient_accumulation,
        ranks=mesh.data if mesh.sequence == 1 else 1,
        fsdp=config.fsdp and mesh.data > 1,
        heads=mesh.heads,
        optimizer=partial(build_optimizer, config=config),
        kernels=config.device != "cpu",
    )
    idle = 0.0
    if mesh.sequence > 1:
        with torch.device("meta"):
            whole = HopeForCausalLM(model)
        parts = parts_in_turn(batch, mesh.sequence)
        idle = idle_share(whole, mesh.sequence, parts)
        plan = replace(plan, calls=plan.calls * parts)
        plan = _with_messages(plan, whole, mesh, batch, length, config.gradient_accumulation, 2 if low else 4)
    if flops is None:
        flops = count_token_flops(model, config.sequence_length, config.gradient_checkpointing)
    return RunPlan(config, mesh, parameter_count(model), plan, flops, idle)


def _with_messages(
    plan: Plan, model: HopeForCausalLM, mesh: Mesh, batch: int, length: int, passes: int, element: int
) -> Plan:
    """What ranks that share a window send and hold besides: states, both ways; gradients in a ring."""
    # What goes out is packed and kept until it is received; what came in is as much as goes back.
    kept = max(messages(model, batch, [length] * mesh.sequence, element))
    gradients = 2 * plan.gradients * (mesh.ranks - 1) // mesh.ranks
    return replace(plan, peak=plan.peak + kept, sent=gradients + passes * kept)


def vocabulary(config: TrainConfig) -> int:
    """Ids of the run's tokenizer, for a BPE that is still to be trained those that it is to have."""
    if config.tokenizer == "bpe":
        return config.vocab_size
    return (ByteTokenizer() if config.tokenizer == "bytes" else open_tokenizer(config.tokenizer)).vocab_size


def count_token_flops(config: HopeConfig, length: int, block_checkpoints: bool = False) -> float:
    """Operations on one token of a window: forward, backward, and what checkpoints compute anew.

    They grow linearly with depth and, attention included, as a polynomial of the second degree with the
    length, from windows of two chunks on. So a few small cases, on tensors without data, give the rest.
    """
    depth = config.num_hidden_layers
    alike = len(set(config.layer_types)) == 1
    chunks = [level.chunk_size or 1 for level in config.make_continuum_levels()]
    unit = math.lcm(*chunks, config.memory_chunk_size, config.memory_generator_chunk_size or 1)
    lengths = [2 * unit, 3 * unit, 4 * unit] if length > 4 * unit else [length]

    def of_length(tokens: int) -> int:
        if not alike or depth <= 2:
            return _count(config, tokens, block_checkpoints)
        one, two = (_count(of_depth(config, n), tokens, block_checkpoints) for n in (1, 2))
        return two + (two - one) * (depth - 2)

    counts = [of_length(tokens) for tokens in lengths]
    if len(counts) == 1:
        return counts[0] / length
    x = length / unit - 2
    first, second = counts[1] - counts[0], counts[2] - 2 * counts[1] + counts[0]
    return (counts[0] + x * first + x * (x - 1) / 2 * second) / length  # Newton's polynomial


def _count(config: HopeConfig, length: int, block_checkpoints: bool) -> int:
    config = copy.deepcopy(config)
    config.memory_impl = config.continuum_impl = None
    with FakeTensorMode():
        model = HopeForCausalLM(config).train()
        if block_checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.zeros(1, length, dtype=torch.int64)
        return count_flops(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward())


def described(found: RunPlan) -> dict[str, str]:
    """The plan in words, by what they are of."""
    config, mesh, rank = found.config, found.mesh, found.rank
    tokens = config.batch_size // mesh.data * config.sequence_length // mesh.sequence
    kind = "one process"
    if mesh.ranks > 1:
        weights = "sharded" if config.fsdp else "whole on each"
        kind = f"{mesh.ranks} ranks ({mesh}), weights {weights if mesh.heads == 1 else 'shared out by head'}"
    passes = f"{config.gradient_accumulation} x " if config.gradient_accumulation > 1 else ""
    recomputed = ", a checkpoint a block" if config.gradient_checkpointing else ""
    waits = f", and waits {found.idle:.0%} of a step" if mesh.sequence > 1 else ""
    parts = {"weights": rank.parameters, "gradients": rank.gradients, "optimizer": rank.optimizer}
    return {
        "model": f"{config.model}, {found.parameters:,} parameters, on {kind}",
        "step": f"{config.tokens_per_step:,} tokens, a rank {passes}{tokens:,}{recomputed}",
        "memory": ", ".join(f"{name} {decimal(size)}" for name, size in parts.items()),
        "peak": f"{decimal(rank.peak)} a rank, of it activations and the gradients so far "
        f"{decimal(rank.activations)}",
        "compute": f"{found.flops / 1e9:.3g} GFLOP a token, {found.flops / found.parameters:.1f} FLOP a "
        f"parameter; {rank.calls:,} operators a step",
        "sent": f"a rank sends {decimal(rank.sent)} a step{waits}",
    }
