"""What the kernels take, as named tuples: pointers, and what they are compiled for."""

from __future__ import annotations

import functools
from collections import namedtuple
from typing import Any, NamedTuple


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
        FIRST_SIZE, LAST_SIZE: numbers in the first and in the last layers of a head's bank;
        FIRST_KEPT, LAST_KEPT: of a copy in scratch, padded.
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
    FIRST_KEPT: int
    LAST_KEPT: int


@functools.lru_cache(maxsize=512)
def compiled_of(shape: Shape, *, backward: bool, **rule: Any) -> tuple:
    """All that a kernel is compiled for, its ``BANK``: sizes, rule, and where its scratch memory has what.

    ``rule`` is what of a :class:`~nl_kernels.memory_rule.MemoryRule` and of a call the kernels depend on.
    ``FIRST`` and ``LAST`` are copies of the layers' weights (:mod:`.learn`). Tokens lie in both forms of
    :func:`~.fragments.put_rows`, one matrix, or one for each memory: of ``INPUTS`` three, and ``KEY`` has all
    that memories make, ``VALUE`` its second matrix; ``EXACT`` has the same before rounding. From ``OMEGA`` on
    all are of the backward pass: ω, gradients, pairs of tokens, blocks' shares. ``SIZE``: of all, in fp32.
    """
    memories, copies, chunk = shape.BLOCKS // shape.PER, 9 if backward else 6, shape.BLOCK_C
    outputs = 2 * memories * shape.BLOCK_V * chunk
    hidden = 2 * memories * shape.BLOCK_H * chunk if shape.HIDDEN else 0
    keys, pairs = 2 * shape.BLOCK_K * chunk, 2 * shape.BLOCKS * chunk * chunk
    made, first_pairs = outputs if rule["GENERATES"] else 0, pairs if shape.HIDDEN else 0
    sizes = {
        "FIRST": copies * shape.FIRST_KEPT,
        "LAST": copies * shape.LAST_KEPT,
        "INPUTS": 3 * keys if rule["GENERATES"] else 0,
        "KEY": made or keys,
        "VALUE": 0 if made else 2 * shape.BLOCK_V * chunk,
        "EXACT": made // 2,
        "QUERY": keys,
        "VECTORS": 16 * chunk,
        "DECAYS": 2 * chunk * chunk,
        "HIDDEN_MADE": hidden if rule["GENERATES"] else 0,
        **{f"HIDDEN_{name}": hidden for name in ("KEY", "VALUE", "QUERY")},
        "ERROR": outputs if shape.HIDDEN else 0,
        **dict.fromkeys(("INVERSE", "SCORES"), pairs),
        **dict.fromkeys(("INVERSE_FIRST", "SCORES_FIRST"), first_pairs),
    }
    back = {
        **dict.fromkeys(("OMEGA", "READ", "RECALLED", "D_ERROR"), outputs),
        **dict.fromkeys(
            ("OMEGA_FIRST", "RECALLED_FIRST", "D_BACK", "D_KEY", "D_VALUE", "D_QUERY", "D_Z"), hidden
        ),
        "D_MADE": made,
        **dict.fromkeys(("GRAM", "PAIRS"), pairs),
        **dict.fromkeys(("GRAM_FIRST", "PAIRS_FIRST"), first_pairs),
        "RATES": 3 * shape.BLOCKS * chunk,
        "SHARES": 3 * shape.BLOCKS * shape.BLOCK_K * chunk,
    }
    starts, total = {}, 0
    for name, size in (sizes | back).items():
        starts[name] = total
        total += -(-size // 16) * 16 if backward or name in sizes else 0
    if made:
        starts["VALUE"] = starts["KEY"] + keys // (2 if rule["PRECISION"] in ("bf16", "fp16") else 1)
    return _compiled((*rule, *starts))(*shape, *rule.values(), *starts.values(), total)


@functools.cache
def _compiled(names: tuple[str, ...]) -> type:
    return namedtuple("Compiled", (*Shape._fields, *names, "SIZE"))
