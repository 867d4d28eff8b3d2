"""One measurement: a model or layer, what it does, and a context length."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from nl_models.continual import ContinuumLearner, StepRule
from nl_models.profiling.flops import Moves, count_flops, count_moves
from nl_models.profiling.memory import PeakMemory
from nl_models.profiling.subjects import Source, Subject

MODES = ("prefill", "training", "decode", "learning")
_WARM_UP_TOKENS = 64
_MOST_REPEATS = 5
# Operations are counted in a run more, which is slower: on CUDA what kernels do is plain PyTorch there.
_COUNTED_SECONDS = {"cpu": 30.0, "cuda": 1.0}


@dataclass(frozen=True)
class Work:
    """What to measure.

    Attributes:
        name: of the model, for people.
        source: what it is made of.
        mode: ``"prefill"``: read ``context`` tokens, keep the state, give the last logits. ``"training"``:
            loss and gradients of ``context`` tokens. ``"decode"``: the next tokens, one by one, after
            ``context`` tokens. ``"learning"``: read ``context`` tokens and learn from them by their own loss
            (:class:`nl_models.continual.ContinuumLearner`).
        context: tokens of each sequence.
        batch: sequences at a time.
        segment: recurrent models read the context in segments of this many tokens through the cache;
            attention reads it at once, which is its fastest way and keeps all keys and values in any case.
        decode_tokens: tokens decoded in one repeat.
        device: ``"cpu"`` or ``"cuda[:N]"``.
        precision: ``"fp32"`` or ``"bf16"`` (weights and activations; fast state stays fp32).
        threads: CPU threads.
        enough_seconds: time to spend on repeats, of which there are at most five.
        trace: file for a trace of one more repeat by :mod:`torch.profiler`.
    """

    name: str
    source: Source
    mode: str
    context: int
    batch: int = 1
    segment: int = 2048
    decode_tokens: int = 32
    device: str = "cpu"
    precision: str = "fp32"
    threads: int = 1
    enough_seconds: float = 2.0
    trace: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {MODES}, got {self.mode!r}")
        for name in ("context", "batch", "segment", "decode_tokens", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Measurement:
    """What came out; fields without a figure are ``None`` unless ``status`` is ``"ok"``.

    Attributes:
        model, mode, context, batch: what was measured.
        status: ``"ok"``, ``"out of memory"``, ``"over the time limit"`` or ``"failed: …"``.
        seconds: median time of one repeat, or of one token (of every sequence) when decoding.
        quartiles: of the same times; the median twice where one repeat took long enough.
        tokens_per_second: tokens of the repeat, of all sequences, over its median time.
        peak_bytes: highest memory above that of the idle model, see :class:`PeakMemory`.
        state_bytes: size of the recurrent state or key-value cache after ``context`` tokens, of all sequences
            (of prefill and decode).
        flops: operations in ``seconds``, see :func:`nl_models.profiling.flops.count_flops`; ``None`` where
            they were not counted.
        moved: bytes that its operators read and write in ``seconds``, and how many are called, see
            :func:`nl_models.profiling.flops.count_moves`.
        repeats: how often it was timed.
    """

    model: str
    mode: str
    context: int
    status: str
    seconds: float | None = None
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    state_bytes: int | None = None
    repeats: int = 0
    batch: int = 1
    quartiles: tuple[float, float] | None = None
    flops: int | None = None
    moved: Moves | None = None

    @property
    def flops_per_second(self) -> float | None:
        return None if self.flops is None or self.seconds is None else self.flops / self.seconds

    @property
    def bytes_per_second(self) -> float | None:
        return None if self.moved is None or self.seconds is None else self.moved.bytes / self.seconds

    def to_dict(self) -> dict:
        return asdict(self)


def measure(work: Work) -> Measurement:
    """Do the work in this process, after a warm-up on a few tokens; call it in a fresh process."""
    torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    device = torch.device(work.device)
    subject = work.source.build(device, torch.bfloat16 if work.precision == "bf16" else torch.float32)
    subject.module.train(work.mode == "training")
    inputs = subject.inputs(work.batch, max(work.context, _WARM_UP_TOKENS))
    prepare = {"prefill": _prefill, "training": _training, "decode": _decode, "learning": _learning}[
        work.mode
    ]
    state_bytes, once, part = prepare(work, subject, inputs)
    peak = PeakMemory(device)
    times = _repeat(once, device, work.enough_seconds)
    peak_bytes = peak.bytes()
    counted = moved = None
    if statistics.median(times) < _COUNTED_SECONDS.get(device.type, 30.0):
        with contextlib.suppress(torch.OutOfMemoryError):  # plain PyTorch may need more than kernels
            counted = count_flops(part)
        moved = count_moves(part, device)
    if work.trace is not None:
        _write_trace(work.trace, once)
    tokens = work.decode_tokens if work.mode == "decode" else work.context
    shares = [seconds / (tokens if work.mode == "decode" else 1) for seconds in times]
    seconds = statistics.median(shares)
    return Measurement(
        model=work.name,
        mode=work.mode,
        context=work.context,
        batch=work.batch,
        status="ok",
        seconds=seconds,
        quartiles=_quartiles(shares),
        tokens_per_second=work.batch * (1 if work.mode == "decode" else tokens) / seconds,
        peak_bytes=peak_bytes,
        state_bytes=state_bytes(),
        flops=counted,
        moved=moved,
        repeats=len(times),
    )


_Action = Callable[[], object]
# Of a mode: the size of the state afterwards, one repeat, and the part of it whose operations are counted.
_Prepared = tuple[Callable[[], int | None], _Action, _Action]


def _prefill(work: Work, subject: Subject, inputs: torch.Tensor) -> _Prepared:
    subject.read(inputs[:, :_WARM_UP_TOKENS], work.segment)
    segment = work.context if subject.only_attention else work.segment
    sizes = []

    def once() -> None:
        sizes.append(subject.state_bytes(subject.read(inputs[:, : work.context], segment)))

    return lambda: sizes[-1], once, once


def _training(work: Work, subject: Subject, inputs: torch.Tensor) -> _Prepared:
    def once(rows: torch.Tensor) -> None:
        subject.module.zero_grad(set_to_none=True)
        subject.loss(rows).backward()

    # The gradients of the weights are part of the idle model: they do not depend on the context.
    once(inputs[:, :_WARM_UP_TOKENS])

    def step() -> None:
        once(inputs[:, : work.context])

    return lambda: None, step, step


def _decode(work: Work, subject: Subject, inputs: torch.Tensor) -> _Prepared:
    token = inputs[:, -1:]
    state = subject.ready_to_decode(inputs[:, : work.context], work.segment)
    state_bytes = subject.state_bytes(state)

    @torch.no_grad()
    def decode(tokens: int) -> None:
        nonlocal state
        for _ in range(tokens):
            state = subject.continued(token, state)

    decode(1)
    return lambda: state_bytes, lambda: decode(work.decode_tokens), lambda: decode(1)


def _learning(work: Work, subject: Subject, inputs: torch.Tensor) -> _Prepared:
    rule = StepRule(rule="momentum", rate=1e-4)

    def learn(rows: torch.Tensor) -> None:
        ContinuumLearner(subject.module, rule, batch_size=work.batch).learn(rows)

    learn(inputs[:, :_WARM_UP_TOKENS])

    def once() -> None:
        learn(inputs[:, : work.context])

    return lambda: None, once, once


def _repeat(action: _Action, device: torch.device, enough_seconds: float) -> list[float]:
    """Times of some repeats; the first is a warm-up unless it alone takes long enough."""
    times: list[float] = []
    while len(times) < 2 or (sum(times) < enough_seconds and len(times) <= _MOST_REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
        if times[0] > max(2.0, enough_seconds):
            return times
    return times[1:]


def _quartiles(times: list[float]) -> tuple[float, float]:
    if len(times) == 1:
        return times[0], times[0]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, high


def _write_trace(path: str, action: _Action) -> None:
    with torch.profiler.profile() as profiler:
        action()
    profiler.export_chrome_trace(path)
