"""What README and pages show runs as it stands there; their commands, links and paths are right."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nl_kernels import __version__
from nl_models import HopeConfig, HopeForCausalLM, cli
from nl_models.data.tokenizer import ByteTokenizer
from nl_models.hope.baseline import parameter_count
from nl_models.hope.configuration_hope import PRESETS, RENAMED
from nl_models.surgery import convert_mlp_to_continuum

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
OP_PAGES = sorted((ROOT / "src/nl_kernels/ops").glob("*/README.md"))
PAGES = [
    README,
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *OP_PAGES,
    ROOT / "examples/minimal/README.md",
    ROOT / "CONTRIBUTING.md",
]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


EXAMPLES = blocks(TEXTS["README.md"]) + blocks(TEXTS["docs/ops.md"])


def test_there_is_an_example_of_each_op_and_of_the_model():
    text = "".join(EXAMPLES)
    for name in (
        "delta_memory",
        "deep_memory",
        "deep_memory_step",
        "self_modifying_memory",
        "self_modifying_memory_step",
        "continuum_memory",
        "HopeForCausalLM",
    ):
        assert name in text


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.splitlines()[1])
def test_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {})


class Letters:
    """A tokenizer: one token a letter."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids) -> str:
        return bytes(ids).decode(errors="replace")


def llama(*_, **__) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    )


def before_conversion(names: dict) -> None:
    names["ids"] = torch.arange(6)[None]


def after_conversion(names: dict) -> None:
    names["fast_weights"] = names["model"].initial_fast_weights(1)


def before_learning(names: dict) -> None:
    levels = [{"fraction": 0.25, "chunk_size": 4}, {"fraction": 0.25, "chunk_size": 8}]
    names["model"] = convert_mlp_to_continuum(llama(), levels)
    names["tokenizer"] = Letters()
    names["document_1"], names["document_2"] = "some text, read first", "and some that follows"


def nothing(names: dict) -> None:
    pass


def before_optimisers(names: dict) -> None:
    names["model"] = llama()


def before_measuring(names: dict) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    names["model"] = HopeForCausalLM(HopeConfig(vocab_size=256, **sizes))
    names["tokens"] = torch.arange(64 * 64) % 256


def before_conversation(names: dict) -> None:
    folder = Path("runs/demo/hope/model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    HopeForCausalLM(HopeConfig(vocab_size=257, **sizes)).save_pretrained(folder)
    ByteTokenizer().save(folder)


# What each page takes for granted before its blocks, one after another in one namespace.
ASSUMED = {
    "docs/continual_learning.md": [nothing, before_learning],
    "docs/conversation.md": [before_conversation],
    "docs/conversion.md": [before_conversion, after_conversion],
    "docs/layers.md": [],
    "docs/model.md": [],
    "docs/optimisers.md": [before_optimisers],
    "docs/sequence_parallelism.md": [],
    "docs/state.md": [],
    "docs/training.md": [before_measuring],
    "docs/training_at_scale.md": [],
}


def test_every_page_with_code_is_run():
    tested_elsewhere = {"README.md", "docs/ops.md", "docs/ecosystem.md"}  # the last in test_ecosystem.py
    assert {page for page, text in TEXTS.items() if blocks(text)} == {*tested_elsewhere, *ASSUMED}


@pytest.fixture
def default_device():
    """What a page sets for its process ends with it: under a default device no graph is compiled whole."""
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("page", ASSUMED)
@pytest.mark.usefixtures("default_device")
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page != "docs/conversation.md":  # whose model is a saved one
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", llama)
    # A world of one; tests/nl_models/parallel has larger ones.
    if page in ("docs/sequence_parallelism.md", "docs/training_at_scale.md"):
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}.items():
            monkeypatch.setenv(name, str(value))
    names = {}
    for index, code in enumerate(blocks(TEXTS[page])):
        for prepare in ASSUMED[page][index : index + 1]:
            prepare(names)
        exec(compile(code, page, "exec"), names)


def test_the_table_of_sizes():
    rows = re.findall(r"^\| `(\S+)` \| (\d.*) \|$", TEXTS["docs/model.md"], re.M)
    assert [name for name, _ in rows] == list(PRESETS)
    for name, row in rows:
        config = HopeConfig.preset(name)
        sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.vocab_size)
        assert [int(x.replace(",", "")) for x in row.split(" | ")] == [*sizes, parameter_count(config)], name


def test_the_changelog_begins_with_this_version_and_knows_the_old_names_of_fields():
    text = TEXTS["CHANGELOG.md"]
    assert re.search(r"^## (\S+)$", text, re.M).group(1) == __version__
    assert [name for pair in RENAMED.items() for name in pair if f"`{name}`" not in text] == []


def commands(text: str) -> list[str]:
    """``python -m …`` and ``nl …`` of fenced blocks, where lines may be continued, and of inline code."""
    fenced = "".join(re.findall(r"^```\n(.*?)^```", text, re.S | re.M)).replace("\\\n", " ")
    inline = re.findall(r"`((?:python -m|nl) [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    found = [line for line in fenced.splitlines() if line.startswith(("python -m ", "nl "))] + inline
    return [command for command in found if "OP" not in command and "…" not in command]


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if commands(text)])
def test_commands_are_understood(page, monkeypatch):
    """Their modules exist and take the options that are given; nothing is run."""
    monkeypatch.chdir(ROOT)
    for command in commands(TEXTS[page]):
        if command.startswith("nl "):
            name, *arguments = shlex.split(command, comments=True)[1:]
            known = typer.main.get_command(cli.app).commands[name]
            if arguments:  # without any it is only named
                known.make_context(name, arguments)
            continue
        module, *arguments = shlex.split(command, comments=True)[2:]
        if module == "nl_models" or not arguments:  # which may be named alone
            continue
        if module == "pytest":
            assert all(Path(argument).exists() for argument in arguments if argument.startswith("tests"))
            continue
        if module == "benchmarks.peers_env":  # hands its arguments on
            module = "benchmarks.run"
        if module == "evaluations":
            module = "evaluations.__main__"
        app = typer.Typer()
        app.command()(importlib.import_module(module).main)
        typer.main.get_command(app).make_context(command, [a for a in arguments if a != "--help"])


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_paths_lead_somewhere(page):
    text, folder = TEXTS[page], (ROOT / page).parent
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert not [link for link in links if not (folder / link).exists()]
    named = re.findall(r"`((?:src|tests|benchmarks|docs|examples|nl_kernels|nl_models)/[\w./-]+)`", text)
    paths = [path for path in named if "OP" not in path]
    assert not [path for path in paths if not ((ROOT / path).exists() or (ROOT / "src" / path).exists())]


def test_the_readme_is_short():
    assert README.read_text(encoding="utf-8").count("\n") <= 110
