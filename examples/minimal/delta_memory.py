"""A linear memory that forgets, corrects itself and writes, on one page. Run it: python delta_memory.py

The memory of a head is a matrix S. It answers a query q with S q. Each token t brings a key k, a value v and
two numbers: its decay α in (0, 1] and its erase rate β in [0, 2). One step (Nested Learning, arXiv
2512.24695, Eqs. 57 and 88) is

    S_t = α_t S_{t-1} − β_t (S_{t-1} k_t) k_tᵀ + v_t k_tᵀ        read:  o_t = S_t q_t

The middle term takes away what S holds under k_t. With β = 0 this is linear attention with decay. With a
write of β v and β = 1 a unit key then holds exactly v, whatever it held before: the delta rule.
"""

import time

import torch


def decay_between(later, earlier, diagonal):
    """exp(later_i − earlier_j) for j ≤ i + diagonal, else 0. From sums of log α [B, H, C]: [B, H, C, C]."""
    log = later[..., :, None] - earlier[..., None, :]
    return log.tril(diagonal).exp().tril(diagonal)  # masked twice: above the diagonal exp could overflow


def delta_memory(q, k, v, log_decay, erase, state=None, chunk_size=64):
    """q, k [B, H, T, D], v [B, H, T, V], log_decay = log α and erase = β [B, H, T].

    Returns o [B, H, T, V] and the last state S [B, H, V, D], which may be passed to the next call.

    The trick: a token adds n kᵀ, with n_t = v_t − β_t S_{t-1} k_t. So S_t = α_t S_{t-1} + n_t k_tᵀ is plain
    linear attention once the n of a chunk are known. They depend on one another through the products of keys
    only, and solve one triangular system. There is a loop over chunks, and none over tokens.
    """
    batch, heads, _, width = k.shape
    S = k.new_zeros(batch, heads, v.shape[-1], width) if state is None else state
    outputs = []
    chunks = (x.split(chunk_size, dim=2) for x in (q, k, v, log_decay, erase))
    for q, k, v, g, beta in zip(*chunks):  # of one chunk from here on: [B, H, C, ..]
        after = g.cumsum(-1)  # [B, H, C]  log of the decay from the chunk's start to after each token
        before = after - g  # the same to just before it

        # n_i = v_i − β_i (decayed S_0 k_i + Σ_{j<i} decay_ij (k_i·k_j) n_j), all i at once: (I + A) n = rhs
        A = beta[..., None] * decay_between(before, after, -1) * (k @ k.mT)  # [B, H, C, C]
        recalled = before.exp()[..., None] * (k @ S.mT)  # [B, H, C, V]  what S_0 says under each key
        n = torch.linalg.solve_triangular(A, v - beta[..., None] * recalled, upper=False, unitriangular=True)

        # S_i q_i = decayed S_0 q_i + Σ_{j≤i} decay_ij (q_i·k_j) n_j
        scores = decay_between(after, after, 0) * (q @ k.mT)  # [B, H, C, C]
        outputs.append(after.exp()[..., None] * (q @ S.mT) + scores @ n)  # [B, H, C, V]

        # S_C = decayed S_0 + Σ_j decay_Cj n_j k_jᵀ
        to_end = (after[..., -1:] - after).exp()[..., None]  # [B, H, C, 1]
        S = after[..., -1, None, None].exp() * S + (to_end * n).mT @ k  # [B, H, V, D]
    return torch.cat(outputs, 2), S


def token_by_token(q, k, v, log_decay, erase):
    """The same from the definition, for comparison."""
    S, outputs = 0 * v[:, :, 0, :, None] * k[:, :, 0, None, :], []
    for t in range(k.shape[2]):
        held = S @ k[:, :, t, :, None]  # [B, H, V, 1]
        write = v[:, :, t, :, None] - erase[:, :, t, None, None] * held
        S = log_decay[:, :, t, None, None].exp() * S + write * k[:, :, t, None, :]
        outputs.append((S @ q[:, :, t, :, None])[..., 0])
    return torch.stack(outputs, 2)


def main():
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize

    B, H, T, D = 2, 4, 1024, 32
    q, k, v = unit(torch.randn(3, B, H, T, D), dim=-1)
    log_decay, erase = -0.05 * torch.rand(B, H, T), torch.rand(B, H, T)
    results, seconds = [], []
    for function in (token_by_token, lambda *inputs: delta_memory(*inputs)[0]):
        start = time.perf_counter()
        results.append(function(q, k, erase[..., None] * v, log_decay, erase))
        seconds.append(time.perf_counter() - start)
    apart = (results[0] - results[1]).abs().max()
    print(f"{T} tokens, {B * H} heads of {D}: one by one {1000 * seconds[0]:.0f} ms, ", end="")
    print(f"in chunks {1000 * seconds[1]:.0f} ms; largest difference {apart:.0e}\n")

    print("Each key is given a value, and later another one. How near is what it answers to the last value?")
    print("keys   linear attention   delta rule      (cosine; width 32)")
    for keys in (4, 8, 16, 24, 32, 64):
        k = unit(torch.randn(1, 8, keys, D), dim=-1).repeat(1, 1, 2, 1)
        v = torch.randn(1, 8, 2 * keys, D)
        alike = []
        for rate in (0.0, 1.0):
            _, S = delta_memory(k, k, v, torch.zeros(1, 8, 2 * keys), torch.full((1, 8, 2 * keys), rate))
            answers = k[:, :, keys:] @ S.mT
            alike.append(torch.cosine_similarity(answers, v[:, :, keys:], dim=-1).mean())
        print(f"{keys:4d}   {alike[0]:16.2f}   {alike[1]:10.2f}")


if __name__ == "__main__":
    main()
