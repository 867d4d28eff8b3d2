"""Options: defaults, files, checks."""

import dataclasses
import json

import pytest

from nl_models.training.config import TrainConfig, load_config, merged_options


def test_a_config_survives_json(tmp_path):
    config = TrainConfig(steps=7, warmup_steps=1, model_options={"rope_theta": 5.0})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(config)))
    assert load_config(path) == config


def test_integers_are_accepted_for_floats_but_nothing_else_is_converted(tmp_path):
    assert TrainConfig(learning_rate=1).learning_rate == 1.0
    for bad in (
        {"steps": 1.5},
        {"steps": True},
        {"steps": "9"},
        {"corpus": 3},
        {"gradient_checkpointing": 1},
        {"steps": 0},
    ):
        (name,) = bad
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            TrainConfig(**bad)
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=f"bad.json: {name}: expected"):
            load_config(tmp_path / "bad.json")


def test_unknown_options_are_refused_with_a_suggestion(tmp_path):
    for values, message in (
        ({"learning_rat": 1}, "bad.json: unknown option 'learning_rat'; did you mean 'learning_rate'"),
        ([1], "bad.json: expected a JSON object"),
        ({"steps": 5, "warmup_steps": 5}, "bad.json: warmup_steps: expected fewer"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=message):
            load_config(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("sequence_length", 1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("final_learning_rate", 1.5),
        ("warmup_steps", 1000),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("clip_norm", 0.0),
        ("threads", 0),
        ("seed", 2**63),
        ("keep_checkpoints", 0),
        ("model", "rnn"),
        ("precision", "fp8"),
    ],
)
def test_bad_values_name_the_option(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        TrainConfig(**{name: value})


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        load_config(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_config(tmp_path / "bad.json")


def test_options_in_yaml_and_what_lies_over_them(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "steps: 9  # few\nwarmup_steps: 1\nmodel_options: {memory_chunk_size: 8, rope_theta: 5.0}\n"
    )
    assert load_config(path).model_options == {"memory_chunk_size": 8, "rope_theta": 5.0}
    over = {"steps": 7, "model_options": {"rope_theta": 6.0}}
    merged = merged_options({"seed": 3, "steps": 1}, dataclasses.asdict(load_config(path)), over)
    assert (merged["steps"], merged["seed"]) == (7, 0)
    assert merged["model_options"] == {"memory_chunk_size": 8, "rope_theta": 6.0}
    assert merged_options({"seed": 3}) == {"seed": 3}
    path.write_text("steps: [")
    with pytest.raises(ValueError, match="is not YAML"):
        load_config(path)
