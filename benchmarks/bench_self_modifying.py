"""``self_modifying_memory`` in its layer, against nested-learning: training, and decoding.

    python -m benchmarks.run --op self_modifying

Both sides are timed as a layer on the same kind of input: causal depthwise convolution, query projection,
all memories with their writes. Ours also projects the inputs of keys and values, and its gradients flow
through the writes into every memory's initial state. On CUDA the op is also timed alone, its kernels beside
eager.
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
from nl_kernels.memory_rule import DeepMemoryWeights
from nl_kernels.ops.self_modifying import (
    SelfModifyingState,
    SelfModifyingWeights,
    self_modifying_memory,
    self_modifying_memory_step,
)
from tools.op_inputs import self_modifying_inputs

EAGER_LIMIT = 8192  # beyond, its loop over chunks takes seconds for the launches of its kernels alone
KERNEL_CHUNK = 16  # the cases with larger ones are too large for the kernels, so that their default is eager
WINDOW = 4
# By name of the case: the read, and whether the memories are linear (h = 0), as Hope's are by default.
READS = {
    "self-modifying layer": "snapshot",
    "Hope's default layer": "running",
    "decode": "snapshot",
    "Hope's default decode": "running",
}


@dataclass(frozen=True)
class Layer:
    """The least layer around the op.

    Attributes:
        conv: ``[H·D, 1, 4]``, depthwise and causal.
        project: ``[3·H·D, H·D]``: the query, and the inputs of the key and value memories.
        weights: inner ``[H, h, D]`` and outer ``[H, D, h]`` (gates ``[H, 1, h]``) of the five memories; of
            linear ones, h = 0, inner ``[H, D, D]`` (gates ``[H, 1, D]``) alone.
    """

    conv: Tensor
    project: Tensor
    weights: SelfModifyingWeights
    chunk: int
    read: str

    @classmethod
    def random(cls, case: Case, device: torch.device, dtype: torch.dtype) -> Layer:
        """Weights as initialised; the same for every dtype."""
        heads, width, hidden = (case.shape[name] for name in ("H", "D", "h"))
        stream = heads * width
        shapes = {"conv": (stream, 1, WINDOW), "project": (3 * stream, stream)}
        for name in SelfModifyingWeights._fields:
            out = 1 if name in ("rate", "retention") else width
            shapes |= {f"{name} inner": (heads, hidden or out, width), f"{name} outer": (heads, out, hidden)}
        made = {
            name: (x * x.shape[-1] ** -0.5).to(device=device, dtype=dtype).requires_grad_()
            for name, x in random_tensors(1, shapes, torch.device("cpu"), torch.float64).items()
            if x.numel()
        }
        memories = (
            DeepMemoryWeights(made[f"{name} inner"], made.get(f"{name} outer"))
            for name in SelfModifyingWeights._fields
        )
        weights = SelfModifyingWeights(*memories)
        return cls(made["conv"], made["project"], weights, case.shape["C"], READS[case.name])

    @property
    def parameters(self) -> list[Tensor]:
        layers = (layer for memory in self.weights for layer in memory)
        return [self.conv, self.project, *(layer for layer in layers if layer is not None)]

    def __call__(
        self,
        x: Tensor,
        state: SelfModifyingState | None = None,
        impl: str | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, SelfModifyingState | None]:
        heads, _, width = self.weights.memory.inner.shape
        padded = F.pad(x.mT, (WINDOW - 1, 0))
        mixed = F.conv1d(padded, self.conv, groups=self.conv.shape[0]).mT
        query, key, value = F.linear(mixed, self.project).unflatten(-1, (3, heads, width)).unbind(2)
        tokens = (query, key, value, mixed.unflatten(-1, (heads, width)))
        options = {"chunk_size": self.chunk, "read": self.read, "impl": impl}
        if state is not None and x.shape[1] == 1:
            out, final = self_modifying_memory_step(
                *(t[:, 0] for t in tokens), self.weights, state=state, **options
            )
            return out.flatten(1)[:, None], final
        out, final = self_modifying_memory(
            *tokens, self.weights, initial_state=state, output_final_state=keep, **options
        )
        return out.flatten(2), final


def training_providers(case: Case, device: torch.device) -> Factories:
    """Forward and backward of the layer with the default rule, gradients through the writes."""
    sizes = case.shape

    def ours() -> Provider:
        layer = Layer.random(case, device, case.dtype)
        x, cotangent = stream_of(case, device, case.dtype)
        run = forward_backward(lambda: layer(x)[0], [x, *layer.parameters], cotangent)
        return Provider(run, comparable=True)

    def nested(memories: int) -> Provider:
        return peers.nested_learning(
            tokens=sizes["T"],
            width=sizes["H"] * sizes["D"],
            memories=memories,
            chunk=sizes["C"],
            device=device,
            batch=sizes["B"],
        )

    return {
        "nl_kernels": ours,
        f"nested-learning, {sizes['H']} memories": lambda: nested(sizes["H"]),
        "nested-learning, 1 wide memory": lambda: nested(1),
    }


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
    # Products of a layer's size: 8 to make keys, values and gates and to read, 8 for the recalls, 8 for the
    # targets, 3 for the errors' way back, 8 for the writes. Then what the erase needs of a chunk.
    if not hidden:
        # Keys, values, reads 3, recalls 3, targets 3, writes 3; then what erase and read need of a chunk.
        memories = 2 * 12 * width**2 + 2 * chunk * width * 6
        weights = 3 * stream**2 + 3 * heads * width**2
        flops = 3 * sizes["B"] * sizes["T"] * (6 * stream**2 + heads * memories)
        return Work(flops, 3 * element_size * (2 * sizes["B"] * sizes["T"] * stream + weights))
    memories = 2 * 35 * width * hidden + 2 * chunk * (width + 5 * hidden + 3 * (width + hidden))
    tokens = sizes["B"] * sizes["T"]
    weights = 3 * stream**2 + 8 * heads * width * hidden
    flops = 3 * tokens * (6 * stream**2 + heads * memories)
    return Work(flops, 3 * element_size * (2 * tokens * stream + weights))


def training_case(
    device: str, quick: bool = False, memory: bool = False, name: str = "self-modifying layer", **sizes: int
) -> Case:
    """One training case on one kind of device; ``name`` is one of :data:`READS`."""
    return Case(
        op="self_modifying",
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


def op_inputs(case: Case, device: torch.device) -> dict[str, object]:
    """Keyword arguments of the op: the default rule, running reads."""
    sizes = case.shape
    made = self_modifying_inputs(
        sizes["B"], sizes["T"], sizes["H"], sizes["D"], sizes["h"] or None, outer_scale=0.1, dtype=case.dtype
    )
    moved = {name: x.to(device).requires_grad_() for name, x in made.items() if isinstance(x, Tensor)}
    weights = (
        DeepMemoryWeights(*(None if w is None else w.to(device).requires_grad_() for w in memory))
        for memory in made["weights"]
    )
    return {**moved, "weights": SelfModifyingWeights(*weights), "chunk_size": sizes["C"], "read": "running"}


def op_providers(case: Case, device: torch.device) -> Factories:
    """The op itself, no projections: the default, and beside kernels eager where its loop is short."""

    def ours(impl: str | None, role: str) -> Provider:
        inputs = op_inputs(case, device)
        if case.mode == "forward":

            def run() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return self_modifying_memory(**inputs, impl=impl)[:1]

        else:
            cotangent = random_tensors(1, {"o": tuple(inputs["query"].shape)}, device, case.dtype)["o"]
            run = forward_backward(
                lambda: self_modifying_memory(**inputs, impl=impl)[0], tensors_of(inputs), cotangent
            )
        return Provider(run, role=role, comparable=True)

    factories = {"nl_kernels": lambda: ours(None, "ours")}
    if case.shape["T"] <= EAGER_LIMIT and case.shape["C"] <= KERNEL_CHUNK:
        factories["nl_kernels eager"] = lambda: ours("eager", "variant")
    return factories


def op_reference(case: Case, tokens: int) -> Tensor:
    """The token loop in fp64 on the first tokens."""
    inputs = op_inputs(case, torch.device("cpu"))
    prefix = {
        name: (x[:, :tokens] if x.ndim == 4 else x).detach().double() if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }
    prefix["weights"] = SelfModifyingWeights(
        *(
            DeepMemoryWeights(*(None if w is None else w.detach().double() for w in memory))
            for memory in inputs["weights"]
        )
    )
    return self_modifying_memory(**prefix, impl="reference")[0]


def op_work(sizes: dict[str, int], passes: int) -> Work:
    """The op README's counts of products, twice as many backward; tokens and their gradients once."""
    width, hidden = sizes["D"], sizes["h"]
    tokens = sizes["B"] * sizes["T"] * sizes["H"]
    forward = 2 * (43 * width * hidden if hidden else 13 * width * width)
    return Work(passes * tokens * forward, passes * tokens * 2 * 5 * width)


def op_case(mode: str, *, quick: bool = False, **sizes: int) -> Case:
    """One case of the op itself on CUDA, in bf16; chunks beyond ``KERNEL_CHUNK`` run eager."""
    return Case(
        op="self_modifying",
        name="two-layer memories" if sizes["h"] else "linear memories",
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


CASES = [
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
        op_case(mode, B=batch, T=8192, H=heads, D=width, h=hidden, C=chunk)
        for batch, heads, width, hidden, chunk in (
            (8, 16, 64, 256, 64),
            (8, 8, 128, 512, 64),
            (2, 2, 512, 1536, 2048),
        )
        for mode in ("forward", "forward+backward")
    ),
    *(training_case("cpu", quick=chunk == 16, B=1, T=512, H=4, D=64, h=64, C=chunk) for chunk in (4, 16, 64)),
    training_case("cpu", memory=True, B=1, T=2048, H=4, D=64, h=64, C=16),
    *(
        training_case(
            "cpu",
            quick=tokens == 512,
            memory=tokens == 2048,
            name="Hope's default layer",
            B=1,
            T=tokens,
            H=4,
            D=64,
            h=0,
            C=16,
        )
        for tokens in (512, 2048)
    ),
    training_case("cuda", quick=True, memory=True, B=4, T=2048, H=8, D=64, h=64, C=16),
    decode_case("self_modifying", "decode", Layer.random, H=4, D=64, h=64, C=16),
    decode_case("self_modifying", "Hope's default decode", Layer.random, H=4, D=64, h=0, C=16),
]
