"""Launch parameters of ``delta_memory``: pure functions of shapes, dtype and architecture.

The numbers come from ahead-of-time compilation (registers, spills and shared memory against each
architecture's limits), not from timings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nl_kernels.triton_support.kernel_call import KernelCall
from nl_kernels.triton_support.targets import TARGETS
from nl_kernels.triton_support.tiles import MIN_TILE, padded, power_of_two

MAX_HEAD_DIM = 256
"""Largest key or value width of a head that the kernels take."""


@dataclass(frozen=True)
class Precision:
    """How the three kinds of products compute (names of :func:`triton_support.language.matmul`).

    Attributes:
        inputs: products of two inputs (keys with keys, queries with keys).
        state: products with a computed factor (states, transformed values, gradients).
        solve: the triangular inverse and the products of decay matrices.
        workspace: dtype of the tensors that one kernel hands to the next.
    """

    inputs: str
    state: str
    solve: str
    workspace: torch.dtype


@dataclass(frozen=True)
class Config:
    """Tiles and resources of one kernel."""

    block_k: int
    block_v: int
    num_warps: int
    num_stages: int


def precision_of(dtype: torch.dtype, architecture: str) -> Precision:
    """Precisions for inputs of ``dtype`` on ``architecture``.

    bf16: operands are rounded to bf16 (it has fp32's range), the solve runs in tf32, which even cut off is
    twice as fine as the bf16 that its result is rounded to. fp16: its range cannot hold a state, so
    computed factors use tf32, which rounded has the same 10-bit mantissa. fp32: three-pass tf32 on NVIDIA
    (about 2^-21 a product, on tensor cores), plain fp32 matrix instructions on AMD.
    """
    if dtype == torch.bfloat16:
        return Precision("bf16", "bf16", "tf32", torch.bfloat16)
    if dtype == torch.float16:
        return Precision("fp16", "rounded tf32", "rounded tf32", torch.float32)
    full = "ieee" if architecture.startswith("gfx") else "tf32x3"
    return Precision(full, full, full, torch.float32)


def chunk_rows(chunk_size: int, dtype: torch.dtype, has_momentum: bool) -> int:
    """Tokens a kernel takes at once. The result does not depend on it, so ``chunk_size`` is a hint here:
    rounded up to a power of two from 16, and capped by what fits. With momentum there are so many matrices of
    pairs of tokens that with 64 only one program would fit a multiprocessor."""
    cap = 64 if dtype == torch.bfloat16 and not has_momentum else 32
    return max(MIN_TILE, min(cap, power_of_two(chunk_size)))


def config_of(
    kernel: str,
    *,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    architecture: str,
    has_momentum: bool,
    rows: int,
) -> Config:
    """Tiles, warps and stages of ``kernel`` (its function's name without ``_kernel``) for ``rows`` states.

    4 warps where registers allow, so that two programs and more share a multiprocessor.
    """
    key, value = padded(key_dim), padded(value_dim)
    if kernel == "step":
        return Config(key, min(32, value), 4, 1)
    wide, amd = dtype != torch.bfloat16, architecture.startswith("gfx")
    if kernel in ("scan_chunks", "scan_gradients", "join_segments"):
        # The whole key width of the state is in registers: the tile of the value width is what gives.
        carried = key * (2 if has_momentum else 1) * (2 if kernel == "scan_gradients" else 1)
        few = rows * -(-value_dim // 32) < TARGETS[architecture].multiprocessors
        block_v = 16 if carried > 128 or wide or amd or few else 32
        large = carried > 256 and (wide or key > 128)
        warps = 8 if large or (dtype == torch.float32 and key > 64) else 4
        return Config(key, min(block_v, value), warps, 1 if wide or amd or key > 128 else 2)
    if wide:
        # Where matrices of pairs of tokens are many, it takes 8 warps not to spill.
        warps = 8 if has_momentum and kernel not in ("read_chunks", "state_gradients") else 4
        block_k = 16 if kernel == "state_gradients" and has_momentum else 32
        block_v = 16 if kernel == "state_gradients" or has_momentum else 32
        return Config(min(block_k, key), min(block_v, value), warps, 1)
    block_k = 32 if kernel == "state_gradients" or has_momentum else 64
    block_v = 64 if kernel in ("solve_chunks", "read_chunks") and not has_momentum else 32
    block_v = 16 if kernel == "state_gradients" and has_momentum else block_v
    return Config(min(block_k, key), min(block_v, value), 4, 2)


def segments_of(rows: int, chunks: int, key_dim: int, value_dim: int, architecture: str) -> int:
    """Parts of a scan over ``chunks`` chunks of each of ``rows`` states that run side by side.

    What a part does to any state is computed first, which triples the work: only where several times as many
    multiprocessors would idle, and parts are long.
    """
    if key_dim > 128:
        return 1
    idle = 2 * TARGETS[architecture].multiprocessors // (rows * -(-value_dim // 32))
    segments = min(16, idle, chunks // 32)
    return segments if segments >= 6 else 1


_OPTIONAL = (
    *("chunk_table", "cu_seqlens", "chunk_offsets", "segment_maps", "segment_states", "inverse"),
    *("pairs", "momentum_key_transform", "chunk_momenta", "final_momentum"),
)

Launch = Callable[[dict[str, Any]], KernelCall]
Buffer = tuple[str, tuple[int, ...], torch.dtype]
"""Name, shape and dtype of what a kernel fills."""


@dataclass(frozen=True, eq=False)
class ChunkPlan:
    """How calls of one kind are cut into chunks, and what all of their kernels share.

    Attributes:
        chunks: programs along the chunk axis; with packed sequences an upper bound, so that planning need
            not wait for the device to read the lengths.
        heads, group: heads of values, and how many of them share a head of keys.
        sequences: states, B or N.
        segments: parts of each sequence that the forward scan takes side by side.
    """

    batch: int
    tokens: int
    heads: int
    group: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    architecture: str
    has_momentum: bool
    block_c: int
    chunks: int
    sequences: int
    segments: int

    @functools.cached_property
    def defaults(self) -> dict[str, int | None]:
        """Arguments that are the same in all calls of this kind; ``None`` for tensors that it may lack."""
        numbers = {"T": self.tokens, "H": self.heads, "segments": self.segments}
        return dict.fromkeys(_OPTIONAL) | numbers

    @functools.cached_property
    def precision(self) -> Precision:
        return precision_of(self.dtype, self.architecture)

    def config(self, kernel: Any) -> Config:
        """The table's row for ``kernel`` in this plan."""
        name = kernel.__name__.removesuffix("_kernel")
        segments = self.segments if name in ("scan_chunks", "join_segments") else 1
        return config_of(
            name,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            dtype=self.dtype,
            architecture=self.architecture,
            has_momentum=self.has_momentum,
            rows=self.sequences * self.heads * segments,
        )

    def tiles(self, kernel: Any, width: str | None) -> int:
        """How many tiles ``kernel`` cuts the "key" or "value" width into; one if ``None``."""
        config = self.config(kernel)
        if width == "key":
            return -(-self.key_dim // config.block_k)
        return -(-self.value_dim // config.block_v) if width else 1

    def launch(
        self,
        kernel: Any,
        *,
        tiles: str | None = None,
        scan: bool = False,
        of_keys: bool = False,
        read: str = "after",
        key_tiles: int = 1,
        segments: int = 1,
        summary: bool = False,
    ) -> Launch:
        """What makes the call of ``kernel`` of all arguments by name, of which it takes its own.

        Args:
            tiles: the width ("key" or "value") that the second grid axis tiles; None for no such axis.
            scan: one program a sequence instead of one a chunk.
            of_keys: one program a head of keys instead of one a head of values.
            read: the op's option, for the kernels that have it.
            key_tiles: how many tiles another kernel has cut the key width into.
            segments: programs a sequence of a scan.
            summary: whether a scan computes what its segments do to any state.
        """
        config = self.config(kernel)
        heads = self.heads // self.group if of_keys else self.heads
        programs = (self.sequences * segments if scan else self.chunks) * heads
        maps = -(-self.key_dim // config.block_v) if summary else 0
        constants = {
            "KEY_DIM": self.key_dim,
            "VALUE_DIM": self.value_dim,
            "GROUP": self.group,
            "MOMENTUM": self.has_momentum,
            "BEFORE": read == "before",
            "KEY_TILES": key_tiles,
            "SUMMARY": summary,
            "BLOCK_C": self.block_c,
            "BLOCK_K": config.block_k,
            "BLOCK_V": config.block_v,
            "INPUTS": self.precision.inputs,
            "STATE": self.precision.state,
            "SOLVE": self.precision.solve,
        }
        taken = dict.fromkeys(name for name in kernel.arg_names if name not in constants)
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        grid, resources = (programs, self.tiles(kernel, tiles) + maps), (config.num_warps, config.num_stages)

        def call(given: dict[str, Any]) -> KernelCall:
            arguments = taken.copy()
            for name in arguments:
                arguments[name] = given[name]
            return KernelCall(kernel, grid, arguments, constants, *resources)

        return call


def plan_chunks(
    *tensors: torch.Tensor | None, chunk_size: int, architecture: str
) -> tuple[ChunkPlan, dict[str, torch.Tensor | int | None]]:
    """Cut a call into chunks: the plan of its kind, and the arguments that its kernels start from.

    Takes the tensors named by :data:`INPUTS`, then ``cu_seqlens``.
    Packed sequences get index tables, made on the device without waiting for it: ``chunk_table``, first token
    and number of tokens (0: unused) of each chunk, int64 [chunks, 2]; ``cu_seqlens`` and ``chunk_offsets``,
    first token and first chunk of each sequence, int64 [N + 1].

    Raises:
        NotImplementedError: a head wider than :data:`MAX_HEAD_DIM`, or fp64.
    """
    q, k, v, _, _, momentum, _, _, cu_seqlens = tensors
    plan = _plan(
        v.shape,
        k.shape,
        None if cu_seqlens is None else cu_seqlens.numel() - 1,
        (q.dtype, k.dtype, v.dtype),
        architecture,
        momentum is not None,
        chunk_size,
    )
    given = plan.defaults.copy()
    given.update(zip(INPUTS, tensors))
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int64)
        per_sequence = (cu_seqlens.diff() + plan.block_c - 1) // plan.block_c
        chunk_offsets = torch.nn.functional.pad(per_sequence.cumsum(0), (1, 0))
        chunk = torch.arange(plan.chunks, device=k.device)
        sequence = torch.searchsorted(chunk_offsets, chunk, right=True) - 1
        sequence = sequence.clamp(max=plan.sequences - 1)
        start = cu_seqlens[sequence] + (chunk - chunk_offsets[sequence]) * plan.block_c
        count = (cu_seqlens[sequence + 1] - start).clamp(0, plan.block_c)
        table = torch.stack((start, count), dim=1)
        given |= {"chunk_table": table, "cu_seqlens": cu_seqlens, "chunk_offsets": chunk_offsets}
    return plan, given


@functools.lru_cache(maxsize=512)
def _plan(
    values: torch.Size,
    keys: torch.Size,
    packed: int | None,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    architecture: str,
    has_momentum: bool,
    chunk_size: int,
) -> ChunkPlan:
    """The plan for v and k of these shapes, of ``packed`` sequences or of one a row; dtypes of q, k and v."""
    batch, tokens, heads, value_dim = values
    key_dim, dtype = keys[-1], operand_dtype(*dtypes)
    check_head_dims(key_dim, value_dim)
    block_c = chunk_rows(chunk_size, dtype, has_momentum)
    if packed is None:
        chunks, sequences = batch * -(-tokens // block_c), batch
    else:
        chunks, sequences = tokens // block_c + packed, packed
    segments = segments_of(sequences * heads, chunks // sequences, key_dim, value_dim, architecture)
    return ChunkPlan(
        batch=batch,
        tokens=tokens,
        heads=heads,
        group=heads // keys[2],
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=dtype,
        architecture=architecture,
        has_momentum=has_momentum,
        block_c=block_c,
        chunks=chunks,
        sequences=sequences,
        segments=1 if has_momentum else segments,
    )


def operand_dtype(q: torch.dtype, k: torch.dtype, v: torch.dtype) -> torch.dtype:
    """The dtype whose precision serves products of q, k and v of these dtypes.

    Raises:
        NotImplementedError: fp64.
    """
    dtype = torch.promote_types(torch.promote_types(q, k), v)
    if dtype == torch.float64:
        raise NotImplementedError(
            "q, k, v: the Triton kernels of delta_memory take bfloat16, float16 and float32, got float64; "
            "use impl='eager' or impl='reference'"
        )
    return dtype


def check_head_dims(key_dim: int, value_dim: int) -> None:
    """Refuse heads that the kernels cannot hold.

    Raises:
        NotImplementedError: wider than :data:`MAX_HEAD_DIM`.
    """
    for name, size in (("q, k", key_dim), ("v", value_dim)):
        if size > MAX_HEAD_DIM:
            raise NotImplementedError(
                f"{name}: the Triton kernels of delta_memory take heads up to {MAX_HEAD_DIM} wide, "
                f"got {size}; use impl='eager'"
            )


def allocated(buffers: list[Buffer], *like: torch.Tensor) -> dict[str, torch.Tensor]:
    """``buffers`` by name, on the device of ``like``: tensors of all their dtypes."""
    # A dtype asked for, and sizes in a tuple, would take half as long again.
    of = {x.dtype: x.new_empty for x in like}
    return {name: of[dtype](*shape) for name, shape, dtype in buffers}


INPUTS = ("q", "k", "v", "log_decay", "erase", "momentum", "initial_state", "initial_momentum")
"""The operators' tensors, in their order; bounds of packed sequences follow."""


def prepared(inputs: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    """Tensors row-major, as the kernels index them; rates and states (from the fourth) in fp32."""
    fp32 = contiguous_fp32(*inputs[3 : len(INPUTS)])
    return (*(x.contiguous() for x in inputs[:3]), *fp32, *inputs[len(INPUTS) :])


def contiguous_fp32(*tensors: torch.Tensor | None) -> Iterator[torch.Tensor | None]:
    """Each tensor row-major and in fp32."""
    return (None if tensor is None else tensor.float().contiguous() for tensor in tensors)
