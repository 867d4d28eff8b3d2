"""Checkpoints: complete or absent, and never believed when they are not what they claim."""

import json
import shutil

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from nl_models.data.tokenizer import ByteTokenizer
from nl_models.training import checkpoint as module
from nl_models.training.checkpoint import (
    best_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    validation_losses,
)


class Tied(PreTrainedModel):
    """Two names for one weight, and a persistent buffer."""

    config_class = PretrainedConfig
    _tied_weights_keys = {"second.weight": "first.weight"}  # noqa: RUF012

    def __init__(self, width=4):
        super().__init__(PretrainedConfig(tie_word_embeddings=True))
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.zeros(2))
        self.post_init()


def save_checkpoint(folder, step, model, optimizer, **options):
    return module.save_checkpoint(folder, step, model, ByteTokenizer(), optimizer, **options)


def trained(seed=0, width=4):
    torch.manual_seed(seed)
    model = Tied(width)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(3):
        model.second(model.first(torch.randn(2, width))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.count += 5
    return model, optimizer


@pytest.fixture
def saved(tmp_path):
    model, optimizer = trained()
    return save_checkpoint(tmp_path, 3, model, optimizer, validation_loss=1.5), model, optimizer


def test_everything_comes_back(saved):
    path, model, optimizer = saved
    other, other_optimizer = trained(seed=1)
    assert load_checkpoint(path, other, other_optimizer) == 3
    assert validation_losses(path.parent) == {path: 1.5}
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert other.second.weight is other.first.weight
    for a, b in zip(model.parameters(), other.parameters()):
        for kind, value in optimizer.state[a].items():
            assert torch.equal(value, other_optimizer.state[b][kind]), kind


def test_a_failure_while_writing_leaves_no_checkpoint(tmp_path, monkeypatch):
    model, optimizer = trained()
    save_checkpoint(tmp_path, 1, model, optimizer)

    def failing(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(module, "_fingerprint", failing)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, 2, model, optimizer)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_left_over_of_a_killed_process_is_not_a_checkpoint_and_goes_away(saved, tmp_path):
    path, *_ = saved
    shutil.copytree(path, tmp_path / ".incomplete-step-00000004-abc")
    assert list_checkpoints(tmp_path) == [path]
    prune_checkpoints(tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "model.safetensors"])
def test_truncated_altered_and_missing_files_are_refused_before_anything_changes(saved, name):
    path, *_ = saved
    model, optimizer = trained(seed=1)
    before = [p.clone() for p in model.parameters()]
    content = (path / name).read_bytes()
    for damaged, message in (
        (content[:-7], "truncated"),
        (content[:-1] + b"\x7f", "was altered"),
        (None, "is missing"),
    ):
        (path / name).unlink()
        if damaged is not None:
            (path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path, model, optimizer)
        (path / name).write_bytes(content)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_foreign_folders_are_refused(saved, tmp_path):
    path, *_ = saved
    state = json.loads((path / "state.json").read_text())
    model, optimizer = trained()
    for content, message in (
        ("{", "damaged or foreign"),
        ("[]", "damaged or foreign"),
        (json.dumps({**state, "format": "other"}), "format 'other'"),
        (json.dumps({**state, "format": "nl-models-checkpoint-2"}), "with the version that began it"),
        (json.dumps({"format": state["format"], "step": 3}), "damaged or foreign"),
    ):
        (path / "state.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path, model, optimizer)
    (path / "state.json").unlink()
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_checkpoint(path, model, optimizer)


def test_the_checkpoint_of_another_model_is_refused(saved):
    path, *_ = saved
    with pytest.raises(ValueError, match=r"the model has torch.float32 \(5, 5\)"):
        load_checkpoint(path, *trained(width=5))
    model, optimizer = trained()
    model.third = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"of another model \(only one of them has \['third.bias'"):
        load_checkpoint(path, model, optimizer)


def test_the_newest_and_the_best_are_kept(tmp_path):
    model, optimizer = trained()
    for step, loss in enumerate([3.0, 1.0, None, 2.0, None, 4.0], start=1):
        save_checkpoint(tmp_path, step, model, optimizer, validation_loss=loss)
        prune_checkpoints(tmp_path, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-0000000{i}" for i in (2, 5, 6)]
    assert best_checkpoint(tmp_path).name == "step-00000002"
