"""A small network as a memory, trained while it reads, on one page. Run it: python deep_memory.py

A head's memory is M(x) = W1 n(σ(W2 x)): σ is SiLU, n scales to unit length. Each token takes one step of
gradient descent on ½‖M(k_t) − v_t‖² (Nested Learning, arXiv 2512.24695, Eqs. 57, 88-91; without the erase it
is the memory of Titans, arXiv 2501.00663). A layer with input x, error signal δ and weights W_0 + Δ learns by

    Δ_t = α_t Δ_{t-1} − η_t (Δ_{t-1} x_t) x_tᵀ − η_t δ_t x_tᵀ        (delta gradient descent, Eq. 57)

Three choices keep that finite for ever. The hidden layer has unit length, so one rate η in [0, 1] suits both
layers. W_0, which is trained as usual, stays: only the change Δ decays and is erased. Both error signals are
at most 1 long. A fourth makes it fast: a chunk takes all its gradients at its first weights (Eq. 90).
"""

import torch
import torch.nn.functional as F


def unit(x):
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def bounded(x):
    """x where it is at most 1 long, else scaled down to length 1."""
    return x * x.square().sum(-1, keepdim=True).clamp(min=1).rsqrt()


def learn(change, x, error, rate, log_decay):
    """One layer's Δ over a chunk: change [B, H, O, I], inputs x [B, H, C, I], error signals δ [B, H, C, O].

    A token adds a row n_t x_tᵀ with n_t = −η_t (Δ_{t-1} x_t + δ_t). These n solve one triangular system, as
    in delta_memory.py. Returns Δ after the chunk, and a function: queries [B, H, C, I] -> Δ_t query_t.
    """
    after = log_decay.cumsum(-1)  # [B, H, C]  log of the decay from the chunk's start to after each token
    before = after - log_decay
    eta = rate[..., None]
    strict = (before[..., :, None] - after[..., None, :]).tril(-1).exp().tril(-1)  # [B, H, C, C]
    full = (after[..., :, None] - after[..., None, :]).tril().exp().tril()
    held = before.exp()[..., None] * (x @ change.mT)  # [B, H, C, O]
    n = torch.linalg.solve_triangular(
        eta * strict * (x @ x.mT), -eta * (held + error), upper=False, unitriangular=True
    )

    def read(query):
        return after.exp()[..., None] * (query @ change.mT) + (full * (query @ x.mT)) @ n

    last = after[..., -1, None, None].exp() * change + (full[..., -1, :, None] * n).mT @ x
    return last, read


def gradients(W2, W1, k, v):
    """For each layer its inputs and the error signals at its outputs: ½‖M(k) − v‖² differentiated by hand."""
    z = k @ W2.mT  # [B, H, C, h]
    s = torch.sigmoid(z)
    a, slope = z * s, s + z * s * (1 - s)  # SiLU and its derivative
    inverse_length = (a.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    hidden = a * inverse_length
    error = bounded(hidden @ W1.mT - v)  # [B, H, C, V]
    back = error @ W1  # through W1, then through n, then through σ: [B, H, C, h]
    back = inverse_length * (back - hidden * (hidden * back).sum(-1, keepdim=True))
    return (k, bounded(back * slope)), (hidden, error)


def deep_memory(q, k, v, rate, log_decay, W2, W1, chunk_size=16, read="snapshot"):
    """q, k [B, H, T, D], v [B, H, T, V], rate = η, log_decay = log α [B, H, T], W2 [H, h, D], W1 [H, V, h].

    Keys should have unit length. A query is answered by the chunk's first weights ("snapshot", Eq. 90), or by
    those after its own token ("running"). Returns o [B, H, T, V] and the last changes of W2 and W1.
    """
    batch = len(q)
    change2, change1 = W2.new_zeros(batch, *W2.shape), W1.new_zeros(batch, *W1.shape)
    outputs = []
    chunks = (x.split(chunk_size, dim=2) for x in (q, k, v, rate, log_decay))
    for q, k, v, eta, g in zip(*chunks):  # of one chunk from here on: [B, H, C, ..]
        now2, now1 = W2 + change2, W1 + change1  # the weights at which this chunk takes all its gradients
        layer2, layer1 = gradients(now2, now1, k, v)
        change2, read2 = learn(change2, *layer2, eta, g)
        change1, read1 = learn(change1, *layer1, eta, g)
        if read == "snapshot":
            outputs.append(unit(F.silu(q @ now2.mT)) @ now1.mT)
        else:  # each layer has other weights at every token, and none is ever written down
            hidden = unit(F.silu(q @ W2.mT + read2(q)))
            outputs.append(hidden @ W1.mT + read1(hidden))
    return torch.cat(outputs, 2), (change2, change1)


def main():
    torch.manual_seed(0)
    B, H, D, pairs, passes = 1, 8, 32, 16, 6
    W2, W1 = torch.randn(H, 64, D) / D**0.5, 0.02 * torch.randn(H, D, 64)
    k, v = unit(torch.randn(2, B, H, pairs, D)).repeat(1, 1, 1, passes, 1)
    rate, log_decay = torch.full((B, H, pairs * passes), 0.5), torch.zeros(B, H, pairs * passes)
    print(f"{pairs} pairs of key and value are read {passes} times, at rate 0.5.")
    print("Cosine of what the key brings up and its value, before each pair is written, mean of a pass:\n")
    print("chunk" + "".join(f"  pass {i + 1}" for i in range(passes)))
    for chunk_size in (1, 4, 16, 64):
        o, _ = deep_memory(k, k, v, rate, log_decay, W2, W1, chunk_size)
        alike = torch.cosine_similarity(o, v, dim=-1).view(B, H, passes, pairs).mean((0, 1, 3))
        print(f"{chunk_size:5d}" + "".join(f"{x:8.2f}" for x in alike))
    print("\nThe chunk size is part of the model. In chunks of 64 the first four passes are one chunk:")
    print("all of them are answered by the weights at its start, and their gradients are taken there.")


if __name__ == "__main__":
    main()
