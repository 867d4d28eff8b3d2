"""What the kernels take, as named tuples: pointers, and what they are compiled for."""

from __future__ import annotations

from typing import Any, NamedTuple


class Tokens(NamedTuple):
    """Tokens as the caller has them, [B, T, H, ·]; absent where the bank does not take or make them.

    Attributes:
        query, key, value: of given targets q, k, v; of a bank that makes its own the inputs of its memories.
        gate: [B, T, H, D], input of the gates; of given targets ``None``, and then
        rate, log_decay: [B, T, H], elsewhere ``None``.
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


class Shape(NamedTuple):
    """Sizes that a kernel is compiled for.

    Attributes:
        MEMORIES: in a bank; WIDE: of these with ``VALUE_DIM`` outputs, the rest have ``NARROW``. OWN: the
        memory that is read. KEY_DIM, VALUE_DIM, HIDDEN: widths; HIDDEN is 0 of linear memories. CHUNK:
        tokens; MEMORY_CLOCK, OTHERS_CLOCK: tokens between snapshots of the memory that is read, and
            of the others; TRUNCATE: tokens between cuts of the gradient, or 0.
        PER: blocks of rows that a memory's layer is cut into; BLOCKS: of the whole bank, a power of two.
        SLICE: columns of a matrix that are held at a time.
        BLOCK_C, BLOCK_K, BLOCK_V, BLOCK_H: padded sizes of a chunk and of the widths.
        LAST_IN, LAST_BLOCK: inputs of the last layers, and padded.
        FIRST_SIZE, LAST_SIZE: numbers in the first and in the last layers of a head's bank.
    """

    MEMORIES: int
    WIDE: int
    NARROW: int
    OWN: int
    KEY_DIM: int
    VALUE_DIM: int
    HIDDEN: int
    CHUNK: int
    MEMORY_CLOCK: int
    OTHERS_CLOCK: int
    TRUNCATE: int
    PER: int
    BLOCKS: int
    SLICE: int
    BLOCK_C: int
    BLOCK_K: int
    BLOCK_V: int
    BLOCK_H: int
    LAST_IN: int
    LAST_BLOCK: int
    FIRST_SIZE: int
    LAST_SIZE: int


class Rule(NamedTuple):
    """What of a :class:`~nl_kernels.memory_rule.MemoryRule` and of a call a kernel is compiled for."""

    GENERATES: bool
    RUNNING: bool
    ANCHORED: bool
    ACTIVATION: str
    NORMALIZED: bool
    RESIDUAL: bool
    ERASES: bool
    BOUND: float
    PRECISION: str


class Places(NamedTuple):
    """Where tiles of a chunk lie in a program's scratch memory, by which warps hand them to one another.

    Tokens are [width, C], or [memories, width, C] for hidden layers and outputs. ``MADE`` has the outputs of
    the memories that make keys, values and gates. From ``OMEGA`` on all are of the backward pass: ω,
    gradients, and matrices of pairs of tokens [B, C, C], each for the last layers and for the first ones.
    ``…_BASE`` are the weights that the layers are applied at.
    """

    FIRST_BASE: int
    LAST_BASE: int
    MADE: int
    KEY: int
    VALUE: int
    QUERY: int
    VECTORS: int
    HIDDEN_MADE: int
    HIDDEN_KEY: int
    HIDDEN_VALUE: int
    HIDDEN_QUERY: int
    ERROR: int
    OMEGA: int
    OMEGA_FIRST: int
    READ: int
    RECALLED: int
    RECALLED_FIRST: int
    D_ERROR: int
    D_BACK: int
    D_KEY: int
    D_VALUE: int
    D_QUERY: int
    D_MADE: int
    INVERSE: int
    INVERSE_FIRST: int
    SCORES: int
    SCORES_FIRST: int
    GRAM: int
    GRAM_FIRST: int
    PAIRS: int
    PAIRS_FIRST: int
    RATES: int
    SHARES: int
    SIZE: int


def places_of(shape: Shape, rule: Rule, *, backward: bool) -> Places:
    """One region after another."""
    memories = shape.BLOCKS // shape.PER
    outputs, hidden = memories * shape.BLOCK_V, memories * shape.BLOCK_H if shape.HIDDEN else 0
    pairs = shape.BLOCKS * shape.BLOCK_C
    first_pairs = pairs if shape.HIDDEN else 0
    columns = {
        "MADE": outputs if rule.GENERATES else 0,
        "KEY": 0 if rule.GENERATES else shape.BLOCK_K,
        "VALUE": 0 if rule.GENERATES else shape.BLOCK_V,
        "QUERY": shape.BLOCK_K,
        "VECTORS": 8,
        "HIDDEN_MADE": hidden if rule.GENERATES else 0,
        **{f"HIDDEN_{name}": hidden for name in ("KEY", "VALUE", "QUERY")},
        "ERROR": outputs if shape.HIDDEN else 0,
    }
    if backward:
        columns |= {
            "OMEGA": outputs,
            "OMEGA_FIRST": hidden,
            "READ": outputs,
            "RECALLED": outputs,
            "RECALLED_FIRST": hidden,
            "D_ERROR": outputs,
            **{f"D_{name}": hidden for name in ("BACK", "KEY", "VALUE", "QUERY")},
            "D_MADE": outputs if rule.GENERATES else 0,
            **dict.fromkeys(("INVERSE", "SCORES", "GRAM", "PAIRS"), pairs),
            **{f"{name}_FIRST": first_pairs for name in ("INVERSE", "SCORES", "GRAM", "PAIRS")},
            "RATES": 3 * shape.BLOCKS,
            "SHARES": 3 * shape.BLOCKS * shape.BLOCK_K,
        }
    starts, total = (
        {"FIRST_BASE": 0, "LAST_BASE": shape.FIRST_SIZE},
        -(-(shape.FIRST_SIZE + shape.LAST_SIZE) // 16) * 16,
    )
    for name, width in columns.items():
        starts[name] = total
        total += width * shape.BLOCK_C
    if rule.GENERATES:
        starts["KEY"], starts["VALUE"] = starts["MADE"], starts["MADE"] + shape.BLOCK_V * shape.BLOCK_C
    return Places(**{name: starts.get(name, 0) for name in Places._fields[:-1]}, SIZE=total)
