"""The public functions of the delta memory: checks, choice of implementation, layouts."""

from __future__ import annotations

import math

import torch

from nl_kernels.checks import (
    check_choice,
    check_positive_int,
    check_range,
    check_sequences,
    check_tensor,
    check_tokens,
    state_dtype,
)
from nl_kernels.dispatch import autocasting, choose_implementation, needs_gradient
from nl_kernels.ops.delta_memory import reference, registration
from nl_kernels.renamed import check_renamed_value

READS = ("running", "before")
_RENAMED_READS = {"after": "running"}

_OF_CALLERS = frozenset(
    (
        "use_cache",
        "output_router_logits",
        "output_attentions",
        "output_hidden_states",
        "num_items_in_batch",
        "position_ids",
        # of packed sequences, whose bounds are cu_seqlens
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
    )
)

State = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def delta_memory(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    erase: torch.Tensor,
    *,
    momentum: torch.Tensor | None = None,
    scale: float = 1.0,
    read: str = "running",
    initial_state: torch.Tensor | None = None,
    initial_momentum: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int = 64,
    impl: str | None = None,
) -> tuple[torch.Tensor, State | None]:
    """A linear associative memory that decays, erases what it holds under a key, and writes, token by token.

    ``U_t = μ_t U_{t-1} + v_t k_tᵀ`` (without momentum ``U_t = v_t k_tᵀ``),
    ``S_t = α_t S_{t-1} − β_t (S_{t-1} k_t) k_tᵀ + U_t``, ``o_t = scale · S_t q_t``. This is the update of
    Eqs. 57 and 88 of arXiv 2512.24695 with decay and momentum; it contains linear attention (β = 0), DeltaNet
    (α = 1) and Gated DeltaNet (:func:`chunk_gated_delta_rule`).

    fp16 and bf16 inputs are computed with fp32 rates, accumulation and state; fp64 inputs in fp64. Under
    autocast q, k and v are cast to its dtype; rates and states are not. Gradients flow to every tensor
    argument and through the final states, once (no double backward, except with ``impl="reference"``).

    Args:
        q: queries ``[B, T, G, Dk]``, fp16, bf16, fp32 or fp64.
        k: keys ``[B, T, G, Dk]`` of q's dtype. Erasing is stable for ``β‖k‖² < 2``: give keys unit norm.
        v: writes ``[B, T, H, Dv]`` of q's dtype, already scaled by their rate. H is a multiple of G: each
            head of q and k serves H / G heads of v that follow one another, without a copy.
        log_decay: log α ``[B, T, H]``, at most 0; ``-inf`` forgets everything, exactly.
        erase: β ``[B, T, H]`` in [0, 2).
        momentum: μ ``[B, T, H]`` in [0, 1), or None for no momentum.
        scale: factor of every output.
        read: ``"running"`` reads S_t, the state after token t; ``"before"`` reads S_{t-1}.
        initial_state: S_0 ``[B, H, Dv, Dk]`` (``[N, H, Dv, Dk]`` with cu_seqlens); zeros if None.
        initial_momentum: U_0 of the same shape; zeros if None. Only with ``momentum``.
        output_final_state: whether to return the states after the last token.
        cu_seqlens: bounds ``[0, …, T]`` of N packed sequences, int32 or int64 ``[N + 1]``, strictly
            increasing; B must be 1. The eager path reads them on the host.
        chunk_size: tokens computed at once: changes speed and memory, not the result.
        impl: ``"triton"``, ``"eager"`` or ``"reference"``; None picks by the tensors' device.

    Returns:
        ``(o, final)``: o ``[B, T, H, Dv]`` in v's dtype; final is None, or S, or ``(S, U)`` with momentum,
        in fp32 (fp64 for fp64 inputs) and of initial_state's shape.

    Raises:
        TypeError: an argument is not a tensor or of another dtype than accepted.
        ValueError: a shape, device, option or range that is not accepted. Ranges are checked on CPU tensors
            only: elsewhere that would wait for the device.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    q, k, v = _autocast(q, k, v)
    _check_tokens(q, k, v, log_decay, erase, momentum, leading=4)
    check_renamed_value("read", read, _RENAMED_READS)
    check_choice("read", read, READS)
    check_positive_int("chunk_size", chunk_size)
    scale = _check_scale(scale)
    sequences = check_sequences(None, cu_seqlens, q)
    _check_states(initial_state, initial_momentum, momentum, (sequences, *v.shape[2:], k.shape[3]), q)
    impl = choose_implementation("delta_memory", impl, q.device)

    tensors = (q, k, v, log_decay, erase, momentum, initial_state, initial_momentum, cu_seqlens)
    if impl == "reference":
        o, state, momentum_state = reference.delta_memory_forward(*tensors, scale=scale, read=read)
    elif (
        q.shape[1] == 1 and cu_seqlens is None and initial_state is not None and not needs_gradient(*tensors)
    ):
        tokens = (x if x is None else x.squeeze(1) for x in tensors[:6])
        if momentum is not None and initial_momentum is None:
            initial_momentum = torch.zeros_like(initial_state)
        found = registration.step(*tokens, initial_state, initial_momentum, scale, read, impl)
        o, state, momentum_state = found[0].unsqueeze(1), *found[1:]
    else:
        o, state, momentum_state = registration.apply(*tensors, scale, read, chunk_size, impl)
    if not output_final_state:
        return o, None
    return o, state if momentum is None else (state, momentum_state)


def delta_memory_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    erase: torch.Tensor,
    *,
    state: torch.Tensor,
    momentum: torch.Tensor | None = None,
    momentum_state: torch.Tensor | None = None,
    scale: float = 1.0,
    read: str = "running",
    impl: str | None = None,
) -> tuple[torch.Tensor, State]:
    """One token of :func:`delta_memory`, for decoding: the same arguments without the time axis.

    Where gradients are needed this is ``delta_memory`` with T = 1; otherwise one pass over the state.

    Args:
        q, k: ``[B, G, Dk]``. v: ``[B, H, Dv]``. log_decay, erase, momentum: ``[B, H]``.
        state: S before the token ``[B, H, Dv, Dk]``; not changed.
        momentum_state: U before the token, required with ``momentum``; not changed.

    Returns:
        ``(o, final)``: o ``[B, H, Dv]``; final is the new S, or ``(S, U)`` with momentum.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`delta_memory`.
    """
    q, k, v = _autocast(q, k, v)
    _check_tokens(q, k, v, log_decay, erase, momentum, leading=3)
    check_renamed_value("read", read, _RENAMED_READS)
    check_choice("read", read, READS)
    scale = _check_scale(scale)
    shape = (*v.shape, k.shape[2])
    check_tensor("state", state, shape, like=q)
    if (momentum is None) != (momentum_state is None):
        raise ValueError("momentum_state: give it with momentum, and only then")
    if momentum_state is not None:
        check_tensor("momentum_state", momentum_state, shape, like=q)
    impl = choose_implementation("delta_memory", impl, q.device)

    tokens = (q, k, v, log_decay, erase, momentum)
    if impl == "reference" or needs_gradient(*tokens, state, momentum_state):
        o, final = delta_memory(
            *(x.unsqueeze(1) for x in tokens[:5]),
            momentum=None if momentum is None else momentum.unsqueeze(1),
            scale=scale,
            read=read,
            initial_state=state,
            initial_momentum=momentum_state,
            output_final_state=True,
            impl=impl,
        )
        return o.squeeze(1), final
    o, state, momentum_state = registration.step(*tokens, state, momentum_state, scale, read, impl)
    return o, state if momentum is None else (state, momentum_state)


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    chunk_size: int = 64,
    **others: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated DeltaNet (arXiv 2412.06464) with flash-linear-attention's arguments, layouts and defaults.

    ``S_t = e^{g_t} S_{t-1} (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ``, ``o_t = scale · S_t q_t``: the delta memory
    with erase ``β e^g`` and write ``β v``.

    Args:
        q, k: ``[B, T, G, Dk]``. v: ``[B, T, H, Dv]``, unscaled. H is a multiple of G: each head of q and k
            serves H / G heads of v that follow one another.
        g: log decay ``[B, T, H]``, at most 0. beta: ``[B, T, H]`` in [0, 2).
        scale: of the outputs; ``Dk ** -0.5`` if None.
        initial_state: ``[N, H, Dk, Dv]``: keys first, the transpose of :func:`delta_memory`'s.
        output_final_state: whether to return the state after the last token.
        use_qk_l2norm_in_kernel: whether to give q and k unit norm first (with 1e-6 under the root).
        cu_seqlens: bounds of packed sequences ``[N + 1]``.
        chunk_size: see :func:`delta_memory`.
        others: what models of transformers hand on to the rule from their own callers, and what does not
            concern it (``use_cache``, ``output_router_logits``, …); any other keyword is refused.

    With T = 1 and a state this is one step of decoding, as ``fused_recurrent_gated_delta_rule`` is; both are
    one function here.

    Returns:
        ``(o, final_state)``: ``[B, T, H, Dv]`` and ``[N, H, Dk, Dv]`` in fp32, or None.

    Raises:
        TypeError, ValueError: as :func:`delta_memory`.
    """
    unknown = [name for name, value in others.items() if name not in _OF_CALLERS and value is not None]
    if unknown:
        raise TypeError(f"{unknown[0]}: chunk_gated_delta_rule has no such option; leave it out or at None")
    _check_tokens(q, k, v, g, beta, None, leading=4, names=("g", "beta"))
    if initial_state is not None:
        sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        check_tensor("initial_state", initial_state, (sequences, v.shape[2], k.shape[3], v.shape[3]), like=q)
    if use_qk_l2norm_in_kernel:
        q, k = _l2norm(q), _l2norm(k)
    g, beta = (rate.to(state_dtype(q)) for rate in (g, beta))
    o, state = delta_memory(
        q,
        k,
        (v * beta[..., None]).to(v.dtype),
        g,
        beta * g.exp(),
        scale=k.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=None if initial_state is None else initial_state.mT,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
    )
    return o, None if state is None else state.mT.contiguous()


def _l2norm(x: torch.Tensor) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if not all(isinstance(x, torch.Tensor) and x.dtype != torch.float64 for x in tensors):
        return tensors
    device_type = tensors[0].device.type
    if not autocasting(device_type):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device_type)) for x in tensors)


def _check_tokens(q, k, v, log_decay, erase, momentum, *, leading: int, names=("log_decay", "erase")) -> None:
    """``leading`` is the number of axes of q: 4 with the time axis, 3 without."""
    axes = "[B, T, H, D]" if leading == 4 else "[B, H, D]"
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tokens(name, x, axes)
    check_tensor("k", k, q.shape, like=q)
    *tokens, heads, _ = q.shape
    if v.shape[-2] % heads:
        raise ValueError(f"v: expected a multiple of q's {heads} heads, got {v.shape[-2]} heads")
    rates = (*tokens, v.shape[-2])
    check_tensor("v", v, (*rates, v.shape[-1]), like=q)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
    check_tensor(names[0], log_decay, rates, like=q)
    check_tensor(names[1], erase, rates, like=q)
    if momentum is not None:
        check_tensor("momentum", momentum, rates, like=q)
    if q.device.type == "cpu":
        check_range(names[0], log_decay, -math.inf, 0.0)
        check_range(names[1], erase, 0.0, 2.0, closed_high=False)
        if momentum is not None:
            check_range("momentum", momentum, 0.0, 1.0, closed_high=False)


def _check_states(initial_state, initial_momentum, momentum, shape, q) -> None:
    if initial_state is not None:
        check_tensor("initial_state", initial_state, shape, like=q)
    if initial_momentum is not None:
        if momentum is None:
            raise ValueError("initial_momentum: given without momentum; give both or neither")
        check_tensor("initial_momentum", initial_momentum, shape, like=q)


def _check_scale(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a float, got {type(scale).__name__}")
    if not abs(scale) < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale}")
    return float(scale)
