"""``delta_memory`` against causal attention and flash-linear-attention: training, and decoding.

python -m benchmarks.run --op delta_memory
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.baselines import (
    PAST,
    attention_decode,
    causal_attention,
    decode_name,
    decode_provider,
    forward_backward,
)
from benchmarks.harness import COMPILED, Case, Factories, Provider
from benchmarks.measure import Work, random_tensors
from nl_kernels.ops.delta_memory import delta_memory, delta_memory_step, eager
from tools.op_inputs import delta_memory_inputs, to_float64

TOKENS = ("q", "k", "v", "log_decay", "erase")
CHUNK = 64
REFERENCE_LIMIT = 512  # the token loop is fifteen times slower there already
COMPILED_LIMIT = 2048  # every chunk is unrolled: compiling takes minutes on a CPU


def inputs_of(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Inputs as a trained layer would produce them, without states. ``Hk``: heads of queries and keys."""
    sizes = case.shape
    return delta_memory_inputs(
        sizes["B"],
        sizes["T"],
        sizes["H"],
        sizes["D"],
        key_heads=sizes.get("Hk"),
        momentum=bool(sizes.get("momentum")),
        dtype=case.dtype,
        device=device,
        requires_grad=True,
    )


def training_providers(case: Case, device: torch.device) -> Factories:
    """Forward and backward of the op itself, no projections on either side."""

    def ours(impl: str | None, role: str, copies: int = 1) -> Provider:
        inputs = {name: x for name, x in inputs_of(case, device).items() if x is not None}
        cotangent = random_tensors(1, {"o": tuple(inputs["v"].shape)}, device, case.dtype)["o"]

        def forward() -> Tensor:
            copied = {name: inputs[name].repeat_interleave(copies, 2) for name in ("q", "k") if copies > 1}
            return delta_memory(**inputs | copied, chunk_size=CHUNK, impl=impl)[0]

        run = forward_backward(forward, list(inputs.values()), cotangent)
        return Provider(run, role=role, comparable=True, headline=copies == 1)

    def fla() -> Provider:
        inputs = inputs_of(case, device)
        with torch.no_grad():
            beta = inputs["erase"] * inputs["log_decay"].neg().exp()
            values = inputs["v"] / beta[..., None].to(case.dtype)
        cotangent = random_tensors(1, {"o": tuple(inputs["v"].shape)}, device, case.dtype)["o"]
        leaves = [inputs["q"], inputs["k"], values, inputs["log_decay"], beta]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        return peers.chunk_gated_delta_rule(*leaves, cotangent)

    def compiled() -> Provider:
        # The op is opaque to the compiler, so its two eager halves are given to it directly.
        inputs = inputs_of(case, device)
        tokens = [inputs[name].detach() for name in TOKENS] + [None] * 4
        cotangent = random_tensors(1, {"o": tuple(inputs["v"].shape)}, device, case.dtype)["o"]
        options = {"scale": 1.0, "read": "running", "chunk_size": CHUNK}
        forward = torch.compile(eager.delta_memory_forward, dynamic=False)
        backward = torch.compile(eager.delta_memory_backward, dynamic=False)

        def run() -> tuple[Tensor, ...]:
            with torch.no_grad():
                out = forward(*tokens, **options)[0]
                return out, *backward(cotangent, None, None, *tokens, **options)[: len(TOKENS)]

        return Provider(run, role="variant", comparable=True)

    factories = {"nl_kernels": lambda: ours(None, "ours")}
    if case.shape["T"] <= COMPILED_LIMIT and not case.shape.get("momentum"):
        factories[COMPILED] = compiled
    if device.type == "cuda":
        factories["nl_kernels eager"] = lambda: ours("eager", "variant")
        factories["flash-linear-attention"] = fla
    elif case.shape["T"] <= REFERENCE_LIMIT:
        factories["nl_kernels reference"] = lambda: ours("reference", "variant")
    if "Hk" in case.shape:
        group = case.shape["H"] // case.shape["Hk"]
        factories["nl_kernels, keys copied"] = lambda: ours(None, "variant", group)
    factories["attention"] = lambda: causal_attention(case, device)
    return factories


def training_reference(case: Case, tokens: int) -> Tensor:
    """The token loop in fp64 on the first tokens."""
    inputs = to_float64(inputs_of(case, torch.device("cpu")))
    prefix = {name: x.detach()[:, :tokens] for name, x in inputs.items() if x is not None}
    return delta_memory(**prefix, impl="reference")[0]


def training_work(sizes: dict[str, int], element_size: int) -> Work:
    """The products of the chunk form (forward; twice as many backward), and every input and gradient once."""
    tokens, width = sizes["B"] * sizes["T"] * sizes["H"], sizes["D"]
    forward = 2 * CHUNK * 3.5 * width + 6 * width * width
    elements = 2 * width * (1 + sizes.get("Hk", sizes["H"]) / sizes["H"]) + 2
    return Work(3 * tokens * forward, tokens * element_size * 3 * elements)


def decode_providers(case: Case, device: torch.device) -> Factories:
    """One token after 1 token and after 100,000."""

    def ours(past: int) -> Provider:
        inputs = {name: inputs_of(case.with_tokens(2_000), device)[name].detach() for name in TOKENS}
        token = {name: x[:, 0] for name, x in inputs.items()}

        def prefill(state: Tensor | None, tokens: int) -> Tensor:
            part = {name: x[:, :tokens] for name, x in inputs.items()}
            return delta_memory(**part, initial_state=state, output_final_state=True)[1]

        return decode_provider(lambda state: delta_memory_step(**token, state=state), prefill, past)

    return {
        **{decode_name("nl_kernels", past): lambda past=past: ours(past) for past in (1, PAST)},
        **{
            decode_name("attention", past): lambda past=past: attention_decode(case, device, past)
            for past in (1, PAST)
        },
    }


def training_case(dtype: torch.dtype, device: str, quick: bool = False, **sizes: int) -> Case:
    """One training case on one kind of device."""
    return Case(
        op="delta_memory",
        name="causal attention",
        mode="forward+backward",
        shape=sizes,
        providers=training_providers,
        work=training_work(sizes, dtype.itemsize),
        reference=training_reference,
        dtype=dtype,
        memory=True,
        quick=quick,
        devices=(device,),
    )


CASES = [
    *(
        training_case(torch.float32, "cpu", quick=tokens == 512, B=1, T=tokens, H=4, D=64)
        for tokens in (512, 1024, 2048, 4096)
    ),
    training_case(torch.float32, "cpu", B=1, T=2048, H=4, D=64, momentum=1),
    training_case(torch.float32, "cpu", B=1, T=2048, H=4, D=64, Hk=2),
    *(
        training_case(
            torch.bfloat16, "cuda", quick=tokens == 2048, B=32768 // tokens, T=tokens, H=16, D=width
        )
        for width in (64, 128)
        for tokens in (2048, 8192, 32768)
    ),
    training_case(torch.bfloat16, "cuda", B=4, T=8192, H=32, D=128, Hk=16),
    Case(
        op="delta_memory",
        name="decode",
        mode="step",
        shape={"B": 1, "T": 1, "H": 4, "D": 64},
        providers=decode_providers,
        quick=True,
    ),
]
