"""Five memories that make each other's keys, values and rates. Run it: python self_modifying_memory.py

In deep_memory.py keys, values, rates and decays are given. Here a head has a memory for each of them, and one
that is read (Nested Learning, arXiv 2512.24695, Eqs. 83-91; the token mixer of Hope, Eqs. 94-96):

    k_t = unit(x + M_key(x))     η_t = sigmoid(M_rate(x''))             o_t = M_memory(unit(q_t))
    v_t = x' + M_value(x')       α_t = sigmoid(M_retention(x'') + 4)

x, x' and x'' are three projections of the token; the page begins behind them. Every memory then learns from
(k_t, v̂_t), at rate η_t with retention α_t. Its target v̂_t = v_t + M(v_t) it makes itself, and the two gates
take M(v_t) alone. So how the layer writes is itself written while it reads. What stays is the initial weights
of the five: they are trained as usual, with gradients through all these writes.
"""

import torch
import torch.nn.functional as F

NAMES = ("key", "value", "memory", "rate", "retention")  # from width D to D, the last two from D to 1


def unit(x):
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def bounded(x):
    """x where it is at most 1 long, else scaled down to length 1."""
    return x * x.square().sum(-1, keepdim=True).clamp(min=1).rsqrt()


def f(weights, x):
    """A memory's answer W1 n(σ(W2 x)) for x [B, H, C, D]; weights (W2 [B, H, h, D], W1 [B, H, O, h])."""
    W2, W1 = weights
    return unit(F.silu(x @ W2.mT)) @ W1.mT


def gradients(weights, k, v):
    """For each layer its inputs and the error signals at its outputs: ½‖f(k) − v‖² differentiated by hand."""
    W2, W1 = weights
    z = k @ W2.mT  # [B, H, C, h]
    s = torch.sigmoid(z)
    a, slope = z * s, s + z * s * (1 - s)  # SiLU and its derivative
    inverse_length = (a.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    hidden = a * inverse_length
    error = bounded(hidden @ W1.mT - v)  # [B, H, C, O]
    back = error @ W1
    back = inverse_length * (back - hidden * (hidden * back).sum(-1, keepdim=True))
    return (k, bounded(back * slope)), (hidden, error)


def learn(change, x, error, rate, log_decay):
    """Δ_t = α_t Δ_{t-1} − η_t (Δ_{t-1} x_t + δ_t) x_tᵀ over a chunk (Eq. 88), as in deep_memory.py."""
    after = log_decay.cumsum(-1)  # [B, H, C]
    before = after - log_decay
    eta = rate[..., None]
    strict = (before[..., :, None] - after[..., None, :]).tril(-1).exp().tril(-1)  # [B, H, C, C]
    held = before.exp()[..., None] * (x @ change.mT)  # [B, H, C, O]
    A, rhs = eta * strict * (x @ x.mT), -eta * (held + error)
    n = torch.linalg.solve_triangular(A, rhs, upper=False, unitriangular=True)
    to_end = (after[..., -1:] - after).exp()[..., None]  # [B, H, C, 1]
    return after[..., -1, None, None].exp() * change + (to_end * n).mT @ x


def self_modifying_memory(query, key_input, value_input, gate_input, initial, chunk_size=16):
    """Four inputs [B, H, T, D] and ``initial``: for each of NAMES its (W2 [H, h, D], W1 [H, D or 1, h]).

    All five memories are read and take their gradients at a chunk's first weights (Eq. 90). Returns
    o [B, H, T, D] and the last changes of all weights.
    """
    batch = len(query)
    change = {name: [W.new_zeros(batch, *W.shape) for W in initial[name]] for name in NAMES}
    outputs = []
    chunks = (x.split(chunk_size, dim=2) for x in (query, key_input, value_input, gate_input))
    for q, x_key, x_value, x_gate in zip(*chunks):  # [B, H, C, D]
        now = {name: [W + d for W, d in zip(initial[name], change[name])] for name in NAMES}

        outputs.append(f(now["memory"], unit(q)))  # Eq. 83
        k = unit(x_key + f(now["key"], x_key))
        v = x_value + f(now["value"], x_value)
        eta = torch.sigmoid(f(now["rate"], x_gate))[..., 0]  # [B, H, C]
        log_alpha = F.logsigmoid(f(now["retention"], x_gate) + 4)[..., 0]

        for name in NAMES:
            target = f(now[name], v) + (0 if name in ("rate", "retention") else v)
            if name in ("key", "value"):  # these answer k + f(k)
                target = target - k
            layers = zip(change[name], gradients(now[name], k, target))
            change[name] = [learn(d, *layer, eta, log_alpha) for d, layer in layers]  # Eq. 88
    return torch.cat(outputs, 2), change


def main():
    torch.manual_seed(0)
    B, H, D, h, pairs = 4, 2, 16, 32, 8
    out = {name: 1 if name in ("rate", "retention") else D for name in NAMES}
    initial = {n: [torch.randn(H, h, D) / D**0.5, 0.02 * torch.randn(H, out[n], h)] for n in NAMES}
    optimizer = torch.optim.Adam([W.requires_grad_() for pair in initial.values() for W in pair], lr=0.02)
    mark = unit(torch.randn(D)).expand(B, H, pairs, D)
    print(f"{pairs} new keys with their values, the same keys with wrong values, then the keys alone.")
    print("Only a mark in the gates' input tells right from wrong, and only initial weights are trained.\n")
    print("step   cosine of answer and value")
    for step in range(61):
        keys, right, wrong = unit(torch.randn(3, B, H, pairs, D))
        key_input, value_input = torch.cat([keys] * 3, 2), torch.cat([right, wrong, 0 * keys], 2)
        gate_input = torch.cat([mark, -mark, -mark], 2)
        o, _ = self_modifying_memory(key_input, key_input, value_input, gate_input, initial, pairs)
        alike = torch.cosine_similarity(o[:, :, 2 * pairs :], right, dim=-1).mean()
        optimizer.zero_grad()
        (1 - alike).backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"{step:4d}   {alike:.2f}")


if __name__ == "__main__":
    main()
