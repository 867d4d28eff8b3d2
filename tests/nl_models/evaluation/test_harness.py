"""Tasks of lm-eval begin with what a model remembers (make lanes LANES=ecosystem has lm-eval)."""

import copy
import json
import sys

import pytest
import torch

from nl_models import HopeConfig, HopeForCausalLM
from nl_models.conversation import begin_conversation
from nl_models.data.tokenizer import ByteTokenizer
from nl_models.evaluation.harness import run_tasks, tasks_table
from nl_models.open_model import OpenedModel
from nl_models.replies import Sampling

ROWS = [
    {"question": "the quick brown", "choices": [" fox", " cat", " dog jumps"], "answer": 0},
    {"question": "one two", "choices": [" three", " 3"], "answer": 1},
] * 3
TOLD = "the quick brown fox jumps over the lazy dog. " * 3


@pytest.fixture
def conversation():
    """Of a Hope that was told something and taught it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = HopeForCausalLM(HopeConfig(vocab_size=257, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def begin():
        return begin_conversation(OpenedModel(copy.deepcopy(model), ByteTokenizer(), None), None)

    return begin


def told(conversation):
    conversation.learner.learn([torch.tensor(list(TOLD.encode()))])
    conversation.reply(TOLD, Sampling(5, temperature=0), lambda text: None)
    return conversation


def write_task(folder, name, kind, more):
    about = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": kind,
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
        **more,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(about))  # which is YAML, too


def test_at_the_end_of_a_conversation_the_model_goes_on_as_it_would_have(conversation):
    text = " and the fox"
    ids = torch.tensor([[*text.encode(), 256]])
    begun = told(conversation())
    nats = begun.loss(text)[0]
    with torch.no_grad():
        unread = begun.cache.layers[0].unread[0]
        first = begun._reader()(unread, cache=begun.cache.copy()).logits[0, -1].log_softmax(0)[ids[0, 0]]
        model, state = begun.end()
        assert state.get_seq_length() == begun.cache.get_seq_length() + unread.shape[1]
        logits = model(ids.expand(2, -1), cache=state.select([0, 0])).logits
    for row in logits:
        rest = torch.nn.functional.cross_entropy(row[:-1], ids[0, 1:], reduction="sum")
        assert float(rest - first) == pytest.approx(nats, rel=1e-4)


def test_without_lm_eval_its_absence_is_said(conversation, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"task: needs lm-eval .* pip install 'nl-kernels\[eval\]'"):
        run_tasks(conversation(), ["lambada_openai"])


def chosen(model, state, row):
    """The likeliest of the choices, by the model's own losses behind the question."""
    question, losses = row["question"].encode(), []
    for choice in row["choices"]:
        ids = torch.tensor([*question, *choice.encode()])
        with torch.no_grad():
            logits = model(ids[None], cache=state.copy()).logits[0]
        found = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        losses.append(float(found[len(question) - 1 :].sum()))
    return losses.index(min(losses))


def test_every_request_begins_with_the_memory(conversation, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs lm_eval: make lanes LANES=ecosystem")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    written = told(conversation()).reply("the quick brown", Sampling(6, temperature=0), lambda text: None)
    choices = {"doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    rows = [{**row, "written": written} for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_task(tmp_path, "choose", "multiple_choice", {**choices, "metric_list": [{"metric": "acc"}]})
    options = {
        "doc_to_target": "{{written}}",
        "generation_kwargs": {"until": ["\0"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    }
    write_task(tmp_path, "write", "generate_until", options)
    begin = (conversation, lambda: told(conversation()))
    found = [run_tasks(each(), ["choose", "write"], folder=tmp_path, batch_size=4) for each in begin]
    for scores, each in zip(found, begin, strict=True):
        right = [chosen(*each().end(), row) == row["answer"] for row in ROWS[:2]]
        assert {s.task: s.value for s in scores}["choose"] == pytest.approx(sum(right) / 2)
    assert {s.task: s.value for s in found[1]}["write"] == 0.5  # one of the two questions
    assert {s.task: s.value for s in found[0]}["write"] == 0
    assert tasks_table(*found).row_count == 2
    with pytest.raises(ValueError, match="lm-eval knows no such_a_task"):
        run_tasks(conversation(), ["such_a_task"])
