"""What a learner takes for text, what it refuses before it learns anything, and what it passes over."""

import collections
import io
import pathlib

import pytest
import torch
from transformers import BatchEncoding

from nl_models.continual import ContinuumLearner, StepRule, next_token_loss_through_steps
from nl_models.surgery import convert_mlp_to_continuum
from tests.nl_models.surgery.models import LEVELS, VOCABULARY, make_model

RATE = StepRule(rate=0.05)


class Letters:
    """A token for every letter."""

    def encode(self, text):
        return [ord(letter) % VOCABULARY for letter in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids)


def make_learner(**options):
    return ContinuumLearner(convert_mlp_to_continuum(make_model("llama"), LEVELS), RATE, **options)


def tokens(length, seed=3):
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


NO_TEXT = {
    "a tokenizer's output": (
        BatchEncoding({"input_ids": tokens(5)[None]}),
        r"keys \['input_ids'\]; .*\"input_ids\"",
    ),
    "a dictionary": ({"text": "abc"}, r"got a dict with the keys \['text'\]"),
    "bytes": (b"abc", "got bytes; decode it first"),
    "a bytearray": (bytearray(b"abc"), "got bytearray; decode it first"),
    "a memory view": (memoryview(b"abc"), "got memoryview; decode it first"),
    "a file": (io.StringIO("abc\ndef\n"), "got StringIO; read it first"),
    "a binary file": (io.BytesIO(b"abc"), "got BytesIO; read it first"),
    "a path": (pathlib.Path("text.txt"), "got PosixPath; read it first"),
    "a set": ({"abc", "def"}, "got set; documents are read in order: pass a list"),
    "nothing": (None, "got NoneType; pass text, or tokens as torch.tensor"),
    "a number": (7, r"got int; pass text, or tokens as torch.tensor\(\[...\]\)"),
    "a real number": (1.5, "got float; pass text"),
    "an array": (tokens(5).numpy(), "got ndarray; pass torch.from_numpy"),
    "real numbers": (torch.ones(5), "got a tensor of torch.float32"),
    "truth values": (torch.ones(5, dtype=torch.bool), "got a tensor of torch.bool"),
}
NO_TEXT["a named tuple"] = (
    collections.namedtuple("Batch", "ids mask")(tokens(5), tokens(5)),
    "fields .*: ids, mask",
)
NO_DOCUMENT = {**NO_TEXT, "a list of tokens": ([1, 2, 3], "got list; pass text, or tokens as torch.tensor")}


@pytest.mark.parametrize("kind", NO_TEXT)
def test_what_is_no_stream_is_refused(kind):
    value, message = NO_TEXT[kind]
    learner = make_learner(tokenizer=Letters())
    with pytest.raises(TypeError, match=f"stream: expected text, a tensor of integer tokens.*{message}"):
        learner.learn(value)
    assert learner.tokens_read == 0
    for name in ("predict", "loss", "generate"):
        with pytest.raises(TypeError, match=f"text: expected text, a tensor of integer tokens.*{message}"):
            getattr(learner, name)(value)


@pytest.mark.parametrize("kind", NO_DOCUMENT)
def test_a_list_with_what_is_no_document_is_refused_before_anything_is_learned(kind):
    value, message = NO_DOCUMENT[kind]
    learner = make_learner(tokenizer=Letters())
    with pytest.raises(TypeError, match=rf"stream\[1\]: expected text, a tensor.*{message}"):
        learner.learn(["a document of some length", value])
    assert learner.tokens_read == 0
    with pytest.raises(TypeError, match=rf"stream\[0\]: expected text, a tensor.*{message}"):
        learner.learn(iter([value]))
    assert learner.tokens_read == 0


ODD = {
    "of no dimension": torch.tensor(3),
    "sparse": tokens(5)[None].to_sparse(),
    "nested": torch.nested.nested_tensor([tokens(5), tokens(3)]),
    "jagged": torch.nested.nested_tensor([tokens(5), tokens(3)], layout=torch.jagged),
    "without values": tokens(5).to("meta"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_are_refused(kind):
    learner = make_learner()
    for name, value in (("stream", ODD[kind]), (r"stream\[1\]", [tokens(9), ODD[kind]])):
        with pytest.raises(ValueError, match=f"{name}: expected (tokens|a dense tensor)"):
            learner.learn(value)
    with pytest.raises(ValueError, match=r"text: expected (tokens|a dense tensor)"):
        learner.predict(ODD[kind])
    assert learner.tokens_read == 0


def test_lists_of_numbers_are_refused():
    learner = make_learner()
    with pytest.raises(TypeError, match=r"stream\[0\]: .* got int; pass text, or tokens as torch.tensor"):
        learner.learn([1, 2, 3])
    with pytest.raises(ValueError, match=r"stream\[1\]: expected tokens from 0 to 60, got 61"):
        learner.learn([tokens(9), torch.tensor([61])])
    with pytest.raises(ValueError, match=r"stream\[1\]: expected tokens \[T\] or \[rows, T\]"):
        learner.learn([tokens(9), tokens(8).view(2, 2, 2)])
    assert learner.tokens_read == 0


@pytest.mark.parametrize("as_iterator", [False, True])
def test_documents_without_a_token_are_passed_over_and_counted(as_iterator):
    first, second = tokens(17), tokens(14, seed=4)
    plain, learner = make_learner(tokenizer=Letters()), make_learner(tokenizer=Letters())
    expected = plain.learn([first, second])
    documents = ["", first, torch.empty(0, dtype=torch.int64), second, second[:0][None]]
    report = learner.learn(iter(documents) if as_iterator else documents)
    assert (report.empty_documents, expected.empty_documents) == (3, 0)
    assert torch.equal(report.loss, expected.loss)
    assert report.steps == expected.steps
    assert learner.state.documents == plain.state.documents
    for name, change in plain.state.changes.items():
        assert torch.equal(learner.state.changes[name], change)
    # The same, cut by ``skip`` inside of a document.
    again = make_learner()
    again.learn([first[:9]])
    report = again.learn([first[:0], first, second[:0], second], skip=9)
    assert report.empty_documents == 2
    for name, change in plain.state.changes.items():
        torch.testing.assert_close(again.state.changes[name], change)


def test_only_documents_may_be_empty():
    learner = make_learner(tokenizer=Letters())
    for empty in ("", tokens(0)):
        for name in ("learn", "predict", "loss", "generate"):
            with pytest.raises(ValueError, match=r"expected tokens \[T\] or \[rows, T\]"):
                getattr(learner, name)(empty)
    report = learner.learn([])
    assert report.loss.isnan().all()
    assert learner.learn([""]).empty_documents == 1


@pytest.mark.parametrize("skip", [-1, 1.5, True, None])
def test_skip_is_a_number_of_tokens(skip):
    learner = make_learner()
    with pytest.raises(ValueError, match="skip: expected a number of tokens, at least 0, got"):
        learner.learn(tokens(9), skip=skip)
    assert learner.tokens_read == 0


def test_tokenizers_that_give_no_lists_of_integers_are_refused():
    class Encoding:
        ids = (1, 2)

    class Other(Letters):
        def encode(self, text):
            return Encoding()

    with pytest.raises(TypeError, match=r"tokenizer: expected encode.* list of integers, got Encoding"):
        make_learner(tokenizer=Other()).learn("abc")
    with pytest.raises(TypeError, match="tokenizer: expected an object with encode and decode, got function"):
        make_learner(tokenizer=lambda text: [1])


def test_the_loss_through_steps_takes_tensors():
    model = convert_mlp_to_continuum(make_model("llama"), LEVELS)
    with pytest.raises(TypeError, match=r"input_ids: expected a tensor of tokens .* got BatchEncoding"):
        next_token_loss_through_steps(model, BatchEncoding({"input_ids": tokens(9)[None]}), RATE)
    with torch.inference_mode(), pytest.raises(ValueError, match="call it outside of it"):
        next_token_loss_through_steps(model, tokens(9)[None], RATE)


@pytest.mark.parametrize("rule", ["sgd", "dgd", "momentum", "muon"])
def test_learning_inside_of_inference_mode(rule, tmp_path):
    model = convert_mlp_to_continuum(make_model("llama"), LEVELS)
    rule = StepRule(rule=rule, rate=0.05)
    plain, late = ContinuumLearner(model, rule), ContinuumLearner(model, rule)
    losses = [plain.learn(tokens(21)).loss, plain.learn(tokens(9, seed=4)).loss]
    with torch.inference_mode():
        learner = ContinuumLearner(model, rule)
        assert torch.equal(learner.learn(tokens(21)).loss, losses[0])
        learner.loss(tokens(9))
        learner.save(tmp_path / "memory.safetensors")
        late.load(tmp_path / "memory.safetensors")
        fork, copied = learner.fork(), ContinuumLearner(model, rule)
        copied.load_state_dict(learner.state_dict())
        assert torch.equal(learner.learn(tokens(9, seed=4)).loss, losses[1])
    for other in (late, fork, copied):  # what was made inside goes on outside
        assert torch.equal(other.learn(tokens(9, seed=4)).loss, losses[1])
        for name, change in plain.state.changes.items():
            assert torch.equal(other.state.changes[name], change)


def test_a_model_made_inside_of_inference_mode_is_refused():
    with torch.inference_mode():
        model = convert_mlp_to_continuum(make_model("llama"), LEVELS)
    with pytest.raises(ValueError, match=r"model: .*weight was made inside of torch.inference_mode\(\)"):
        ContinuumLearner(model, RATE)
