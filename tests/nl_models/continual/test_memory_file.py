"""A memory comes back from disk as it was; what is no such memory is refused, and changes nothing."""

import json
import os
import random
import signal
import time

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from nl_models.continual import ContinuumLearner, MemoryFileError, StepRule, memory_file
from nl_models.surgery import convert_mlp_to_continuum
from tests.nl_models.surgery.models import CONFIGS, LEVELS, VOCABULARY, make_model

RULE = StepRule(rule="momentum", rate=0.02)


def stream(length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(4))


def make_learner(family: str = "llama", **options) -> ContinuumLearner:
    options = {"rules": RULE, **options}
    return ContinuumLearner(convert_mlp_to_continuum(make_model(family), LEVELS), **options)


def assert_same_state(one: ContinuumLearner, other: ContinuumLearner) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours["header"] == theirs["header"]
    assert ours["tensors"].keys() == theirs["tensors"].keys()
    for name, tensor in ours["tensors"].items():
        assert torch.equal(tensor, theirs["tensors"][name]), name


@pytest.mark.parametrize("rule", ["sgd", "dgd", "momentum", "muon"])
@pytest.mark.parametrize("length", [0, 7, 25])
def test_reading_goes_on_bit_for_bit(rule, length, tmp_path):
    rules = StepRule(rule=rule, rate=0.02)
    learner = make_learner(rules=rules, batch_size=2)
    tokens = stream(40, rows=2)
    if length:
        learner.learn(tokens[:, :length])
    learner.save(tmp_path / "memory.safetensors")
    loaded = make_learner(rules=rules, batch_size=2).load(tmp_path / "memory.safetensors")
    assert_same_state(loaded, learner)
    assert loaded.tokens_read == length
    reports = [candidate.learn(tokens[:, length:]) for candidate in (learner, loaded)]
    assert all(torch.equal(a, b) for a, b in zip(*(report.losses for report in reports), strict=True))
    assert_same_state(loaded, learner)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_context_of_every_family_comes_back(family, tmp_path):
    learner = make_learner(family)
    tokens = stream(30)
    learner.learn(tokens[:, :17])
    learner.save(tmp_path / "memory.safetensors")
    loaded = make_learner(family).load(tmp_path / "memory.safetensors")
    for candidate in (learner, loaded):
        candidate.learn(tokens[:, 17:])
    assert_same_state(loaded, learner)


def test_sliding_windows_come_back(tmp_path):
    options = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    for name, value in options.items():
        setattr(CONFIGS["qwen2"], name, value)
    layer_types = CONFIGS["qwen2"].layer_types
    CONFIGS["qwen2"].layer_types = ["full_attention", "sliding_attention"]
    try:
        learner, loaded = make_learner("qwen2"), make_learner("qwen2")
        tokens = stream(30)
        learner.learn(tokens[:, :17])
        learner.save(tmp_path / "memory.safetensors")
        loaded.load(tmp_path / "memory.safetensors")
        for candidate in (learner, loaded):
            candidate.learn(tokens[:, 17:])
        assert_same_state(loaded, learner)
    finally:
        CONFIGS["qwen2"].layer_types = layer_types
        CONFIGS["qwen2"].sliding_window = None


def test_the_header_says_what_is_inside(tmp_path):
    learner = make_learner()
    learner.learn(stream(30))
    learner.save(tmp_path / "memory.safetensors")
    with safetensors.safe_open(tmp_path / "memory.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["header"])
    assert header["format"] == "nl_models.ContinuumLearner.3"
    assert header["tokens_per_level"] == list(learner.tokens_per_level) == [28, 24]
    assert len(header["config"]) == 64


def test_what_is_damaged_or_foreign_is_refused(tmp_path):
    path = tmp_path / "memory.safetensors"
    learner = make_learner()
    learner.learn(stream(20))
    learner.save(path)
    whole = path.read_bytes()
    victim = make_learner()
    victim.learn(stream(9))
    before = victim.state

    def assert_refused(message, error=MemoryFileError):
        with pytest.raises(error, match=message):
            victim.load(path)
        assert victim.state is before

    for cut in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert_refused("truncated")
    for place in (len(whole) - 1, len(whole) // 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert_refused("SHA-256 differs")
    path.write_bytes(random.Random(0).randbytes(1000))
    assert_refused("truncated, or no saved memory")
    save_file({"x": torch.zeros(3)}, path)
    assert_refused("no saved memory")
    path.write_bytes(whole)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    metadata["header"] = metadata["header"].replace('"learned": 16', '"learned": 12')
    save_file(load_file(path), path, metadata=metadata)
    assert_refused("SHA-256 differs")
    path.unlink()
    assert_refused("no such file", FileNotFoundError)
    with pytest.raises(MemoryFileError, match="damaged or no saved memory"):
        victim.load_state_dict({"header": {"format": "nl_models.ContinuumLearner.2"}, "tensors": {}})
    with pytest.raises(MemoryFileError, match="format 'other'"):
        victim.load_state_dict({"header": {"format": "other"}, "tensors": {}})


def test_a_memory_of_another_learner_is_refused(tmp_path):
    path = tmp_path / "memory.safetensors"
    learner = make_learner()
    learner.learn(stream(20))
    learner.save(path)
    other = convert_mlp_to_continuum(make_model("llama"), LEVELS)
    with torch.no_grad():
        other.lm_head.weight += 1e-3
    longer = [LEVELS[0], {"fraction": 0.25, "chunk_size": 16}]
    for victim, message in (
        (ContinuumLearner(other, RULE), "another model"),
        (make_learner("gpt2"), "another model"),
        (make_learner(batch_size=2), "batch_size = 1"),
        (make_learner(rules=StepRule(rate=0.02)), "rules = "),
        (make_learner(context_length=9), "context_length = "),
        (
            ContinuumLearner(convert_mlp_to_continuum(make_model("llama"), longer), RULE),
            "chunk_sizes = ",
        ),
    ):
        with pytest.raises(MemoryFileError, match=message):
            victim.load(path)
        assert victim.tokens_read == 0
    make_learner(rules=StepRule(rule="momentum", rate=0.5)).load(path)  # a rate may change


def test_rollback_undoes_the_last_stream():
    learner = make_learner()
    learner.learn(stream(20))
    before = learner.state
    learner.learn(stream(20))
    learner.rollback()
    assert learner.state is before
    with pytest.raises(RuntimeError, match="nothing was learned"):
        learner.rollback()


def test_forks_learn_apart():
    learner = make_learner()
    learner.learn(stream(20))
    fork = learner.fork()
    assert all(float(level.distance) == 0 for level in learner.compare(fork))
    before = learner.loss(stream(12))
    fork.learn(stream(33).flip(1))
    assert torch.equal(learner.loss(stream(12)), before)
    apart = learner.compare(fork)
    assert [level.chunk_size for level in apart] == [4, 8]
    assert all(float(level.distance) > 1e-3 for level in apart)
    # The distance of a fork that rolled back is that of nothing.
    fork.rollback()
    assert all(float(level.distance) == 0 for level in learner.compare(fork))
    with pytest.raises(ValueError, match="other: expected a learner with the same levels"):
        learner.compare(make_learner(batch_size=2))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "memory.safetensors"
    learner = make_learner()
    learner.save(path)
    before = path.read_bytes()
    learner.learn(stream(10))

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("nl_models.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        learner.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


KILLS = [pytest.param(4, id="4"), pytest.param(50, id="50", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kills", KILLS)
def test_a_killed_reader_loses_nothing_that_was_saved(kills, tmp_path):
    """Documents are read by processes that are killed at random moments, most often while they save."""
    path = tmp_path / "memory.safetensors"
    documents = [stream(50 + 11 * i) for i in range(max(3, kills // 4))]
    learner = make_learner()

    def read_on(save_every: int) -> None:
        if path.exists():
            learner.load(path)
        learner.learn(documents, skip=learner.tokens_read, save_to=path, save_every=save_every)

    chance, read = random.Random(kills), 0
    for attempt in range(kills):
        child = os.fork()
        if child == 0:
            try:
                read_on(save_every=3)
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0.02, 0.4))
        slowest = time.monotonic() + 60 * (attempt == kills - 1)
        while not path.exists() and time.monotonic() < slowest:  # a busy machine may not have got to a save
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if path.exists():
            found = make_learner().load(path).tokens_read
            assert found >= read
            read = found
    assert read > 0
    read_on(save_every=3)
    uninterrupted = make_learner()
    uninterrupted.learn(documents)
    assert_same_state(learner, uninterrupted)
    assert os.listdir(tmp_path) == [path.name]


def changes_of(learner):
    return [change for _, change in sorted(learner.state.changes.items())]


@pytest.mark.parametrize("rule", ["momentum", "dgd"])
def test_the_size_is_said_before_the_file_is_made(rule, tmp_path):
    path, learner = tmp_path / "memory.safetensors", make_learner(rules=StepRule(rule=rule, rate=0.02))
    every = [{}, {"chunks": False}, {"momenta": False, "chunks": False}, {"dtype": torch.bfloat16, "rank": 2}]
    expected = [learner.num_bytes(**options) for options in every]
    assert expected[0] > expected[1] >= expected[2]
    learner.learn(stream(31))  # in the midst of a chunk of 8
    for options, size in zip(every, expected):
        learner.save(path, **options)
        held = load_file(path)
        context = sum(t.nbytes for n, t in held.items() if n.startswith(("context/", "waiting")))
        found = sum(t.nbytes for t in held.values()) - context
        # The fastest level has gradients only where a context ends within its chunk.
        assert 0.5 * size < found <= size if options.get("chunks", True) else found == size
        assert path.stat().st_size - size - context < 300 * len(held) + 3000
        assert not any(name.startswith("momenta/") for name in held) or options.get("momenta", True)
    full = sum(change.nbytes for change in changes_of(learner))
    assert learner.num_bytes(dtype=torch.bfloat16, momenta=False, chunks=False) * 2 == full


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_memory_in_16_bits_is_near(dtype, tmp_path):
    path, learner, loaded = tmp_path / "memory.safetensors", make_learner(), make_learner()
    learner.learn(stream(40))
    learner.save(path, dtype=dtype)
    loaded.load(path)
    for found, change in zip(changes_of(loaded), changes_of(learner)):
        assert found.dtype == change.dtype
        torch.testing.assert_close(found, change, rtol=2**-8, atol=1e-6)
    text = stream(30).flip(1)
    torch.testing.assert_close(loaded.loss(text), learner.loss(text), rtol=1e-2, atol=0)


def test_a_memory_of_low_rank_is_the_best_of_its_rank(tmp_path):
    path, learner, loaded = (
        tmp_path / "memory.safetensors",
        make_learner(batch_size=2),
        make_learner(batch_size=2),
    )
    learner.learn(stream(40, rows=2))
    for rank in (1, 2, 3):
        learner.save(path, rank=rank)
        loaded.load(path)
        for found, change in zip(changes_of(loaded), changes_of(learner)):
            small = rank * sum(change.shape[1:]) < change[0].numel()
            lost = torch.linalg.svdvals(change)[:, rank:] if small else change.new_zeros(2, 1)
            distance = (found - change).flatten(1).norm(dim=1)
            torch.testing.assert_close(distance, lost.norm(dim=1), rtol=1e-3, atol=1e-6)


def test_what_was_left_out_begins_anew(tmp_path):
    path, learner, loaded = tmp_path / "memory.safetensors", make_learner(), make_learner()
    learner.learn(stream(31))
    learner.save(path, momenta=False, chunks=False)
    loaded.load(path)
    assert all(torch.equal(*pair) for pair in zip(changes_of(loaded), changes_of(learner)))
    assert not loaded.state.momenta
    assert loaded.state.context is None
    assert loaded.tokens_per_level == learner.tokens_per_level
    loaded.learn(stream(20))
    assert loaded.tokens_per_level == (44, 40)  # of 28 and 19 tokens: steps stay where they were
    for options, message in (
        ({"rank": 0}, "rank"),
        ({"dtype": torch.int8}, "dtype: expected torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            learner.save(path, **options)


def test_a_memory_on_another_model_needs_consent(tmp_path):
    path, learner = tmp_path / "memory.safetensors", make_learner()
    learner.learn(stream(31))
    learner.save(path)
    tuned, half = make_model("llama"), make_model("llama").bfloat16()
    with torch.no_grad():
        tuned.model.layers[1].self_attn.v_proj.weight[3, 5] += 1e-3  # one value
    larger = make_model("llama")
    larger.resize_token_embeddings(VOCABULARY + 3)
    for model in (tuned, half, larger):
        other = ContinuumLearner(convert_mlp_to_continuum(model, LEVELS), RULE)
        with pytest.raises(MemoryFileError, match="values of its weights; allow_other_model=True"):
            other.load(path)
        assert other.tokens_read == 0
        other.load(path, allow_other_model=True)
        assert all(torch.equal(*pair) for pair in zip(changes_of(other), changes_of(learner)))
        other.learn(stream(12))


def test_files_of_before_are_read(tmp_path):
    learner, loaded = make_learner(), make_learner()
    learner.learn(stream(31))
    packed = learner.state_dict()
    packed["header"] |= {
        "format": "nl_models.ContinuumLearner.2",
        "config": memory_file.sampled_digest(learner.model),
    }
    memory_file.write(tmp_path / "memory.safetensors", packed)
    assert_same_state(loaded.load(tmp_path / "memory.safetensors"), learner)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_memory_becomes_the_model(family, tmp_path):
    learner, text = make_learner(family, batch_size=2), stream(30).flip(1)
    learner.learn(stream(31, rows=2))
    learner.save(tmp_path / "memory.safetensors")
    expected = learner.predict(text.expand(2, -1))[1:]
    learner.merge_into_model(1)
    torch.testing.assert_close(learner.model(text).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(learner.predict(text.expand(2, -1))[1:], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(MemoryFileError, match="was learned with another model"):
        learner.load(tmp_path / "memory.safetensors")
    with pytest.raises(ValueError, match="rows: expected"):
        learner.merge_into_model(2)


def test_what_cannot_take_a_memory_is_not_changed():
    learner = make_learner()
    learner.learn(stream(31))
    last = learner.model.model.layers[1].mlp
    last.down_proj = torch.nn.Sequential(last.down_proj)
    last.down_proj.in_features, last.down_proj.weight = 24, None
    before = {name: weight.clone() for name, weight in learner.model.named_parameters()}
    with pytest.raises(TypeError, match="its down_proj of layer 1 is a Sequential"):
        learner.merge_into_model()
    assert all(torch.equal(before[name], weight) for name, weight in learner.model.named_parameters())


def test_a_document_is_forgotten_by_going_back():
    learner, known = make_learner(), []
    for document in (stream(20), stream(25).flip(1), stream(22)):
        known.append(learner.fork())
        learner.learn([document])
    without = known[1]
    without.learn([stream(22)])
    never = make_learner()
    never.learn([stream(20)])
    never.learn([stream(22)])
    assert all(torch.equal(*pair) for pair in zip(changes_of(without), changes_of(never)))
