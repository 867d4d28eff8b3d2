"""Segments of a sequence that are scanned side by side: the states they start from, by their affine maps."""

import triton
import triton.language as tl

from nl_kernels.triton_support.language import load_tile, matmul, store_tile


@triton.jit(do_not_specialize=["segments"])
def join_segments_kernel(
    segment_maps,
    initial_state,
    segment_states,
    segments,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SOLVE: tl.constexpr,
):
    """One program a sequence, head and tile of the value width: the state that each segment starts from."""
    program = tl.program_id(0).to(tl.int64)
    key_column = tl.arange(0, BLOCK_K)
    value_column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_key = key_column < KEY_DIM
    WIDTH: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V * BLOCK_V
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if initial_state is not None:
        public = (program * VALUE_DIM + value_column[None, :]) * KEY_DIM + key_column[:, None]
        mask = in_key[:, None] & (value_column < VALUE_DIM)[None, :]
        state += tl.load(initial_state + public, mask=mask, other=0.0).to(tl.float32)
    for segment in range(0, segments):
        place = (program * segments + segment) * KEY_DIM
        store_tile(segment_states, place + key_column, in_key, value_column, VALUE_DIM, state)
        tl.debug_barrier()
        state = load_tile(segment_maps, place + key_column, in_key, value_column, WIDTH + KEY_DIM)
        for start in range(0, KEY_DIM, 16):
            column = start + tl.arange(0, 16)
            part = load_tile(segment_states, place + column, column < KEY_DIM, value_column, VALUE_DIM)
            maps = load_tile(segment_maps, place + key_column, in_key, WIDTH + column, WIDTH + KEY_DIM)
            state += matmul(maps, part, SOLVE)
