"""One measurement: a model, what it does, and a context length."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from nl_models.hope import HopeCache, HopeConfig, HopeForCausalLM
from nl_models.layers.state import AttentionState
from nl_models.profiling.memory import PeakMemory

MODES = ("prefill", "training", "decode")
_WARM_UP_TOKENS = 64
_MOST_REPEATS = 5


@dataclass(frozen=True)
class Work:
    """What to measure.

    Attributes:
        name: of the model, for people.
        config: arguments of :class:`HopeConfig`.
        mode: ``"prefill"``: read ``context`` tokens, keep the state, give the last logits. ``"training"``:
            loss and gradients of one sequence of ``context`` tokens. ``"decode"``: the next tokens, one by
            one, after ``context`` tokens.
        context: tokens.
        segment: recurrent models read the context in segments of this many tokens through the cache;
            attention reads it at once, which is its fastest way and keeps all keys and values in any case.
        decode_tokens: tokens decoded in one repeat.
        device: ``"cpu"`` or ``"cuda[:N]"``.
        precision: ``"fp32"`` or ``"bf16"`` (weights and activations; fast state stays fp32).
        threads: CPU threads.
        enough_seconds: time to spend on repeats, of which there are at most five.
    """

    name: str
    config: dict
    mode: str
    context: int
    segment: int = 2048
    decode_tokens: int = 32
    device: str = "cpu"
    precision: str = "fp32"
    threads: int = 1
    enough_seconds: float = 2.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {MODES}, got {self.mode!r}")
        for name in ("context", "segment", "decode_tokens", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Measurement:
    """What came out; fields without a figure are ``None`` unless ``status`` is ``"ok"``.

    Attributes:
        model, mode, context: what was measured.
        status: ``"ok"``, ``"out of memory"``, ``"over the time limit"`` or ``"failed: …"``.
        seconds: median time of one repeat, or of one token when decoding.
        tokens_per_second: tokens of the repeat over its time.
        peak_bytes: highest memory above that of the idle model, see :class:`PeakMemory`.
        state_bytes: size of the recurrent state or key-value cache after ``context`` tokens (not for
        training).
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

    def to_dict(self) -> dict:
        return asdict(self)


def measure(work: Work) -> Measurement:
    """Do the work in this process, after a warm-up on a few tokens; call it in a fresh process."""
    torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    device = torch.device(work.device)
    dtype = torch.bfloat16 if work.precision == "bf16" else torch.float32
    model = HopeForCausalLM(HopeConfig(**work.config)).to(device, dtype)
    vocabulary = model.config.vocab_size
    tokens = torch.randint(vocabulary, (1, max(work.context, _WARM_UP_TOKENS)), device=device)
    action = {"prefill": _prefill, "training": _training, "decode": _decode}[work.mode]
    return action(work, model, tokens)


def _prefill(work: Work, model: HopeForCausalLM, tokens: torch.Tensor) -> Measurement:
    model.eval()
    _read(model, tokens[:, :_WARM_UP_TOKENS], work.segment)
    peak = PeakMemory(tokens.device)
    sizes = []
    segment = work.context if _attention_only(model) else work.segment

    def once() -> None:
        sizes.append(_read(model, tokens[:, : work.context], segment).num_bytes())

    times = _repeat(once, tokens.device, work.enough_seconds)
    return _result(work, times, work.context, peak.bytes(), sizes[-1])


def _training(work: Work, model: HopeForCausalLM, tokens: torch.Tensor) -> Measurement:
    model.train()

    def once(rows: torch.Tensor) -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()

    once(tokens[:, :_WARM_UP_TOKENS])
    # The gradients of the weights are part of the idle model: they do not depend on the context.
    peak = PeakMemory(tokens.device)
    times = _repeat(lambda: once(tokens[:, : work.context]), tokens.device, work.enough_seconds)
    return _result(work, times, work.context, peak.bytes(), None)


def _decode(work: Work, model: HopeForCausalLM, tokens: torch.Tensor) -> Measurement:
    model.eval()
    token = tokens[:, -1:]
    if _attention_only(model):
        cache = _filled_attention_cache(model, tokens[:, : work.context])
    else:
        cache = _read(model, tokens[:, : work.context], work.segment)
    state_bytes = cache.num_bytes()

    def once() -> None:
        with torch.no_grad():
            for _ in range(work.decode_tokens):
                model(input_ids=token, cache=cache, use_cache=True)

    with torch.no_grad():
        model(input_ids=token, cache=cache, use_cache=True)
    peak = PeakMemory(tokens.device)
    times = _repeat(once, tokens.device, work.enough_seconds)
    return _result(work, times, work.decode_tokens, peak.bytes(), state_bytes)


def _attention_only(model: HopeForCausalLM) -> bool:
    return set(model.config.layer_types) == {"full_attention"}


@torch.no_grad()
def _read(model: HopeForCausalLM, tokens: torch.Tensor, segment: int) -> HopeCache:
    """The state after ``tokens``, read in segments through the cache."""
    cache = HopeCache(model.config)
    for piece in tokens.split(segment, dim=1):
        model(input_ids=piece, cache=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.no_grad()
def _filled_attention_cache(model: HopeForCausalLM, tokens: torch.Tensor) -> HopeCache:
    """A key-value cache of the right size with the keys and values of a few tokens over and over.

    Decoding costs the same whatever they hold, and filling it by prefill takes time quadratic in the context.
    """
    length = tokens.shape[1]
    seed = _read(model, tokens[:, :_WARM_UP_TOKENS], _WARM_UP_TOKENS)
    cache = HopeCache(model.config)
    for filled, layer in zip(cache.layers, seed.layers):
        some = layer.state
        repeats = -(-length // some.mixer.keys.shape[2])
        filled.commit(
            some._replace(
                mixer=AttentionState(
                    keys=some.mixer.keys.repeat(1, 1, repeats, 1)[:, :, :length].clone(),
                    values=some.mixer.values.repeat(1, 1, repeats, 1)[:, :, :length].clone(),
                    mask=None,
                    position=torch.full_like(some.mixer.position, length),
                )
            ),
            length,
        )
    return cache


def _repeat(action: Callable[[], None], device: torch.device, enough_seconds: float) -> list[float]:
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


def _result(
    work: Work, times: list[float], tokens: int, peak_bytes: int, state_bytes: int | None
) -> Measurement:
    seconds = statistics.median(times)
    return Measurement(
        model=work.name,
        mode=work.mode,
        context=work.context,
        status="ok",
        seconds=seconds / tokens if work.mode == "decode" else seconds,
        tokens_per_second=tokens / seconds,
        peak_bytes=peak_bytes,
        state_bytes=state_bytes,
        repeats=len(times),
    )
