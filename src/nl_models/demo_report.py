"""The demo's results and the two reports made of them: Markdown, and HTML that needs no other file."""

from __future__ import annotations

import base64
import html
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nl_models.console import duration
from nl_models.evaluation.position import PositionBucket
from nl_models.evaluation.report import POSITION_HEADER, position_rows
from nl_models.files import write_bytes
from nl_models.profiling.measure import Measurement


@dataclass(frozen=True)
class ModelResult:
    """One model's training: losses in nats per token on the validation windows, time with evaluations."""

    name: str
    parameters: int
    learning_rate: float
    tokens: int
    validation_loss: float
    bits_per_byte: float
    perplexity: float
    seconds: float


@dataclass(frozen=True)
class Sample:
    """A prompt and what Hope wrote after it: ``tokens`` new tokens in ``seconds``."""

    prompt: str
    continuation: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """All that the reports tell. ``at_once`` trainings ran side by side.

    ``position`` is Hope's :meth:`~nl_models.evaluation.position.PositionLosses.to_dict`.
    """

    models: tuple[ModelResult, ...]
    sample: Sample
    position: dict
    measurements: tuple[Measurement, ...]
    settings: dict
    data: dict
    machine: dict
    command: str
    at_once: int
    seconds: float

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class _Heading:
    text: str


@dataclass(frozen=True)
class _Text:
    text: str


@dataclass(frozen=True)
class _Code:
    text: str


@dataclass(frozen=True)
class _Rows:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class _Image:
    file: str
    description: str


_Block = _Heading | _Text | _Code | _Rows | _Image
_TITLE = "Hope and softmax attention on real text"


def write_reports(folder: Path, result: DemoResult) -> None:
    """Write ``report.md`` and ``report.html`` into ``folder``, beside the plots that they show."""
    blocks = _content(result, folder)
    write_bytes(folder / "report.md", _markdown(blocks).encode())
    write_bytes(folder / "report.html", _html(blocks, folder).encode())


def _against(model: ModelResult, other: ModelResult) -> str:
    """ "0.123 below (1.0000)" or "0.123 above (1.0000)"."""
    difference = other.validation_loss - model.validation_loss
    return f"{abs(difference):.3f} {'below' if difference > 0 else 'above'} ({other.validation_loss:.4f})"


def _position_verdict(buckets: Sequence[PositionBucket]) -> str:
    last = buckets[-1]
    return (
        f"From token {last.start:,} to {last.stop:,} Hope's loss with its state carried is "
        f"{last.carried:.3f} nats per token, {abs(last.difference):.3f} "
        f"{'above' if last.difference > 0 else 'below'} that with a fresh state every window."
    )


def _content(result: DemoResult, folder: Path) -> list[_Block]:
    by_name = {model.name: model for model in result.models}
    hope = by_name["hope"]
    settings = result.settings
    buckets = [PositionBucket(**bucket) for bucket in result.position["buckets"]]
    verdict = (
        f"Hope's validation loss is {hope.validation_loss:.4f} nats per token: "
        f"{_against(hope, by_name['transformer'])} a plain transformer's, "
        f"{_against(hope, by_name['hope-attention'])} that of its own blocks with softmax attention in the "
        f"place of the memory, and {_against(hope, by_name['gated-delta-net'])} that with Gated DeltaNet "
        "there. One seed each: a difference of about a hundredth may be chance."
    )
    corpus = (
        settings["corpus"] or f"the sources and documentation topics of Python {result.machine['python']}"
    )
    train, validation = result.data["train"], result.data["validation"]
    rows = [
        [
            m.name, f"{m.parameters:,}", f"{m.tokens:,}", f"{m.learning_rate:g}", f"{m.validation_loss:.4f}",
            f"{m.bits_per_byte:.3f}", f"{m.perplexity:.2f}", duration(m.seconds),
        ]
        for m in result.models
    ]  # fmt: skip
    header = (
        "model", "parameters", "tokens seen", "peak learning rate", "validation loss", "bits/byte",
        "perplexity", "time",
    )  # fmt: skip
    return [
        _Text(verdict),
        _Rows(header, rows),
        _Image("loss.png", "Training and validation loss of all models against tokens seen"),
        _Heading("What was compared, and how"),
        _Text(
            f"The text is {corpus}, split by file: {train['tokens']:,} tokens of {train['files']:,} files to "
            f"train on, {validation['tokens']:,} tokens of {validation['files']:,} other files to validate "
            f"on. The tokenizer is a byte-level BPE with {result.data['vocab_size']:,} ids, trained on the "
            "training files only."
        ),
        _Text(
            f"All models have {settings['layers']} layer(s) of width {settings['hidden_size']} with "
            f"{settings['heads']} heads. Hope's blocks have a short convolution, a self-modifying Titans "
            "memory (linear memories) with norm and gate, and a continuum of one MLP whose weights take a "
            "step on what they read after every 32 tokens, towards what came next. The transformer has "
            "softmax attention (rotary positions) and an MLP, without convolution and gate; hope-attention "
            "has Hope's blocks, convolution and gate included, with the same attention in the place of the "
            "memory and a plain MLP in that of the continuum; gated-delta-net has that memory there. Their "
            "MLPs are as wide as it takes for an equal number of "
            "parameters (within 1 %)."
        ),
        _Text(
            f"All saw the same {settings['steps']} batches of {settings['batch_size']} × "
            f"{settings['sequence_length']} tokens in the same order, with the same optimiser (AdamW, "
            f"{settings['warmup_steps']} steps of warm-up, cosine) and the same seed. docs/demo.md says "
            "how the learning rates and Hope's options were chosen. The validation loss is "
            f"over {settings['validation_windows']} fixed windows; every window starts with an empty state. "
            "So few tokens tell how fast the models learn, not which is better after a long training. "
            f"Times are with {result.at_once} training(s) at once."
        ),
        _Heading("What Hope writes"),
        _Text(
            f"{result.sample.tokens} tokens sampled one by one from the recurrent state (temperature 0.8, "
            f"top 40) in {result.sample.seconds:.1f} s, after the prompt in the first two lines:"
        ),
        _Code(result.sample.prompt + result.sample.continuation),
        _Heading("Reading beyond the training window"),
        _Image("position.png", "Hope's loss against the number of tokens read before"),
        _Text(_position_verdict(buckets)),
        _Rows(POSITION_HEADER, position_rows(buckets)),
        _Text(
            f"{len(result.position['starts'])} rotations of {result.position['length']:,} tokens of the "
            "validation side, nats per token by the number of tokens read before. Carried: one state from "
            f"the first token on. Fresh: a new state every {result.position['window']:,} tokens, as in "
            "training. Writes off: the same weights, with a new state as often and all rates at 0, so that "
            "neither the memories nor the continuum change. Behind ±: the standard error over the rotations."
        ),
        _Heading("Speed and memory against context length"),
        _Image(
            "profile.png", "Tokens per second and memory of prefill, training step and decode against context"
        ),
        _Text(
            "One sequence, fp32, random weights, each point in a process of its own. Memory is the peak "
            "above that of the idle model; for decode it is the state that a conversation keeps. Hope reads "
            "a prompt 512 tokens at a time through its state, attention at once. Hope's state has one size "
            "whatever it has read; attention's keys and values grow with the context. The key-value cache "
            "to decode after is filled, not computed; Hope's state is computed by reading that many tokens."
        ),
        _profile_rows(result.measurements),
        _Heading("How to repeat it"),
        _Code(result.command),
        _Text(
            "Each model's folder is a training run with its config, metrics and final weights. Either can be "
            "trained alone, for example:"
        ),
        _Code(
            shlex.join(
                [
                    "python",
                    "-m",
                    "nl_models.train",
                    "--config",
                    str(folder / "hope/config.json"),
                    "--output",
                    "runs/hope",
                ]
            )
        ),
        _Text(f"Machine and versions (the whole demo took {duration(result.seconds)}):"),
        _Rows(("", ""), [[name, str(value)] for name, value in result.machine.items()]),
        _Text("Settings:"),
        _Code(json.dumps(settings, indent=1)),
    ]


def _profile_rows(measurements: Sequence[Measurement]) -> _Rows:
    header = ("mode", "context", "model", "tokens/s", "peak MiB", "state MiB")
    rows = [
        [
            m.mode,
            f"{m.context:,}",
            m.model,
            f"{m.tokens_per_second:,.0f}" if m.status == "ok" else m.status,
            "–" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:.1f}",
            "–" if m.state_bytes is None else f"{m.state_bytes / 2**20:.3f}",
        ]
        for m in measurements
    ]
    return _Rows(header, rows)


def _markdown(blocks: Sequence[_Block]) -> str:
    parts = [f"# {_TITLE}"]
    for block in blocks:
        match block:
            case _Heading(text):
                parts.append(f"## {text}")
            case _Text(text):
                parts.append(text)
            case _Code(text):
                fence = "`" * max(3, _longest_run(text, "`") + 1)
                parts.append(f"{fence}\n{text}\n{fence}")
            case _Rows(header, rows):
                lines = [header, ["---"] * len(header), *rows]
                parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
            case _Image(file, description):
                parts.append(f"![{description}]({file})")
    return "\n\n".join(parts) + "\n"


def _html(blocks: Sequence[_Block], folder: Path) -> str:
    parts = [f"<h1>{html.escape(_TITLE)}</h1>"]
    for block in blocks:
        match block:
            case _Heading(text):
                parts.append(f"<h2>{html.escape(text)}</h2>")
            case _Text(text):
                parts.append(f"<p>{html.escape(text)}</p>")
            case _Code(text):
                parts.append(f"<pre>{html.escape(text)}</pre>")
            case _Rows(header, rows):
                cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
                head = f"<thead><tr>{cells}</tr></thead>" if any(header) else ""
                body = "".join(
                    "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
                    for row in rows
                )
                parts.append(f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>')
            case _Image(file, description):
                content = base64.b64encode((folder / file).read_bytes()).decode()
                alt = html.escape(description, quote=True)
                parts.append(f'<img alt="{alt}" src="data:image/png;base64,{content}">')
    return _PAGE.format(title=html.escape(_TITLE), body="\n".join(parts))


def _longest_run(text: str, character: str) -> int:
    longest = current = 0
    for c in text:
        current = current + 1 if c == character else 0
        longest = max(longest, current)
    return longest


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.7rem; }} h2 {{ font-size: 1.25rem; margin-top: 2.2rem; }}
img {{ max-width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid #ddd; white-space:
nowrap; }} pre {{ background: #f5f5f5; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; line-height:
1.4; }} </style>
</head>
<body>
{body}
</body>
</html>
"""
