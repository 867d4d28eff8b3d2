"""MLPs that learn while they read, each at its own frequency, on one page. Run it: python continuum.py

In place of a transformer's one fixed MLP here is a chain of them, fast to slow (Nested Learning, arXiv
2512.24695, Eq. 70): x ← x + f_1(n(x)), then x ← x + f_2(n(x)), and so on, with f(u) = down GELU(up u) and n
the RMS norm. Level ℓ takes one step after every C_ℓ tokens, on the tokens of that chunk (Eq. 71):

    W ← W − η Σ_t δ_t x_tᵀ − (1 − retention) (W − W_0)

δ is the error signal at a layer's output and x its input. The loss is the level's own: ½‖f(k_t) − v_t‖² with
keys k_t = n(key u_t) and targets v_t = value u_t: trained projections of what the MLP reads, u_t = n(x_t).
A level that predicts has v_t = value u_{t+1}: what a key finds later is what came after it.
Between two steps a level is an ordinary MLP, so a whole chunk goes through it at once. What it learned in a
sequence belongs to that sequence, and each step pulls it back a little to the trained weights W_0. In the
nested variant (Eq. 72) a level starts anew whenever the next slower one steps.
"""

import math

import torch
import torch.nn.functional as F


def rms_norm(x, weight=None):
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def bounded(x):
    """x where its root mean square is at most 1, else scaled down to that: one odd token cannot do much."""
    return x * x.square().mean(-1, keepdim=True).clamp(min=1).rsqrt()


def gradients(up, down, k, v):
    """For both layers Σ_t δ_t x_tᵀ, from keys and targets [B, C, D]: backpropagation, written out."""
    z = k @ up.mT  # [B, C, H]
    hidden = F.gelu(z)
    slope = 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    error = bounded(hidden @ down.mT - v)  # [B, C, D]
    back = bounded((error @ down) * slope)  # [B, C, H]
    return back.mT @ k, error.mT @ hidden  # [B, H, D], [B, D, H]


def run_level(x, level, weights, restart_every=None):
    """f(n(x)) [B, T, D] of one level, and its fast weights (up [B, H, D], down [B, D, H]) after x.

    A level is a dict: norm [D], up [H, D], down [D, H], key and value [D, D], chunk_size, rate, retention,
    predict_next.
    """
    up, down = weights
    outputs, tokens = [], 0
    for chunk in x.split(level["chunk_size"], dim=1):  # [B, C, D]
        u = rms_norm(chunk, level["norm"])
        outputs.append(F.gelu(u @ up.mT) @ down.mT)
        if chunk.shape[1] < level["chunk_size"]:
            break  # the last tokens do not fill a chunk: no step
        k, v = rms_norm(u @ level["key"].mT), u @ level["value"].mT
        d_up, d_down = gradients(up, down, *((k[:, :-1], v[:, 1:]) if level["predict_next"] else (k, v)))
        forget = 1 - level["retention"]
        up = up - level["rate"] * d_up - forget * (up - level["up"])  # Eq. 71
        down = down - level["rate"] * d_down - forget * (down - level["down"])
        tokens += chunk.shape[1]
        if restart_every and tokens % restart_every == 0:  # Eq. 72
            up, down = level["up"].expand_as(up), level["down"].expand_as(down)
    return torch.cat(outputs, 1), (up, down)


def continuum_memory(x, levels, weights=None, nested=False):
    """x [B, T, D] through all levels, fast to slow, each chunk size a multiple of the one before.

    Returns y [B, T, D] and the fast weights of each level, for the next call: cut a sequence at multiples of
    the largest chunk size.
    """
    if weights is None:  # every sequence starts with the trained weights
        weights = [[level[name].expand(len(x), -1, -1) for name in ("up", "down")] for level in levels]
    after = []
    for index, level in enumerate(levels):
        slower = levels[index + 1]["chunk_size"] if nested and index + 1 < len(levels) else None
        y, fast = run_level(x, level, weights[index], slower)
        x = x + y
        after.append(fast)
    return x, after


def main():
    torch.manual_seed(0)
    D, H, sizes = 32, 64, (8, 64)
    common = {"norm": torch.ones(D), "key": torch.eye(D), "value": torch.eye(D)[torch.randperm(D)]}
    levels = [
        {
            **common,
            "up": torch.randn(H, D) / D**0.5,
            "down": torch.randn(D, H) / H**0.5,
            "chunk_size": size,
            "rate": 0.5 / (D * size),  # a step of 0.5 on a chunk of one repeated token, whatever its size
            "retention": retention,
            "predict_next": False,  # the words of a subject come in any order
        }
        for size, retention in zip(sizes, (0.7, 0.95))
    ]
    subjects = [rms_norm(torch.randn(1, 8, D)) for _ in "AB"]  # each is a set of 8 tokens

    def loss(level, weights, subject):
        u = rms_norm(subject, level["norm"])
        return (F.gelu(u @ weights[0].mT) @ weights[1].mT - u @ level["value"].mT).square().mean()

    print("A text about A, then B, then A. Loss of each level on both subjects (mean square of its error):\n")
    print("tokens  about  " + "".join(f"   C={size}: A     B " for size in sizes))
    weights, position = None, 0
    for topic, pieces in zip((0, 1, 0), (4, 4, 2)):
        for _ in range(pieces):
            words = torch.randint(8, (128,))
            _, weights = continuum_memory(subjects[topic][:, words], levels, weights)
            position += 128
            losses = [loss(level, w, s).item() for level, w in zip(levels, weights) for s in subjects]
            print(f"{position:6d}  {'AB'[topic]:>5}  " + "".join(f"  {x:6.2f}" for x in losses))
    print("\nThe fast level follows what the text is about now. The slow one keeps both.")


if __name__ == "__main__":
    main()
