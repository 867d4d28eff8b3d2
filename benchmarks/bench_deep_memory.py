"""``deep_memory`` in the layer of Titans, against titans-pytorch: training, and decoding.

    python -m benchmarks.run --op deep_memory

Both sides are timed as a whole layer on the same input ``x``: RMS norm, projections of queries, keys and
values, learned rates, the memory, a gate per head, the output projection. On CUDA the op is also timed alone,
its kernels beside eager.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.baselines import decode_case, forward_backward, stream_of
from benchmarks.harness import Case, Factories, Provider
from benchmarks.measure import Work, random_tensors
from nl_kernels.doctor import tensors_of
from nl_kernels.memory_rule import DeepMemoryWeights, MemoryRule
from nl_kernels.ops.deep_memory import DeepMemoryState, deep_memory, deep_memory_step
from tools.op_inputs import deep_memory_inputs

EAGER_LIMIT = 8192  # beyond, its loop over chunks takes seconds for the launches of its kernels alone
KERNEL_CHUNK = 16  # the cases with larger ones are too large for the kernels, so that their default is eager


@dataclass(frozen=True)
class Setting:
    """How the memory of a case learns and is read."""

    rule: MemoryRule
    read: str = "snapshot"
    rate_max: float = 1.0


# By name of the case: the default rule; titans-pytorch's own rule, without the delta rule and the safeguards,
# and with its small rates; and the linear memories with running reads that Hope's layers have by default.
# Momentum is titans-pytorch's, the sum of the writes, which is also that of the step kernel.
SETTINGS = {
    "Titans layer": Setting(MemoryRule(momentum="sum")),
    "plain Titans layer": Setting(
        MemoryRule(
            activation="gelu",
            normalize_hidden=False,
            residual=True,
            erase="none",
            anchored=False,
            error_bound=None,
            momentum="sum",
        ),
        rate_max=0.01,
    ),
    "linear Titans layer": Setting(MemoryRule(), read="running"),
    "decode": Setting(MemoryRule(momentum="sum")),
    "linear decode": Setting(MemoryRule(), read="running"),
}


@dataclass(frozen=True)
class Layer:
    """The least layer around the op: what titans-pytorch's ``NeuralMemory`` has around its memory.

    Attributes:
        project: ``[3·H·D, H·D]``: queries, keys, values. rates: ``[4·H, H·D]``. out: ``[H·D, H·D]``.
        inner: ``[H, h, D]``. outer: ``[H, D, h]``; a linear memory, h = 0, has ``[H, D, D]`` alone.
    """

    project: Tensor
    rates: Tensor
    out: Tensor
    inner: Tensor
    outer: Tensor | None
    chunk: int
    momentum: bool
    setting: Setting

    @classmethod
    def random(cls, case: Case, device: torch.device, dtype: torch.dtype) -> Layer:
        """Weights as initialised; the same for every dtype."""
        heads, width, hidden = (case.shape[name] for name in ("H", "D", "h"))
        stream = heads * width
        made = random_tensors(
            1,
            {
                "project": (3 * stream, stream),
                "rates": (4 * heads, stream),
                "out": (stream, stream),
                "inner": (heads, hidden or width, width),
                "outer": (heads, width, hidden),
            },
            torch.device("cpu"),
            torch.float64,
        )
        weights = {
            name: (x * x.shape[-1] ** -0.5).to(device=device, dtype=dtype).requires_grad_()
            for name, x in made.items()
            if x.numel()
        }
        return cls(
            **{"outer": None, **weights},
            chunk=case.shape["C"],
            momentum=bool(case.shape["momentum"]),
            setting=SETTINGS[case.name],
        )

    @property
    def parameters(self) -> list[Tensor]:
        layers = (self.project, self.rates, self.out, self.inner, self.outer)
        return [x for x in layers if x is not None]

    def __call__(
        self, x: Tensor, state: DeepMemoryState | None = None, impl: str | None = None, keep: bool = False
    ) -> tuple[Tensor, DeepMemoryState | None]:
        heads, _, width = self.inner.shape
        normed = F.rms_norm(x, x.shape[-1:])
        q, k, v = F.linear(normed, self.project).unflatten(-1, (3, heads, width)).unbind(2)
        rate, decay, momentum, gate = F.linear(normed, self.rates).unflatten(-1, (4, heads)).unbind(2)
        tokens = (
            F.normalize(q, dim=-1),
            F.normalize(k, dim=-1),
            v,
            self.setting.rate_max * rate.sigmoid(),
            F.logsigmoid(decay + 4),
        )
        weights = DeepMemoryWeights(self.inner, self.outer)
        options = {
            "chunk_size": self.chunk,
            "momentum": momentum.sigmoid() if self.momentum else None,
            "rule": self.setting.rule,
            "read": self.setting.read,
            "impl": impl,
        }
        if state is not None and x.shape[1] == 1:
            options["momentum"] = None if options["momentum"] is None else options["momentum"][:, 0]
            read, final = deep_memory_step(*(t[:, 0] for t in tokens), weights, state=state, **options)
            read = read[:, None]
        else:
            read, final = deep_memory(
                *tokens, weights, initial_state=state, output_final_state=keep, **options
            )
        gated = read * gate.sigmoid()[..., None]
        return F.linear(gated.flatten(2), self.out), final


def training_providers(case: Case, device: torch.device) -> Factories:
    """Forward and backward of the layer, with the setting that goes by the case's name."""
    sizes = case.shape

    def ours(role: str = "ours", impl: str | None = None) -> Provider:
        layer = Layer.random(case, device, case.dtype)
        x, cotangent = stream_of(case, device, case.dtype)

        def serve() -> Tensor:
            return layer(x, impl=impl)[0]

        run = forward_backward(serve, [x, *layer.parameters], cotangent)
        return Provider(run, role=role, comparable=True)

    def titans(fresh_gradients: bool) -> Provider:
        return peers.titans_pytorch(
            tokens=sizes["T"],
            width=sizes["H"] * sizes["D"],
            heads=sizes["H"],
            hidden=sizes["h"],
            chunk=sizes["C"],
            fresh_gradients=fresh_gradients,
            momentum=bool(sizes["momentum"]),
            device=device,
            batch=sizes["B"],
        )

    def ttt() -> Provider:
        width = sizes["H"] * sizes["D"]
        return peers.ttt_linear(
            tokens=sizes["T"], width=width, heads=sizes["H"], chunk=sizes["C"], device=device
        )

    factories = {
        "nl_kernels": ours,
        "titans-pytorch": lambda: titans(True),
        "titans-pytorch, one snapshot": lambda: titans(False),
    }
    if not sizes["h"]:
        factories["TTT-Linear, plain PyTorch"] = ttt
    return factories


def training_reference(case: Case, tokens: int) -> Tensor:
    """The token loop in fp64 on the first tokens."""
    cpu = torch.device("cpu")
    layer = Layer.random(case, cpu, torch.float64)
    x, _ = stream_of(case, cpu, case.dtype)
    with torch.no_grad():
        return layer(x[:, :tokens].double(), impl="reference")[0]


def training_work(sizes: dict[str, int], element_size: int) -> Work:
    """Products of the layer (forward; twice as many backward), and its input, output and weights once."""
    width, hidden, heads, chunk = (sizes[name] for name in ("D", "h", "H", "C"))
    stream = heads * width
    if not hidden:  # a linear memory: half of two layers that are as wide, without the error's way back
        return _linear_work(sizes, element_size)
    projections = 2 * stream * (4 * stream + 4 * heads)
    # Recall of keys, read of queries, the error's way back, the writes; then what the erase needs of a chunk.
    memory = 2 * width * hidden * 7 + 2 * chunk * (width + hidden) * 2
    tokens = sizes["B"] * sizes["T"]
    weights = 4 * stream**2 + 2 * heads * width * hidden
    return Work(
        3 * tokens * (projections + heads * memory), 3 * element_size * (2 * tokens * stream + weights)
    )


def _linear_work(sizes: dict[str, int], element_size: int) -> Work:
    width, heads, chunk, stream = sizes["D"], sizes["H"], sizes["C"], sizes["H"] * sizes["D"]
    # Recall of keys at the snapshot and running, read of queries, the write; then erase and read in a chunk.
    memory = 2 * width**2 * 4 + 2 * chunk * width * 4
    tokens = sizes["B"] * sizes["T"]
    flops = 3 * tokens * (2 * stream * (4 * stream + 4 * heads) + heads * memory)
    return Work(flops, 3 * element_size * (2 * tokens * stream + 4 * stream**2 + heads * width**2))


def op_inputs(case: Case, device: torch.device) -> dict[str, object]:
    """Keyword arguments of the op: the default rule, running reads."""
    sizes = case.shape
    made = deep_memory_inputs(
        sizes["B"], sizes["T"], sizes["H"], sizes["D"], sizes["h"] or None, outer_scale=0.1, dtype=case.dtype
    )
    moved = {name: x.to(device).requires_grad_() for name, x in made.items() if isinstance(x, Tensor)}
    weights = (None if w is None else w.to(device).requires_grad_() for w in made["weights"])
    return {**moved, "weights": DeepMemoryWeights(*weights), "chunk_size": sizes["C"], "read": "running"}


def op_providers(case: Case, device: torch.device) -> Factories:
    """The op itself, no projections: the default, and beside kernels eager where its loop is short."""

    def ours(impl: str | None, role: str) -> Provider:
        inputs = op_inputs(case, device)
        if case.mode == "forward":

            def run() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return deep_memory(**inputs, impl=impl)[:1]

        else:
            cotangent = random_tensors(1, {"o": tuple(inputs["v"].shape)}, device, case.dtype)["o"]
            run = forward_backward(lambda: deep_memory(**inputs, impl=impl)[0], tensors_of(inputs), cotangent)
        return Provider(run, role=role, comparable=True)

    factories = {"nl_kernels": lambda: ours(None, "ours")}
    if case.shape["T"] <= EAGER_LIMIT and case.shape["C"] <= KERNEL_CHUNK:
        factories["nl_kernels eager"] = lambda: ours("eager", "variant")
    return factories


def op_reference(case: Case, tokens: int) -> Tensor:
    """The token loop in fp64 on the first tokens."""
    inputs = op_inputs(case, torch.device("cpu"))
    weights = DeepMemoryWeights(*(None if w is None else w.detach().double() for w in inputs["weights"]))
    prefix = {n: x.detach()[:, :tokens].double() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    return deep_memory(**{**prefix, "weights": weights}, impl="reference")[0]


def op_work(sizes: dict[str, int], passes: int) -> Work:
    """The op README's counts: products forward (twice as many backward), tokens and their gradients once."""
    width, hidden, chunk = sizes["D"], sizes["h"], sizes["C"]
    tokens = sizes["B"] * sizes["T"] * sizes["H"]
    layers, matrix = (2, width * hidden) if hidden else (1, width * width)
    pairs = layers * 2 * chunk * (width + (hidden or width))  # triangular: half of [C, C] matrices
    forward = 2 * matrix * (layers * 5 + (1 if hidden else 0)) + pairs
    return Work(passes * tokens * forward, passes * tokens * 2 * (4 * width + 2))


def op_case(mode: str, *, quick: bool = False, **sizes: int) -> Case:
    """One case of the op itself on CUDA, in bf16; chunks beyond ``KERNEL_CHUNK`` run eager."""
    return Case(
        op="deep_memory",
        name="two-layer memory" if sizes["h"] else "linear memory",
        mode=mode,
        shape=sizes,
        providers=op_providers,
        work=op_work(sizes, 1 if mode == "forward" else 3),
        reference=op_reference,
        dtype=torch.bfloat16,
        memory=True,
        quick=quick,
        devices=("cuda",),
    )


def training_case(
    device: str, quick: bool = False, memory: bool = False, name: str = "Titans layer", **sizes: int
) -> Case:
    """One training case on one kind of device; ``name`` is one of :data:`SETTINGS`."""
    return Case(
        op="deep_memory",
        name=name,
        mode="forward+backward",
        shape=sizes,
        providers=training_providers,
        work=training_work(sizes, 4),
        reference=training_reference,
        memory=memory,
        quick=quick,
        devices=(device,),
    )


CASES = [
    *(
        training_case("cpu", quick=hidden == 64, B=1, T=512, H=4, D=64, h=hidden, C=chunk, momentum=1)
        for chunk in (64, 16)
        for hidden in (64, 256)
    ),
    *(
        training_case("cpu", memory=True, B=1, T=2048, H=4, D=64, h=hidden, C=chunk, momentum=1)
        for chunk in (64, 16)
        for hidden in (64, 128, 256)
    ),
    training_case("cpu", memory=True, B=1, T=2048, H=4, D=64, h=64, C=64, momentum=0),
    *(
        training_case(
            "cpu", memory=True, name="plain Titans layer", B=1, T=2048, H=4, D=64, h=64, C=chunk, momentum=1
        )
        for chunk in (64, 16)
    ),
    training_case(
        "cpu", memory=True, name="linear Titans layer", B=1, T=2048, H=4, D=64, h=0, C=16, momentum=0
    ),
    *(
        op_case(mode, quick=True, B=8, T=8192, H=16, D=64, h=hidden, C=16)
        for hidden in (0, 64)
        for mode in ("forward", "forward+backward")
    ),
    *(
        op_case("forward+backward", B=max(1, 65536 // tokens), T=tokens, H=16, D=64, h=hidden, C=16)
        for hidden in (0, 64)
        for tokens in (4096, 16384, 65536, 262144)
    ),
    *(
        op_case(mode, B=batch, T=tokens, H=heads, D=width, h=hidden, C=chunk)
        for batch, tokens, heads, width, hidden, chunk in (
            (8, 8192, 16, 64, 256, 64),
            (8, 8192, 8, 128, 512, 64),
            (4, 8192, 2, 512, 1536, 2048),
        )
        for mode in ("forward", "forward+backward")
    ),
    training_case("cuda", quick=True, memory=True, B=4, T=2048, H=8, D=64, h=256, C=64, momentum=1),
    decode_case("deep_memory", "decode", Layer.random, H=4, D=64, h=64, C=64, momentum=1),
    decode_case("deep_memory", "linear decode", Layer.random, H=4, D=64, h=0, C=16, momentum=0),
]
