"""The public function: checks, choice of implementation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from nl_kernels.checks import check_bool, check_mask, check_positive_int, check_tokens
from nl_kernels.dispatch import IMPLEMENTATIONS, WITH_COMPILED, choose_implementation, needs_gradient
from nl_kernels.ops.continuum.checks import (
    check_levels,
    check_number,
    check_state,
    check_variant,
)
from nl_kernels.ops.continuum.launch import MAX_WIDTH
from nl_kernels.ops.continuum.loop import Options, run_flush, run_memory
from nl_kernels.ops.continuum.reference import continuum_flush_reference, continuum_memory_reference
from nl_kernels.ops.continuum.registration import products
from nl_kernels.ops.continuum.state import (
    ContinuumLevel,
    ContinuumLevelState,
    ContinuumState,
    initial_weights,
)
from nl_kernels.zero_gradients import with_zero_gradients

KERNEL_RULES = ("sgd", "momentum", "muon")
"""Those whose step is made of the sums Σ_t η_t δ_t x_tᵀ; dgd's takes a solve of each chunk."""


def continuum_memory(
    x: torch.Tensor,
    levels: Sequence[ContinuumLevel],
    *,
    variant: str = "sequential",
    level_weights: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    initial_state: ContinuumState | None = None,
    output_final_state: bool = False,
    detach_updates: bool = False,
    norm_eps: float = 1e-6,
    checkpoint_every: int | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, ContinuumState | None]:
    """MLP blocks whose weights learn within the context, each level at a period of its own, fast to slow.

    Every level is a pre-norm MLP ``f_θ(n(x))`` (Nested Learning, arXiv 2512.24695, Eqs. 70-74)::

        sequential    x ← x + f_ℓ(n_ℓ(x)), level after level (Eq. 70)
        nested        the same; whenever a level steps, the next faster one goes back to its initial weights,
                      also where the rate of that step is 0 (Eq. 72)
        independent   x + Σ_ℓ w_ℓ f_ℓ(n_ℓ(x)) (Eq. 74)

    After every ``chunk_size`` tokens of a sequence a level takes one step on those tokens, all gradients at
    the weights that read them (Eq. 71), on the regression loss ``½‖f_θ(k_t) − v_t‖²`` with
    ``k_t = n(key n(x_t))`` and ``v_t = value n(x_t)``, by its rule: see :func:`nl_kernels.continuum_update`.
    A level that predicts has ``v_t = value n(x_{t+1})`` within a chunk: what came next.

    Between steps it is an ordinary MLP. Fast weights belong to one sequence. Gradients flow through the
    steps into everything that a level holds, and into the state.

    Args:
        x: [B, T, D], fp16, bf16, fp32 or fp64.
        levels: at least one; every chunk size a multiple of the one before, levels that never step last.
        variant: ``"sequential"``, ``"nested"`` or ``"independent"``.
        level_weights: of ``"independent"``: w [levels]; None: all 1.
        mask: [B, T] bool, True for tokens, anywhere in the row; None: all are tokens. Padding is neither
            learned from nor counted, and its outputs are zero.
        initial_state: the state returned by an earlier call on the preceding tokens of the same sequences;
            None: the levels' own weights. Weights in a state replace the levels' ``up``, ``gate``, ``down``.
        output_final_state: also return the state after the last token.
        detach_updates: take every step as a constant in the backward pass (first-order), so that what only
            steps depend on (``key``, ``value``, ``rate``, momenta) gets no gradient.
        norm_eps: added to the mean square inside the norms.
        checkpoint_every: keep for the backward only the fast weights of every so many steps of a level, and
            recompute the rest; None: as many as 256 MB hold, before them a balanced choice, about the root.
        impl: ``"triton"`` (every rule but ``dgd``, first-order or without gradients, not fp64),
            ``"compiled"`` (eager chunks through ``torch.compile``), ``"eager"``, ``"reference"`` (token by
            token, slow: the definition); None: on CUDA Triton for what it takes, compiled for gradients
            through the steps, else eager.

    Returns:
        y [B, T, D] and the final state: a tuple with one :class:`ContinuumLevelState` for each level, None in
        the place of a level that never steps; None unless ``output_final_state``. Of a level with the number
        0 as its rate that resets a faster one, it holds a :class:`ContinuumClock`.

    A level that never learns (``chunk_size=None``, or the number 0 as its ``rate``) gives bit for bit what
    ``F.linear``, ``F.gelu``/``F.silu`` and ``F.linear`` give on ``F.rms_norm``'s output.

    Raises:
        TypeError: an argument of another type or dtype than said.
        ValueError: another shape, device or value than said, or a state of other levels; nothing has run.
        NotImplementedError: ``impl="triton"`` for what its kernels do not take.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    check_tokens("x", x, "[B, T, D]")
    check_levels(levels, x)
    check_variant(variant, level_weights, levels, x)
    if mask is not None:
        check_mask(mask, x.shape[:2], x)
    if initial_state is not None:
        check_state("initial_state", initial_state, levels, x.shape[0], x, variant)
    if checkpoint_every is not None:
        check_positive_int("checkpoint_every", checkpoint_every)
    check_bool("detach_updates", detach_updates)
    check_number("norm_eps", norm_eps)
    tensors = {"level_weights": level_weights, "mask": mask, "initial_state": initial_state}
    flows = not detach_updates and needs_gradient(x, level_weights, *_tensors(levels, initial_state))
    chosen = _choose("continuum_memory", impl, x, levels, flows)
    for level in levels if torch.is_grad_enabled() else ():
        if level.steps:
            start = () if initial_state is None else initial_weights(level)
            numbers = [n for n in (level.rate, level.retention) if isinstance(n, torch.Tensor)]
            learning = () if detach_updates else (level.key, level.value, *numbers)
            x = with_zero_gradients(x, (*start, *learning))
    if chosen == "reference":
        told = {"variant": variant, "detach_updates": detach_updates, "norm_eps": norm_eps}
        return continuum_memory_reference(x, levels, output_final_state=output_final_state, **told, **tensors)
    options = Options(variant, norm_eps, flows, products(chosen), checkpoint_every, output_final_state)
    return run_memory(x, levels, options, **tensors)


def continuum_flush(
    state: ContinuumState,
    levels: Sequence[ContinuumLevel],
    *,
    variant: str = "sequential",
    detach_updates: bool = False,
    norm_eps: float = 1e-6,
    impl: str | None = None,
) -> ContinuumState:
    """Every level takes a step on the tokens that wait for one: the flush of a last, partial chunk.

    The step is that of a whole chunk with fewer tokens. A level and sequence without pending tokens takes
    none. Afterwards every sequence stands at the start of a chunk. :func:`continuum_memory` never does this
    by itself: a cut sequence goes on as if it were whole.

    Args:
        state: from :func:`continuum_memory`; it stays as it is.
        levels, variant, detach_updates, norm_eps: as in the call that the state is from. Of ``"nested"``, a
            level goes back to its start where the next slower one steps.
        impl: as in :func:`continuum_memory`.

    Raises:
        TypeError, ValueError: as :func:`continuum_memory`.
    """
    if not isinstance(state, tuple) or not any(isinstance(level, ContinuumLevelState) for level in state):
        raise TypeError(f"state: expected a ContinuumState with a level that steps, got {state!r:.200}")
    like = next(level for level in state if isinstance(level, ContinuumLevelState)).pending_inputs
    if like.ndim != 3:
        raise ValueError(f"state: expected pending_inputs of shape [B, P, D], got {tuple(like.shape)}")
    check_levels(levels, like, rates_of_tokens=True)
    check_variant(variant, None, levels, like)
    check_state("state", state, levels, like.shape[0], like, variant)
    check_bool("detach_updates", detach_updates)
    check_number("norm_eps", norm_eps)
    flows = not detach_updates and needs_gradient(*_tensors(levels, state))
    chosen = _choose("continuum_flush", impl, like, levels, flows)
    if chosen == "reference":
        return continuum_flush_reference(
            state, levels, variant=variant, detach_updates=detach_updates, norm_eps=norm_eps
        )
    return run_flush(state, levels, Options(variant, norm_eps, flows, products(chosen)))


def _choose(op: str, impl: str | None, x: torch.Tensor, levels: Sequence[ContinuumLevel], flows: bool) -> str:
    """The implementation; ``flows``: gradients go through the steps."""
    # else each new shape would be compiled for little
    available = WITH_COMPILED if flows or impl is not None else IMPLEMENTATIONS
    return choose_implementation(op, impl, x.device, available, lambda: _refused(x, levels, flows))


def _refused(x: torch.Tensor, levels: Sequence[ContinuumLevel], flows: bool) -> str | None:
    """Why the kernels cannot take a call; None: they can."""
    if x.dtype == torch.float64:
        return "the Triton kernels take bfloat16, float16 and float32, got float64"
    for index, level in enumerate(levels):
        if level.steps and level.rule not in KERNEL_RULES:
            return f"levels[{index}].rule: the Triton kernels take {KERNEL_RULES}, got {level.rule!r}"
        if level.steps and max(level.up.shape) > MAX_WIDTH:
            return (
                f"levels[{index}].up: the Triton kernels have widths of at most {MAX_WIDTH}, got "
                f"{tuple(level.up.shape)}"
            )
    if flows:
        return (
            "detach_updates: the Triton kernels take steps as constants, so that no gradient flows through "
            "them; expected True where something requires a gradient, got False"
        )
    return None


def _tensors(levels: Sequence[ContinuumLevel], state: ContinuumState | None) -> Iterator[torch.Tensor]:
    """All tensors that a gradient may flow into."""
    for level in levels:
        parts = (level.norm, *initial_weights(level), level.rate, level.key, level.value, level.retention)
        yield from (part for part in parts if isinstance(part, torch.Tensor))
    for before in state or ():
        yield from (part for part in before or () if part is not None)
