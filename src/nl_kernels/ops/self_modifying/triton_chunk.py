"""What the kernels of both kinds of memory share: rows, clocks, tokens and the gates' elementary functions.

One program walks over the chunks of one row, N = B · H in all. Tokens are [B, T, H, D] as the caller has
them. Slots count tokens since the slower clock's last boundary before the call; slot s holds token s −
``origin``, and the row's own tokens are those of slots ``begin`` … ``stop`` − 1.
"""

import triton
import triton.language as tl

from nl_kernels.chunk_kernels.adjoint import (
    decay_adjoint,
    mixed_adjoint,
    momentum_adjoint,
    momentum_gradient,
    read_adjoint,
    velocity_read_adjoint,
    write_adjoint,
)
from nl_kernels.chunk_kernels.forward import (
    carry_state,
    erase_matrices,
    mixed_spread,
    momentum_forward,
    proximal_rate,
    read_forward,
    row_dot,
    spread,
    write_forward,
)
from nl_kernels.triton_support.language import load_tile, matmul, store_tile

_TINY: tl.constexpr = tl.constexpr(1e-30)  # delta_chunk.TINY


@triton.jit
def locate_row(spans, sequence, offset, T):
    """``origin, begin, stop`` of a sequence: all the same, or from ``spans`` [B, 3] int64."""
    if spans is not None:
        origin = tl.load(spans + 3 * sequence)
        begin = tl.load(spans + 3 * sequence + 1)
        stop = tl.load(spans + 3 * sequence + 2)
    else:
        origin = offset + 0 * sequence
        begin = origin
        stop = origin + T
    return origin, begin, stop


@triton.jit
def clock(start, begin, stop, CLOCK: tl.constexpr, CHUNK: tl.constexpr, RESUMED: tl.constexpr):
    """``fresh, leaves`` of one clock for the chunk from slot ``start``.

    ``fresh``: a boundary of the clock lies before the chunk, so that the snapshot is the running state.
    ``leaves``: and that state is needed as a snapshot after the chunk, too. A resumed row brings its own
    snapshot even when it starts at a boundary.
    """
    fresh = start % CLOCK == 0
    if RESUMED:
        fresh = fresh & (start > begin)
    end = start + CHUNK
    return fresh, fresh & ((end % CLOCK != 0) | (end > stop))


@triton.jit
def locate_tokens(
    start, origin, begin, stop, sequence, head, T, H, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The tokens of a chunk as rows of [B · T · H, D], and which of the tile's rows hold one."""
    row = tl.arange(0, BLOCK_C)
    slot = start + row
    valid = (row < CHUNK) & (slot >= begin) & (slot < stop)
    return (sequence * T + slot - origin) * H + head, valid


@triton.jit
def base_of(
    running, snapshot, anchor, at, fresh, rows, ROWS: tl.constexpr, columns, COLUMNS: tl.constexpr,
    SNAPSHOTS: tl.constexpr,
):  # fmt: skip
    """The matrix that a layer serves with: its snapshot, with the anchor."""
    within = rows < ROWS
    if SNAPSHOTS:
        base = load_tile(running + at, rows, within & fresh, columns, COLUMNS)
        base += load_tile(snapshot + at, rows, within & (not fresh), columns, COLUMNS)
    else:
        base = load_tile(running + at, rows, within, columns, COLUMNS)
    if anchor is not None:
        base += load_tile(anchor + at, rows, within, columns, COLUMNS)
    return base


@triton.jit
def base_again(
    kept, resumed, anchor, kept_at, at, inside, rows, ROWS: tl.constexpr, columns, COLUMNS: tl.constexpr
):
    """What a memory served with: the state at its period's start, or before the call if not ``inside``.

    ``kept_at`` and ``at`` are offsets of the matrix in ``kept``, and in ``resumed`` and ``anchor``.
    """
    within = rows < ROWS
    if resumed is None:
        base = load_tile(kept + kept_at, rows, within, columns, COLUMNS)
    else:
        base = load_tile(kept + kept_at, rows, within & inside, columns, COLUMNS)
        base += load_tile(resumed + at, rows, within & (not inside), columns, COLUMNS)
    if anchor is not None:
        base += load_tile(anchor + at, rows, within, columns, COLUMNS)
    return base


@triton.jit
def unit_adjoint(grad, x, scale):
    """The adjoint of the argument of :func:`unit` from that of its result ``x``."""
    return (grad - x * row_dot(x, grad)[:, None]) * scale[:, None]


@triton.jit
def log_sigmoid(z):
    """``log(sigmoid(z))`` without overflow."""
    return tl.minimum(z, 0.0) - tl.log(1 + tl.exp(-tl.abs(z)))


@triton.jit
def column_of(x, columns, index):
    """Column ``index`` of a tile, as a vector."""
    return tl.sum(tl.where((columns == index)[None, :], x, 0.0), 1)


@triton.jit
def coefficients(
    log_decay, mu, valid, MOMENTUM: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr
):
    """Spreads of decay, momentum and their mixture, each a tuple; without momentum all are the first."""
    decay = spread(log_decay, BLOCK_C)
    carried = decay
    mixed = (decay[1], decay[3], decay[4], decay[5])
    if MOMENTUM:
        carried = spread(tl.log(mu + _TINY), BLOCK_C)
        mixed = mixed_spread(decay[3], decay[4], carried[1], carried[3], valid, PRECISION)
    return decay, carried, mixed


@triton.jit
def write_layer(
    state, velocity, x, signal, rate, coefficients, inverse,
    ERASES: tl.constexpr, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S and U after the chunk [out, in] and what :func:`write_adjoints` needs: ω, u and the recall [C, out].

    With momentum nothing is erased, and ω and the recall are not used.
    """
    decay, carried, mixed = coefficients
    if MOMENTUM:
        state, velocity, written = momentum_forward(
            state, velocity, x, signal, rate, decay[5], mixed[2], mixed[3], carried[4], carried[5], PRECISION
        )
        surprise, recalled = signal, signal
    else:
        surprise, written, recalled = write_forward(
            state, x, signal, rate, decay[0], inverse, ERASES, PRECISION
        )
        state = carry_state(state, written, x, decay[4], decay[5], PRECISION)
    return state, velocity, surprise, written, recalled


@triton.jit
def read_layer(
    queries, state, velocity, x, written, coefficients, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr
):
    """``S_t q_t`` after each token [C, out] without the anchor, the recall [C, out] and the scores [C, C]."""
    decay, _, mixed = coefficients
    y, recalled, scores = read_forward(queries, state, x, written, decay[1], mixed[1], PRECISION)
    if MOMENTUM:
        y += mixed[0][:, None] * matmul(queries, tl.trans(velocity), PRECISION)
    return y, recalled, scores


@triton.jit
def write_layer_adjoint(
    grad, grad_velocity, grad_written, state, velocity, x, signal, surprise, written, recalled, rate,
    coefficients, gram, inverse, ERASES: tl.constexpr, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adjoints of :func:`write_layer`: of S, U, x, the signal and the rate, and K̄ [C, C].

    Then of the coefficients ``strict, before, to_end, final, mixed_final, carried_to_end, carried_final``, as
    :func:`rates_adjoint` takes them: times themselves, but plain where momentum is involved.
    """
    decay, carried, mixed = coefficients
    if MOMENTUM:
        at_state, at_velocity, at_x, at_signal, at_rate, final, to_end, m_final, c_to_end, c_final = (
            momentum_adjoint(
                grad, grad_velocity, grad_written, state, velocity, x, signal, written, rate, decay[5],
                mixed[2], mixed[3], carried[4], carried[5], PRECISION,
            )
        )  # fmt: skip
        at_gram = tl.zeros(gram.shape, tl.float32)
        strict, before = at_gram, tl.zeros(rate.shape, tl.float32)
    else:
        at_state, at_x, at_signal, at_rate, strict, at_gram, before, to_end, final = write_adjoint(
            grad, grad_written, state, x, surprise, written, recalled, rate, decay[0], decay[4], decay[5],
            gram, inverse, ERASES, PRECISION,
        )  # fmt: skip
        at_velocity, m_final, c_to_end, c_final = grad_velocity, 0.0, tl.zeros(rate.shape, tl.float32), 0.0
    at_inputs = (at_state, at_velocity, at_x, at_signal, at_rate, at_gram)
    return at_inputs, (strict, before, to_end, final, m_final, c_to_end, c_final)


@triton.jit
def read_layer_adjoint(
    grad, queries, state, velocity, x, written, recalled, scores, coefficients,
    MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adjoints of :func:`read_layer`: of the queries, S, U, x and u; then ``after, full, mixed_after``."""
    decay, _, mixed = coefficients
    at_queries, at_state, at_x, at_written, after, full = read_adjoint(
        grad, queries, state, x, written, recalled, scores, decay[1], mixed[1], PRECISION
    )
    at_velocity, m_after = at_state, tl.zeros(after.shape, tl.float32)
    if MOMENTUM:
        more, at_velocity, m_after, full = velocity_read_adjoint(
            grad, queries, velocity, x, written, mixed[0], PRECISION
        )
        at_queries += more
    return (at_queries, at_state, at_velocity, at_x, at_written), (after, full, m_after)


@triton.jit
def rates_adjoint(
    written, read, mu, valid, coefficients,
    MOMENTUM: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The adjoints of the log decays and of the momenta [C] from the parts that all layers summed up.

    ``written``: the seven of :func:`write_layer_adjoint`; ``read``: the three of :func:`read_layer_adjoint`.
    """
    strict, before, to_end, final, m_final, c_to_end, c_final = written
    after, full, m_after = read
    at_mu = tl.zeros([BLOCK_C], tl.float32)
    if MOMENTUM:
        decay, carried, _ = coefficients
        full, to_end, c_after, c_full = mixed_adjoint(
            m_after, full, to_end, m_final, decay[3], decay[4], carried[1], carried[3], valid, PRECISION
        )
        c_to_end, c_final = c_to_end * carried[4], c_final * carried[5]
        at_mu = momentum_gradient(c_after, c_full, c_to_end, c_final, mu, BLOCK_C, PRECISION)
        at_log = decay_adjoint(None, after, None, full, to_end, final, BLOCK_C, PRECISION)
    else:
        at_log = decay_adjoint(before, after, strict, full, to_end, final, BLOCK_C, PRECISION)
    return tl.where(valid, at_log, 0.0), tl.where(valid, at_mu, 0.0)


@triton.jit
def residual(k, v, KEY: tl.constexpr, TARGET: tl.constexpr):
    """What residuals add to f(k) − f(v)."""
    result = tl.zeros(k.shape, tl.float32)
    if KEY:
        result += k
    if TARGET:
        result -= v
    return result


@triton.jit
def share_keys(
    k, rate, strict, ERASES: tl.constexpr, PROXIMAL: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The effective rate, K and the inverse of all layers that write to the keys ``k``."""
    gram = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    inverse = gram
    if ERASES:
        if PROXIMAL:
            rate = proximal_rate(rate, k)
        gram, inverse = erase_matrices(matmul(k, tl.trans(k), PRECISION), rate, strict, BLOCK_C, PRECISION)
    return rate, gram, inverse


@triton.jit
def take(base, offset, rows, ROWS: tl.constexpr, columns, COLUMNS: tl.constexpr):
    """The matrix at ``offset`` of a buffer as a tile."""
    return load_tile(base + offset, rows, rows < ROWS, columns, COLUMNS)


@triton.jit
def put(base, offset, flag, rows, ROWS: tl.constexpr, columns, COLUMNS: tl.constexpr, value):
    """Store a tile as the matrix at ``offset`` of a buffer where ``flag``."""
    store_tile(base + offset, rows, (rows < ROWS) & flag, columns, COLUMNS, value)


@triton.jit
def increase(base, at, flag, rows, ROWS: tl.constexpr, columns, COLUMNS: tl.constexpr, value):
    """Add to a matrix in memory where ``flag``."""
    value += load_tile(base + at, rows, (rows < ROWS) & flag, columns, COLUMNS)
    tl.debug_barrier()  # whoever loads a number need not be the one who stores it
    put(base, at, flag, rows, ROWS, columns, COLUMNS, value)


@triton.jit
def clear(base, at, flag, rows, ROWS: tl.constexpr, columns, COLUMNS: tl.constexpr):
    """Set a matrix in memory to zero where ``flag``."""
    zeros = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    put(base, at, flag, rows, ROWS, columns, COLUMNS, zeros)


@triton.jit
def merge(grads, snapshot_grads, at, flag, rows, ROWS: tl.constexpr, columns, COLUMNS: tl.constexpr):
    """Move a snapshot's gradient to the running state's where ``flag``."""
    moved = load_tile(snapshot_grads + at, rows, (rows < ROWS) & flag, columns, COLUMNS)
    tl.debug_barrier()
    increase(grads, at, flag, rows, ROWS, columns, COLUMNS, moved)
    clear(snapshot_grads, at, flag, rows, ROWS, columns, COLUMNS)


@triton.jit
def settle(
    at_state, at_base, by_anchor, held, held_anchor, grads, snapshot_grads, anchor_grads, at, fresh, leaves,
    FIRST: tl.constexpr, rows, ROWS: tl.constexpr, columns, COLUMNS: tl.constexpr,
    SNAPSHOTS: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Add up the gradients of a matrix in a chunk: the first share with ``at_state``, later ones without.

    ``at_base`` is that of what it served as. A fresh chunk serves from the running state, whose snapshot's
    gradient then joins, too. Returns the new ``held`` and ``held_anchor`` of resident gradients.
    """
    if FIRST:
        total = at_state + load_tile(snapshot_grads + at, rows, (rows < ROWS) & leaves, columns, COLUMNS)
        tl.debug_barrier()
        clear(snapshot_grads, at, leaves, rows, ROWS, columns, COLUMNS)
    elif RESIDENT:
        total = held
    else:
        tl.debug_barrier()
        total = take(grads, at, rows, ROWS, columns, COLUMNS)
    if SNAPSHOTS:
        tl.debug_barrier()
        increase(snapshot_grads, at, not fresh, rows, ROWS, columns, COLUMNS, at_base)
        at_base = tl.where(fresh, at_base, 0.0)
    total += at_base
    if RESIDENT:
        held = total
        if anchor_grads is not None:
            held_anchor += by_anchor
    else:
        put(grads, at, True, rows, ROWS, columns, COLUMNS, total)
        if anchor_grads is not None:
            increase(anchor_grads, at, True, rows, ROWS, columns, COLUMNS, by_anchor)
    return held, held_anchor
