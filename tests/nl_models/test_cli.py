"""The commands of ``nl``, as a user calls them, on models of seconds."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from nl_models import HopeCache, HopeConfig, HopeForCausalLM
from nl_models.cli import app
from nl_models.continual import ContinuumLearner, StepRule
from nl_models.conversation import begin_conversation
from nl_models.data.tokenizer import ByteTokenizer
from nl_models.files import only_writer
from nl_models.layers.state_cache import StateCacheLayer
from nl_models.open_model import open_model
from nl_models.replies import Sampling, until
from nl_models.training.checkpoint import list_checkpoints
from tests.nl_models.full_disk import small_files

ROOT = Path(__file__).parents[2]


def call(*arguments, text=None, code=0):
    result = CliRunner().invoke(app, [str(x) for x in arguments], input=text)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(10):
        (folder / f"{i}.txt").write_text(f"file {i}: " + "the quick brown fox jumps. " * (i + 20))
    (folder / ".bytes").write_bytes(b"text\0text")
    (folder / ".empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A finished training run."""
    folder = tmp_path_factory.mktemp("run") / "hope"
    call(
        "train", "--output", folder, "--corpus", corpus, "--tokenizer", "bytes", "--hidden-size", 16,
        "--layers", 1, "--heads", 2, "--batch-size", 2, "--sequence-length", 16, "--steps", 4,
        "--warmup-steps", 1, "--evaluate-every", 2, "--checkpoint-every", 2, "--position-length", 0,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def hope(tmp_path_factory):
    """A Hope whose memories matter: random weights of some size."""
    torch.manual_seed(0)
    config = HopeConfig(vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = HopeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("hope")
    model.save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama with a tokenizer of transformers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(_byte_characters(), []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
    return folder


def _byte_characters():
    return {
        character: i for i, character in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    }


def figures(said):
    """The losses in the table of ``nl learn``: of the documents, and of other text."""
    rows = re.findall(r"^ *(the documents|held-out|prose of).*?((?: +(?:\d+\.\d+|–))+)", said, re.M)
    assert [name != "the documents" for name, _ in rows] == [False, True], said
    return [[float(x) for x in numbers.split() if x != "–"] for _, numbers in rows]


OTHER_TEXT = "other text", "of a few words, which takes no time to read"
GREEDY = ("--temperature", 0, "-n", 12)


def test_help_names_every_command():
    said = call("--help")
    for name in ("demo", "train", "evaluate", "profile", "generate", "chat", "learn", "convert", "doctor"):
        assert name in said


def test_a_chat_knows_in_the_next_process_what_it_was_told(hope, tmp_path):
    turns = ["my name is Ada", "what is it?", "and again"]
    together = call("chat", hope, "--stop", "", *GREEDY, text="\n".join(turns))
    memory, apart = tmp_path / "memory.safetensors", ""
    for turn in turns:
        apart += call("chat", hope, "--stop", "", *GREEDY, "--memory", memory, text=turn)
    assert apart == together
    alone = "".join(call("chat", hope, "--stop", "", *GREEDY, text=turn) for turn in turns)
    assert alone != together


def test_one_cpu_thread_unless_more_are_asked_for(hope):
    before = torch.get_num_threads()
    try:
        for options, expected in (((), 1), (("--threads", 2), 2), ((), 1)):
            call("generate", hope, "the", *GREEDY, *options)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
    assert "--threads" in call("chat", hope, "--threads", 0, code=2)


def test_what_was_learned_is_of_one_size_and_is_read_from(hope, corpus, tmp_path):
    memory = tmp_path / "memory.safetensors"
    said = call("learn", hope, corpus / "0.txt", "--memory", memory)
    (before, _, after), other = figures(said)
    assert after < before - 0.1
    assert all(0 < x < 50 for x in other)
    first = memory.read_bytes()
    plain, with_memory = (
        call("generate", hope, "the quick", *GREEDY, *options) for options in ((), ("--memory", memory))
    )
    assert plain.startswith("the quick")
    assert plain != with_memory
    assert memory.read_bytes() == first  # to write with it changes nothing
    call("learn", hope, corpus, "--memory", memory)
    # It does not grow with the tokens; what waits for a level's chunk to be full differs.
    assert memory.stat().st_size < 1.3 * len(first)


def test_what_a_hope_was_taught_is_there_in_a_chat_and_in_the_next(hope, corpus, tmp_path):
    """Losses of a text that was learned and of what follows, in processes that have nothing but the file."""
    memory = tmp_path / "memory.safetensors"
    call("learn", hope, corpus / "0.txt", "--memory", memory)

    def loss():
        return begin_conversation(open_model(hope), memory).loss((corpus / "1.txt").read_text())[0]

    plain = begin_conversation(open_model(hope), None).loss((corpus / "1.txt").read_text())[0]
    learned = loss()
    assert learned < 0.95 * plain
    assert call("chat", hope, *GREEDY, "--memory", memory, text="the quick brown")
    assert abs(loss() - learned) < 0.2 * (plain - learned)
    ours = ContinuumLearner(open_model(hope).model, StepRule(rule="muon", rate=0.1, momentum_decay=0.0))
    ours.load(memory)  # the file is a learner's, too
    assert ours.tokens_per_level[0] > 0


def test_what_was_learned_before_ctrl_c_is_kept(hope, corpus, tmp_path, monkeypatch):
    memory, learn = tmp_path / "memory.safetensors", ContinuumLearner.learn

    def stopped(learner, stream, **options):
        learn(learner, stream[:1], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(ContinuumLearner, "learn", stopped)
    said = call("learn", hope, corpus / "0.txt", corpus / "1.txt", "--memory", memory, code=2)
    assert f"stopped; {memory} has what was learned so far" in said
    text = (corpus / "1.txt").read_text()
    losses = [begin_conversation(open_model(hope), path).loss(text)[0] for path in (None, memory)]
    assert losses[1] < 0.95 * losses[0]


def test_ctrl_c_while_documents_are_read_again_leaves_whole_ones(hope, corpus, tmp_path, monkeypatch):
    memory, learn, commit = tmp_path / "memory.safetensors", ContinuumLearner.learn, StateCacheLayer.commit
    calls = []

    def learned(learner, stream, **options):
        report = learn(learner, stream, **options)
        calls.append(0)
        return report

    def stopped(layer, *arguments):
        if calls:
            calls.append(arguments[1])
            if len(calls) == 7:  # one layer has read the beginning of the second text, the other not
                raise KeyboardInterrupt
        commit(layer, *arguments)

    monkeypatch.setattr(ContinuumLearner, "learn", learned)
    monkeypatch.setattr("nl_models.cli.other_text", lambda opened: OTHER_TEXT)
    monkeypatch.setattr(StateCacheLayer, "commit", stopped)
    files = [corpus / "0.txt", corpus / "1.txt"]
    call("learn", hope, *files, "--memory", memory, code=2)
    monkeypatch.undo()
    cache = begin_conversation(open_model(hope), memory).cache
    assert [layer.seen for layer in cache.layers] == [files[0].stat().st_size + 1] * 2
    assert cache.layers[0].unread is not None


def test_a_text_that_is_too_short_to_learn_from_is_read(hope, corpus, tmp_path, monkeypatch):
    """Into a state, too: what waits for a chunk to be full is in it."""
    monkeypatch.setattr("nl_models.cli.other_text", lambda opened: OTHER_TEXT)
    memory, short, empty = (tmp_path / name for name in ("m.safetensors", "short.txt", "empty.txt"))
    short.write_text("a")
    empty.write_text("")
    assert "all of them are empty" in call("learn", hope, empty, "--memory", memory, code=2)
    assert not memory.exists()
    call("chat", hope, *GREEDY, "--memory", memory, text="hello")
    assert "too short a text for a single step" in call("learn", hope, short, empty, "--memory", memory)
    assert "nothing was learned" not in call("learn", hope, corpus / "0.txt", "--memory", memory)
    told = call("learn", hope, short, "--memory", tmp_path / "other.safetensors", "--rate", 0)
    assert "nothing was learned: at a rate of 0; it was only read" in told
    plain, taught = (begin_conversation(open_model(hope), path) for path in (None, memory))
    assert taught.loss("the quick brown")[0] < plain.loss("the quick brown")[0]
    said = call("evaluate", hope, short, empty)
    assert "short.txt" in said
    assert "empty.txt" not in said
    assert "none has a token that is predicted" in call("evaluate", hope, empty, code=2)


def test_a_memory_that_was_made_with_other_weights_needs_consent(hope, corpus, tmp_path):
    """Of what was read, and of what was learned; the state of another model is not gone on with then."""
    other = tmp_path / "other"
    shutil.copytree(hope, other)
    weights = load_file(other / "model.safetensors")
    weights["model.embed_tokens.weight"][3] *= 1.01
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    read, learned = tmp_path / "read", tmp_path / "learned"
    call("chat", hope, *GREEDY, "--memory", read, text="hello")
    call("learn", hope, corpus / "0.txt", "--memory", learned)
    for memory, message in ((read, "a model with other weights"), (learned, "other values of its weights")):
        before = memory.read_bytes()
        for command, text in (("chat", "hi"), ("generate", None), ("evaluate", None), ("learn", None)):
            what = {"chat": (), "generate": ("hi",)}.get(command, (corpus / "1.txt",))
            said = call(command, other, *what, "--memory", memory, text=text, code=2)
            assert message in " ".join(said.split())
            assert "--allow-other-model" in said
            assert memory.read_bytes() == before
        assert call("generate", other, "hi", *GREEDY, "--memory", memory, "--allow-other-model")
    cache = begin_conversation(open_model(other), learned, allow_other_model=True).cache
    assert cache.get_seq_length() == 0
    text = (corpus / "1.txt").read_text()
    losses = [
        begin_conversation(open_model(other), path, allow_other_model=True).loss(text)[0]
        for path in (None, learned)
    ]
    assert losses[1] < 0.95 * losses[0]


def test_one_process_at_a_time_keeps_a_memory_up_to_date(hope, corpus, tmp_path):
    memory = tmp_path / "memory.safetensors"
    call("chat", hope, *GREEDY, "--memory", memory, text="hello")
    before = memory.read_bytes()
    with only_writer(memory):
        for arguments in (("chat", hope), ("learn", hope, corpus / "0.txt")):
            said = call(*arguments, "--memory", memory, text="hello", code=2)
            assert "is kept up to date by another process" in " ".join(said.split())
        assert call("generate", hope, "x", *GREEDY, "--memory", memory)  # which only reads it
    assert memory.read_bytes() == before
    call("chat", hope, *GREEDY, "--memory", memory, text="hello")
    assert memory.read_bytes() != before


def test_a_memory_for_which_the_disk_has_no_room_loses_nothing(hope, tmp_path, monkeypatch):
    memory, text = tmp_path / "memory.safetensors", tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps. " * 4)
    call("learn", hope, text, "--memory", memory)
    before = memory.read_bytes()
    with small_files(1 << 12):
        said = call("learn", hope, text, "--memory", memory, code=2)
    assert "File too large; choose a place on a disk that takes larger files" in " ".join(said.split())
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    said = call("learn", hope, text, "--memory", memory, code=2)
    assert "memory: the disk has no room for it" in said
    assert "as read" not in said  # before anything is learned
    assert memory.read_bytes() == before
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    said = call("chat", hope, "--memory", memory, text="hello", code=2)
    assert "Permission denied; choose a place that you may write to" in " ".join(said.split())


def test_a_smaller_file_is_said_and_stays_small(hope, llama, corpus, tmp_path):
    converted = tmp_path / "converted"
    call("convert", llama, converted, "--level", "0.5:8")
    for model in (hope, converted):
        sizes, losses = [], []
        for options in ((), ("--dtype", "bf16"), ("--rank", 4), ("--rank", 4, "--dtype", "bf16")):
            memory = tmp_path / f"{model.name}{len(sizes)}.safetensors"
            said = call("learn", model, corpus / "0.txt", "--memory", memory, *options)
            sizes.append(memory.stat().st_size)
            about = float(re.search(r"will take about ([\d.]+) MiB", said).group(1)) * 2**20
            assert about - 10_000 < sizes[-1] < about + 300_000
            losses.append(begin_conversation(open_model(model), memory).loss("the quick brown fox")[0])
        call("learn", model, corpus / "0.txt", "--memory", memory)
        assert memory.stat().st_size == pytest.approx(sizes[-1], rel=0.2)
        assert sorted(sizes, reverse=True) == sizes
        assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    said = call("learn", hope, corpus / "0.txt", "--memory", tmp_path / "m", "--dtype", "int8", code=2)
    assert "dtype: expected one of fp32, bf16, fp16, got 'int8'" in said


def test_documents_are_evaluated_with_a_memory_and_without(hope, llama, run, corpus, tmp_path):
    memory, files = tmp_path / "memory.safetensors", [corpus / f"{i}.txt" for i in (1, 2)]
    call("learn", hope, corpus / "0.txt", "--memory", memory)
    for model in (hope, llama, run):
        said = call("evaluate", model, *files)
        assert "perplexity" in said
        assert len(re.findall(r"\d\.\d{3} +\d\.\d{3}", said)) == 3  # and all of them
    rows = re.findall(
        r"([\d.]+) +([\d.]+) +(-[\d.]+) *$", call("evaluate", hope, *files, "--memory", memory), re.M
    )
    assert len(rows) == 3
    for plain, remembering, difference in rows:
        assert float(remembering) - float(plain) == pytest.approx(float(difference), abs=2e-3)
    assert "documents: give some" in call("evaluate", hope, "--memory", memory, code=2)
    assert "no such file or folder: x" in call("evaluate", hope, "x", code=2)


def test_a_study_is_handed_over_to_a_checkout_and_refused_without_one(tmp_path, monkeypatch):
    ran = []

    def run(command, cwd):
        ran.append((command[1:], cwd))
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr("nl_models.position.subprocess.run", run)
    call("evaluate", "--study", "mad", "--quick", code=7)
    assert ran == [(["-m", "evaluations", "mad", "--quick"], ROOT)]
    assert "leave MODEL out" in call("evaluate", tmp_path, "--study", "mad", code=2)
    monkeypatch.setattr("nl_models.position._CHECKOUT", tmp_path)
    said = " ".join(call("evaluate", "--study", "mad", code=2).replace("│", " ").split())
    assert "in a checkout of the project, not in its wheel; clone it" in said
    assert "give a model, or a --study" in call("evaluate", code=2)
    assert len(ran) == 1


def test_learning_reads_as_the_model_does(hope, corpus, tmp_path):
    """Cut into pieces and documents, the state is that of one forward pass, and the loss its loss."""
    memory, tokenizer = tmp_path / "memory.safetensors", ByteTokenizer()
    said = call("learn", hope, corpus / "1.txt", corpus / "2.txt", "--memory", memory, "--rate", 0)
    model, _, _ = open_model(hope)
    ids = [tokenizer.separator_id]
    for name in ("1.txt", "2.txt"):
        ids += [*tokenizer.encode((corpus / name).read_text()), tokenizer.separator_id]
    ids = torch.tensor([ids])
    with torch.no_grad():
        out = model(ids[:, :-1], cache=HopeCache(model.config), labels=None)
        loss = torch.nn.functional.cross_entropy(out.logits[0], ids[0, 1:])
    assert figures(said)[0][0] == pytest.approx(float(loss), abs=1e-3)
    cache = HopeCache.load(memory, model.config)
    assert cache.get_seq_length() == ids.shape[1] - 1
    with torch.no_grad():
        following = [model(torch.tensor([[7, 8]]), cache=c).logits for c in (cache, out.cache)]
    torch.testing.assert_close(*following, rtol=1e-3, atol=1e-3)


def test_runs_and_checkpoints_are_opened(run):
    final = open_model(run)
    assert final.source == run / "model"
    newest = open_model(list_checkpoints(run / "checkpoints")[-1])
    for a, b in zip(final.model.parameters(), newest.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert newest.tokenizer.decode(newest.tokenizer.encode("ab")) == "ab"
    for folder in (run / "model", *list_checkpoints(run / "checkpoints")):  # by any tool of transformers
        found = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.eos_token_id == tokenizer.pad_token_id == found.generation_config.eos_token_id == 256
    for a, b in zip(final.model.parameters(), found.parameters(), strict=True):
        assert torch.equal(a, b)
    (run / "model").rename(run / "elsewhere")
    try:
        assert open_model(run).source.parent == run / "checkpoints"
    finally:
        (run / "elsewhere").rename(run / "model")


def test_a_checkpoint_and_what_was_learned_become_a_folder_of_transformers(run, hope, corpus, tmp_path):
    checkpoint = list_checkpoints(run / "checkpoints")[-1]
    call("export", checkpoint, tmp_path / "plain")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", trust_remote_code=True)
    for a, b in zip(found.parameters(), open_model(checkpoint).model.parameters(), strict=True):
        assert torch.equal(a, b)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == found.generation_config.eos_token_id == 256
    memory, text = tmp_path / "memory.safetensors", (corpus / "1.txt").read_text()
    call("learn", hope, corpus / "0.txt", "--memory", memory)
    call("export", hope, tmp_path / "taught", "--memory", memory)
    models = (open_model(folder) for folder in (hope, tmp_path / "taught"))
    plain, taught = (begin_conversation(model, None).loss(text)[0] for model in models)
    assert taught < 0.95 * plain
    assert "exists; choose another folder" in call("export", hope, tmp_path / "taught", code=2)


def test_a_converted_model_learns_what_it_is_told(llama, tmp_path):
    converted, memory = tmp_path / "converted", tmp_path / "memory.safetensors"
    call("convert", llama, converted, "--level", "0.25:8", "--level", "0.5:32")
    levels = json.loads((converted / "config.json").read_text())["continuum_levels"]
    assert [level["chunk_size"] for level in levels] == [8, 32]
    document = tmp_path / "document.txt"
    document.write_text("abcabcabc " * 40)
    options = ("--memory", memory, "--rate", 0.3, "--rate", 0.1)
    said = call("learn", converted, document, *options)
    (before, read, after), _ = figures(said)
    model, tokenizer, _ = open_model(llama)
    ids = torch.tensor([tokenizer.encode(document.read_text())])[:, :200]
    with torch.no_grad():
        frozen = float(model(ids, labels=ids).loss)
    assert after < read - 0.05 < frozen - 0.3
    assert before == pytest.approx(frozen, abs=0.1)
    size = memory.stat().st_size
    first = call("chat", converted, *options, *GREEDY, text="abc")
    again = call("chat", converted, *options, *GREEDY, text="abc")  # from the file
    assert first != call("chat", converted, *GREEDY, text="abc")
    assert again
    assert memory.stat().st_size == pytest.approx(size, abs=50_000)
    assert call("generate", converted, "abc", "--memory", memory, *GREEDY).startswith("abc")


def test_a_chat_says_what_its_memory_is_worth(hope, corpus, tmp_path):
    """Of each line, as the losses of a conversation with the file and without have it."""
    memory, line = tmp_path / "memory.safetensors", "the quick brown fox"
    call("learn", hope, corpus / "0.txt", "--memory", memory)
    opened = open_model(hope)
    losses = [begin_conversation(opened, path).loss(f"{line}\n") for path in (memory, None)]
    remembering, fresh = (nats / count for nats, count in losses)
    assert remembering < fresh - 0.1
    arguments = ["chat", str(hope), *map(str, GREEDY)]
    result = CliRunner().invoke(app, [*arguments, "--memory", str(memory)], input=line)
    said = f"your line: {remembering:.2f} nats a token with the memory, {fresh:.2f} without"
    assert result.stderr.split() == said.split()
    assert not CliRunner().invoke(app, arguments, input=line).stderr


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _talker(source, folder):
    """A model whose tokenizer has a chat template, and ends a reply with a token of its own."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(_byte_characters(), []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", chat_template=CHAT)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("kind", ["plain", "converted", "hope"])
def test_a_chat_template_has_the_words(kind, llama, hope, tmp_path, monkeypatch):
    """What is read of two turns is what the template makes of the whole, with the model's reply in it."""
    folder, read = tmp_path / "talker", []
    tokenizer = _talker(hope if kind == "hope" else llama, folder)
    if kind == "converted":
        call("convert", folder, tmp_path / "converted", "--level", "0.5:8")
        folder = tmp_path / "converted"
    end = tokenizer.eos_token_id

    def reply(model, ids, *arguments, **options):
        read.append(list(ids))
        if kind == "hope":  # as if it had written "so", and the end
            cache = options["cache"]
            with torch.no_grad():
                model(torch.tensor([ids]), cache=cache)
            written = torch.tensor([[*tokenizer.encode("so"), end]])
            with torch.no_grad():
                model(written[:, :-1], cache=cache)
            cache.layers[0].unread = (written[:, -1:], torch.ones_like(written[:, -1:]))
        return "so"

    monkeypatch.setattr("nl_models.conversation.written_after", reply)
    conversation = begin_conversation(open_model(folder), None)
    for message in ("who?", "why?"):
        conversation.reply(message, Sampling(), lambda text: None, message=True)
    turns = [("user", "who?"), ("assistant", "so"), ("user", "why?")]
    whole = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], add_generation_prompt=True
    )["input_ids"]
    if kind == "hope":  # reads what is new, behind what it has written
        assert read[0][0] == end  # which a text begins with
        assert [*read[0][1:], *tokenizer.encode("so"), end, *read[1]] == whole
    else:
        assert read[1] == whole


def test_a_reply_by_a_chat_template_has_no_special_tokens_and_several_lines(llama, tmp_path, monkeypatch):
    tokenizer = _talker(llama, tmp_path / "talker")
    written = [*tokenizer.encode("one\ntwo"), tokenizer.eos_token_id]

    def generate(model, ids, stopping_criteria, **options):
        for i in range(len(written)):
            out = torch.cat([ids, torch.tensor([written[: i + 1]])], dim=1)
            assert not bool(stopping_criteria(out, None).any())
        return out

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    assert call("chat", tmp_path / "talker", text="go") == "one\ntwo\n"


def test_a_plain_transformer_talks_without_a_memory(llama, tmp_path):
    assert call("chat", llama, *GREEDY, text="abc")
    said = call("chat", llama, "--memory", tmp_path / "m.safetensors", text="abc", code=2)
    assert "has no memory to keep in a file; convert it first" in said


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("\n\n", "\n\n"),
        ("\n\n\n", ""),
        ("\n  so\nno", "\n  so"),
        ("so\n", "so"),
        (" so", " so"),
    ],
)
def test_a_reply_may_begin_with_white_space_but_is_no_page_of_it(text, reply):
    assert until(text, "\n") == reply
    assert until(text, None) == text


def test_a_reply_ends_where_it_is_told_to(hope):
    whole = call("chat", hope, "--stop", "", *GREEDY, text="hello")
    stop = whole[4]
    assert call("chat", hope, "--stop", stop, *GREEDY, text="hello") == whole[: whole.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "nowhere", "x"), "model: no folder nowhere"),
        (("generate", "{corpus}", "x"), "is no training run, no checkpoint and no saved model"),
        (("generate", "{hope}", "x", "--memory", "no.file"), "memory: no such file: no.file"),
        (("generate", "{hope}", "x", "-n", 0), "max_new_tokens: expected at least 1, got 0"),
        (("generate", "{hope}", "x", "--temperature", -1), "temperature: expected at least 0"),
        (("generate", "{hope}", "x", "--seed", 2**70), "seed: expected an integer of 64 bits"),
        (("evaluate", "{hope}"), "is a model and no training run; give documents"),
        (("evaluate", "{hope}", "{corpus}", "--threads", 0), "Invalid value for '--threads'"),
        (("learn", "{hope}", "no.txt", "--memory", "m"), "documents: no such file or folder: no.txt"),
        (("learn", "{hope}", "{hope}/model.safetensors", "--memory", "m"), "safetensors is not UTF-8 text"),
        (("learn", "{hope}", "{corpus}/.bytes", "--memory", "m"), "documents: {corpus}/.bytes is no text"),
        (("learn", "{hope}", "{corpus}/.empty", "--memory", "m"), "documents: no UTF-8 text file in"),
        (("learn", "{hope}", "{corpus}", "--memory", "no/m"), "memory: no/m has no folder to lie in"),
        (("learn", "{hope}", "{corpus}", "--memory", "m", "--rate", 1, "--rate", 1), "for each of 1 levels"),
        (("learn", "{hope}", "{corpus}", "--memory", "{corpus}/0.txt"), "memory: {corpus}/0.txt is trunc"),
        (("chat", "{hope}", "--memory", "{corpus}/0.txt"), "; name another file for a new memory"),
        (("learn", "{hope}", "{corpus}", "--memory", "{corpus}"), "is no file; name one"),
        (("chat", "{hope}", "--memory", "/dev/null"), "is no file; name one"),
        (("convert", "{hope}", "new"), "model: expected one of"),
        (("convert", "{llama}", "{corpus}"), "exists; choose another folder"),
        (("convert", "{llama}", "new", "--level", "x"), "level: expected FRACTION:CHUNK"),
    ],
)
def test_bad_input_is_one_line(arguments, message, hope, llama, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"hope": hope, "llama": llama, "corpus": corpus}
    said = call(*(str(x).format(**places) for x in arguments), code=2)
    assert message.format(**places) in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())
