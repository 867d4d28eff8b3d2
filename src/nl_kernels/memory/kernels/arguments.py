"""What the kernels take, as named tuples: pointers, and what they are compiled for."""

from __future__ import annotations

import functools
from collections import namedtuple
from typing import Any, NamedTuple

from nl_kernels.memory_rule import MemoryRule
from nl_kernels.triton_support.tiles import MIN_TILE, padded, power_of_two

MOST_WARPS = 16


class Tokens(NamedTuple):
    """Tokens as the caller has them, [B, T, H, ·]; absent where the bank does not take or make them.

    Attributes:
        query, key, value: of given targets q, k, v; of a bank that makes its own the inputs of its memories.
        gate: [B, T, H, D], input of the gates; of given targets ``None``, and then
        rate, log_decay: [B, T, H], elsewhere ``None``; ``rate`` of a bank that makes its own may be the scale
            of what the memory that is read writes.
        rate_max, rate_bias, retention_bias: [H], of a bank that makes its own.
        spans: [B, 3] int64, slot of a sequence's first number, of its first token, and after its last one;
            ``None``: all sequences begin at ``offset`` and have all tokens.
    """

    query: Any
    key: Any
    value: Any
    gate: Any
    rate: Any
    log_decay: Any
    rate_max: Any
    rate_bias: Any
    retention_bias: Any
    spans: Any


class Bank(NamedTuple):
    """Weights of all memories of N = B · H heads: first layers [N, M · h, D], last layers [N, rows, in].

    The rows of last layers lie one memory below the other, those of gates last. Linear memories have last
    layers alone; where there are no weights both are absent.
    """

    first: Any
    last: Any


class Options(NamedTuple):
    """What the operators take besides tensors, in the order of their schema.

    Attributes:
        activation, normalize_hidden, residual, error_bound: of :class:`~nl_kernels.memory_rule.MemoryRule`;
            ``error_bound`` 0 for none.
        erases: ``rule.erase`` is "per_layer", not "none".
        at_anchor: linear memories' errors are taken at the anchor.
        read: "running" or "snapshot".
        chunk_size, generator_chunk_size: tokens between snapshots of the memory that is read, and of others.
        truncate: tokens between cuts of the gradient, 0 for none.
        checkpoint_every: chunks between the states kept for the backward pass; 0 keeps none.
        precision: of the products, a name of :func:`nl_kernels.triton_support.language.matmul`.
        offset: slot of the first token, where all sequences have the same.
        slots: slots of the grid, from the boundary before the first token.
        architecture: whose launch parameters to take.
    """

    activation: str
    normalize_hidden: bool
    residual: bool
    error_bound: float
    erases: bool
    at_anchor: bool
    read: str
    chunk_size: int
    generator_chunk_size: int
    truncate: int
    checkpoint_every: int
    precision: str
    offset: int
    slots: int
    architecture: str

    @classmethod
    def of(cls, rule: MemoryRule, **others: Any) -> Options:
        """Those of a rule, and the others by name."""
        return cls(
            activation=rule.activation,
            normalize_hidden=rule.normalize_hidden,
            residual=rule.residual,
            error_bound=float(rule.error_bound or 0),
            erases=rule.erase != "none",
            at_anchor=rule.errs_at_anchor(linear=True),
            **others,
        )

    @property
    def chunk(self) -> int:
        """Tokens of a chunk: of the faster clock."""
        return min(self.chunk_size, self.generator_chunk_size)

    @property
    def chunks(self) -> int:
        """Chunks of the grid."""
        return -(-self.slots // self.chunk)

    @property
    def ratio(self) -> int:
        """Chunks of the slower clock's period."""
        return max(self.chunk_size, self.generator_chunk_size) // self.chunk


@functools.lru_cache(maxsize=512)
def compiled_of(
    options: Options,
    key_dim: int,
    value_dim: int,
    hidden: int,
    *,
    generates: bool,
    anchored: bool,
    scaled: bool,
    backward: bool,
) -> Any:
    """All that a kernel is compiled for, its ``BANK``: sizes, rule, and where its scratch memory has what.

    MEMORIES: in a bank; WIDE: of these with ``VALUE_DIM`` outputs, the rest have ``NARROW``. OWN: the memory
    that is read. HIDDEN is 0 of linear memories. CHUNK: tokens; MEMORY_CLOCK, OTHERS_CLOCK: between snapshots
    of the memory that is read, and of the others; TRUNCATE: between cuts of the gradient, or 0. PER: blocks
    of rows that a memory's layer is cut into; BLOCKS: of the whole bank, a power of two. SLICE: columns of a
    matrix that are held at a time. BLOCK_C, BLOCK_K, BLOCK_V, BLOCK_H: padded sizes.

    FIRST and LAST are the layers; of linear memories there is no FIRST. INDEX: in a :class:`Bank`. OUT:
    outputs of its WIDE memories, the rest have NARROW; WIDTH: padded. IN: inputs; BLOCK: padded. NUMBERS: in
    a head's weights; KEPT: in a copy in scratch, padded. UPTO: the last memory with tokens of its own: 0
    where all take the same. The rest is where scratch has what of a layer:

    * its weights, in fp32 and as operands of products: the running ``STATE``, the ``SNAPSHOT``, the
      ``ANCHOR``; ``BASE_OPERAND`` is what the layer is applied at: snapshot and anchor. The backward pass has
      the snapshot that the call began with (``RESUMED``), and gradients in ``STATE`` and ``SNAPSHOT``;
    * the tokens that it takes in, in both forms of :func:`~.fragments.put_rows`, one matrix, or one for each
      memory: ``KEY`` has all that memories make, ``VALUE`` its second matrix, ``INPUTS`` are three; ``EXACT``
      has what is made before rounding;
    * in the backward pass ω, gradients (``D_KEY``: of what the layer makes of its keys), pairs of tokens,
      blocks' shares.

    ``SIZE``: of all scratch, in fp32.

    Args:
        options: the same for all calls that run the same code.
        generates: memories make their own tokens; ``scaled``: what the memory that is read writes is.
        anchored: there is an anchor.
        backward: of the backward pass.
    """
    memories = (5 if hidden else 4) if generates else 1
    padded_memories, chunk = power_of_two(memories), padded(options.chunk)
    block_k, block_v, block_h = padded(key_dim), padded(value_dim), padded(hidden) if hidden else MIN_TILE
    many = max(block_k, block_v, block_h) > 64 or padded_memories > 4
    most = MOST_WARPS if many else MOST_WARPS // 2
    narrowest = min(block_v, block_h) if hidden else block_v
    per = max(1, min(narrowest // MIN_TILE, most // padded_memories))
    blocks = padded_memories * per
    columns = min(32, block_k, block_v, block_h) if hidden else min(32, block_k)
    sizes = {
        "MEMORIES": memories,
        "WIDE": min(memories, 3),
        "NARROW": (1 if hidden else 2) if generates else 0,
        "OWN": 2 if generates else 0,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "HIDDEN": hidden,
        "CHUNK": options.chunk,
        "MEMORY_CLOCK": options.chunk_size,
        "OTHERS_CLOCK": options.generator_chunk_size,
        "TRUNCATE": options.truncate,
        "PER": per,
        "BLOCKS": blocks,
        # The fewer columns are for shared memory.
        "SLICE": 16 if backward and blocks == MOST_WARPS and block_k > 64 else columns,
        "BLOCK_C": chunk,
        "BLOCK_K": block_k,
        "BLOCK_V": block_v,
        "BLOCK_H": block_h,
        "GENERATES": generates,
        "RUNNING": options.read == "running",
        "ANCHORED": anchored,
        "ACTIVATION": options.activation,
        "NORMALIZED": options.normalize_hidden,
        "RESIDUAL": options.residual,
        "ERASES": options.erases,
        "AT_ANCHOR": options.at_anchor and not hidden,  # linear memories' errors at keys
        "SCALED": scaled,
        "BOUND": options.error_bound,
        "PRECISION": options.precision,
        "BACKWARD": backward,
    }
    first_kept = padded_memories * block_h * block_k if hidden else 0
    last_kept = padded_memories * block_v * (block_h if hidden else block_k)
    outputs, hiddens = (2 * padded_memories * block * chunk for block in (block_v, hidden and block_h))
    keys, pairs = 2 * block_k * chunk, 2 * blocks * chunk * chunk
    made, first_pairs = outputs if generates else 0, pairs if hidden else 0
    copies = ["STATE_OPERAND", "BASE_OPERAND", "ANCHOR_OPERAND", "ANCHOR", "STATE", "SNAPSHOT"]
    copies += ["RESUMED", "D_ANCHOR", "D_STATE_OPERAND"] if backward else []
    rooms = {
        **{f"FIRST_{copy}": first_kept for copy in copies},
        **{f"LAST_{copy}": last_kept for copy in copies},
        "INPUTS": 3 * keys if generates else 0,
        "KEY": made or keys,
        "VALUE": 0 if made else 2 * block_v * chunk,
        "EXACT": made // 2,
        "QUERY": keys,
        "VECTORS": 16 * chunk,
        "DECAYS": 2 * chunk * chunk,
        "HIDDEN_INPUTS": hiddens if generates else 0,
        **dict.fromkeys(("HIDDEN_KEY", "HIDDEN_VALUE", "HIDDEN_QUERY"), hiddens),
        "ERROR": outputs if hidden else 0,
        **dict.fromkeys(("LAST_INVERSE", "LAST_SCORES"), pairs),
        **dict.fromkeys(("FIRST_INVERSE", "FIRST_SCORES"), first_pairs),
    }
    if backward:
        rooms |= {
            **dict.fromkeys(("LAST_OMEGA", "LAST_D_QUERY", "LAST_RECALLED", "LAST_D_KEY"), outputs),
            **dict.fromkeys(
                ("FIRST_OMEGA", "FIRST_RECALLED", "D_BACK", "FIRST_D_KEY", "FIRST_D_VALUE"), hiddens
            ),
            **dict.fromkeys(("FIRST_D_QUERY", "FIRST_D_MADE"), hiddens),
            "LAST_D_MADE": made,
            **dict.fromkeys(("LAST_GRAM", "LAST_PAIRS"), pairs),
            **dict.fromkeys(("FIRST_GRAM", "FIRST_PAIRS"), first_pairs),
            "RATES": 3 * blocks * chunk,
            "SHARES": 3 * blocks * block_k * chunk,
        }
    starts, total = {}, 0
    for name, size in rooms.items():
        starts[name] = total
        total += -(-size // 16) * 16
    if made:
        starts["VALUE"] = starts["KEY"] + keys // (2 if options.precision in ("bf16", "fp16") else 1)

    layers = {}
    for name, out, width, wide, narrow, kept in (
        ("FIRST", hidden, block_h, memories, 0, first_kept),
        ("LAST", value_dim, block_v, sizes["WIDE"], sizes["NARROW"], last_kept),
    ):
        enters = name == "FIRST" or not hidden
        width_in = key_dim if enters else hidden
        tokens = {x: starts[x if enters else f"HIDDEN_{x}"] for x in ("KEY", "VALUE", "QUERY", "INPUTS")}
        made = {x.removeprefix(f"{name}_"): starts.pop(x) for x in [*starts] if x.startswith(name)}
        layer = {
            "INDEX": len(layers),
            "OUT": out,
            "WIDE": wide,
            "NARROW": narrow,
            "WIDTH": width,
            "IN": width_in,
            "BLOCK": block_k if enters else block_h,
            "NUMBERS": (wide * out + (memories - wide) * narrow) * width_in,
            "KEPT": kept,
            "UPTO": 0 if enters else blocks,
        }
        layers[name] = _named(layer | tokens | made)
    return _named(sizes | starts | layers | {"SIZE": total})


def _named(values: dict[str, Any]) -> Any:
    return _kind(tuple(values))(**values)


@functools.cache
def _kind(names: tuple[str, ...]) -> type:
    return namedtuple("Compiled", names)
