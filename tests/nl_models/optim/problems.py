"""Random problems, and every rule written down once more in fp64, as plainly as can be."""

import torch

from nl_kernels import newton_schulz
from nl_models.optim import M3, DeepMomentum, DeltaMomentum, Muon

# Two equal shapes (one call), the transpose of them, a square, and a stack; then what AdamW takes.
MATRICES = [(4, 7), (4, 7), (7, 4), (5, 5), (2, 3, 6)]
OTHERS = [(7,), (1,)]


def orthogonal(x, group):
    return newton_schulz(
        x,
        steps=group["ns_steps"],
        coefficients=group["ns_coefficients"],
        eps=group["ns_eps"],
        impl="reference",
    )


class PlainAdamW:
    def __init__(self, group):
        self.group, self.t, self.m, self.v = group, 0, 0.0, 0.0

    def step(self, w, g):
        group = self.group
        beta1, beta2 = group["adamw_betas"]
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        update = (self.m / (1 - beta1**self.t)) / ((self.v / (1 - beta2**self.t)).sqrt() + group["adamw_eps"])
        return w * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * update


class PlainMuon:
    def __init__(self, group):
        self.group, self.m = group, 0.0

    def step(self, w, g):
        group, mu = self.group, self.group["momentum"]
        self.m = mu * self.m + (1 - mu) * g
        u = orthogonal(mu * self.m + (1 - mu) * g if group["nesterov"] else self.m, group)
        scale = group["rms"] * max(w.shape[-2:]) ** 0.5
        return w * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * scale * u


class PlainM3:
    def __init__(self, group):
        self.group, self.m1, self.m2, self.v, self.o2 = group, 0.0, 0.0, 0.0, 0.0
        self.window = []

    def step(self, w, g):
        group = self.group
        beta1, beta2, beta3 = group["betas"]
        if len(self.window) == group["frequency"]:
            total = sum(self.window)
            if group["literal"]:
                self.m2 = self.m2 + beta3 * total
            else:
                self.m2 = beta3 * self.m2 + (1 - beta3) * total / len(self.window)
            self.o2, self.window = orthogonal(self.m2, group), []
        self.window.append(g)
        decayed = w * (1 - group["lr"] * group["weight_decay"])
        if group["literal"]:
            self.m1, self.v = self.m1 + beta1 * g, self.v + beta2 * g**2
            d = (orthogonal(self.m1, group) + group["alpha"] * self.o2) / (self.v + group["eps"]) ** 0.5
            return decayed - group["lr"] * d
        self.m1 = beta1 * self.m1 + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        d = orthogonal(self.m1, group) + group["alpha"] * self.o2
        rows, columns = w.shape[-2:]
        if not group["second_moment"]:
            return decayed - group["lr"] * group["rms"] * max(rows, columns) ** 0.5 * d
        d = d / (self.v + group["eps"] * self.v.mean((-2, -1), keepdim=True)) ** 0.5
        norm = (d**2).sum((-2, -1), keepdim=True) ** 0.5
        return decayed - group["lr"] * group["rms"] * (rows * columns) ** 0.5 * d / norm


class PlainDeltaMomentum:
    def __init__(self, group):
        self.group, self.m, self.v, self.t = group, 0.0, 0.0, 0

    def step(self, w, g):
        group, self.t = self.group, self.t + 1
        m = self.m if self.t > 1 else torch.zeros_like(w)
        target = g
        if group["preconditioner"] == "rms":
            self.v = group["beta2"] * self.v + (1 - group["beta2"]) * g**2
            target = g / ((self.v / (1 - group["beta2"] ** self.t)) ** 0.5 + group["eps"])
        key, erase = (g, 1.0) if group["literal"] else (g / (g**2).sum() ** 0.5, group["erase"])
        eye = torch.eye(w.shape[-1], dtype=w.dtype)
        self.m = m @ (group["momentum"] * eye - erase * key.mT @ key) - group["lr"] * target
        return w * (1 - group["lr"] * group["weight_decay"]) + self.m


class PlainDeepMomentum:
    """The inner gradient by autograd."""

    def __init__(self, group):
        h = group["hidden"]
        self.group, self.a = group, 0.5 + (torch.arange(h, dtype=torch.float64) + 0.5) / h
        self.b = -torch.ones(h, dtype=torch.float64)

    def step(self, w, g):
        group = self.group
        u = g if group["literal"] else g / (g**2).mean() ** 0.5

        def m(a, b):
            return (b * torch.tanh(a * u[..., None])).mean(-1)

        a, b = (x.clone().requires_grad_() for x in (self.a, self.b))
        if group["literal"]:
            loss = m(a, b).sum()
        elif group["objective"] == "dot":
            loss = group["hidden"] * (u * m(a, b)).mean()
        else:
            loss = group["hidden"] * (0.5 * (m(a, b) + u) ** 2).mean()
        slopes = torch.autograd.grad(loss, (a, b))
        self.a, self.b = (
            group["momentum"] * x - group["memory_lr"] * s for x, s in zip((self.a, self.b), slopes)
        )
        rate = 1.0 if group["literal"] else group["lr"]
        return w * (1 - group["lr"] * group["weight_decay"]) + rate * m(self.a, self.b)


PLAIN = {Muon: PlainMuon, M3: PlainM3, DeltaMomentum: PlainDeltaMomentum, DeepMomentum: PlainDeepMomentum}

# Every class in its variants, for what training loops ask of all of them.
KINDS = {
    "muon": (Muon, {}),
    "m3": (M3, {"frequency": 3}),
    "m3-second": (M3, {"frequency": 3, "second_moment": True}),
    "m3-literal": (M3, {"frequency": 3, "literal": True}),
    "delta": (DeltaMomentum, {}),
    "delta-rms": (DeltaMomentum, {"preconditioner": "rms"}),
    "delta-literal": (DeltaMomentum, {"literal": True}),
    "deep": (DeepMomentum, {}),
    "deep-regression": (DeepMomentum, {"objective": "regression"}),
    "deep-literal": (DeepMomentum, {"literal": True}),
}


def draw(shapes, rng, dtype=torch.float64):
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in shapes]


def parameters(dtype=torch.float64, seed=0):
    """Matrices and others, as parameters."""
    rng = torch.Generator().manual_seed(seed)
    values = draw(MATRICES, rng, dtype), draw(OTHERS, rng, dtype)
    return tuple([torch.nn.Parameter(x) for x in part] for part in values)


def groups_of(matrices, others):
    return [{"params": matrices, "rule": "matrix"}, {"params": others, "rule": "adamw"}]


def set_gradients(params, rng):
    """The gradient of ``0.1 Σ a (w − b)²`` with random a > 0 and b: depends on the weights.

    Printed delta momentum diverges with gradients much longer than these.
    """
    for p in params:
        a = torch.rand(p.shape, generator=rng, dtype=torch.float64)
        b = torch.randn(p.shape, generator=rng, dtype=torch.float64)
        p.grad = (0.2 * a * (p.detach().double() - b)).to(p.dtype)
