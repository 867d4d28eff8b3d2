"""A process that never imported this package loads a saved model with the auto classes, as our classes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nl_models import HopeConfig, HopeForCausalLM
from nl_models.surgery import convert_attention, convert_mlp_to_continuum

LEVELS = [{"fraction": 0.5, "chunk_size": 4}]


def hope():
    levels = [{"hidden_size": 32, "chunk_size": 8, "max_rate": 0}, {"hidden_size": 32}]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return HopeForCausalLM(HopeConfig(vocab_size=31, continuum_levels=levels, **sizes))


def llama():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, **sizes))


def gpt2():
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, bos_token_id=1, eos_token_id=1, **sizes))


MODELS = {
    "hope": hope,
    "levels": lambda: convert_mlp_to_continuum(llama(), LEVELS),
    "hybrid": lambda: convert_mlp_to_continuum(convert_attention(llama(), [0], kind="delta_memory"), LEVELS),
    "gpt2": lambda: convert_mlp_to_continuum(gpt2(), LEVELS),
}

CHILD = """
import json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
assert "nl_models" not in sys.modules
folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert config.auto_map["AutoModelForCausalLM"]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.arange(1, 13)[None]
with torch.no_grad():
    logits = model(ids, use_cache=True).logits
text = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)) is type(model.base_model)
model.save_pretrained(folder + "/again")
from nl_models.continual import ContinuumLearner, StepRule
ContinuumLearner(model, StepRule(rate=1e-3)).learn(ids)
found = type(model)
print(json.dumps([found.__module__, found.__name__, logits[0, -1].tolist(), text[0].tolist()]))
"""


# The hybrid has levels too; what the others add is the name of a class.
@pytest.mark.parametrize(
    "name", ["hybrid", *(pytest.param(n, marks=pytest.mark.slow) for n in ("hope", "levels", "gpt2"))]
)
def test_a_process_without_this_package_loads_it(tmp_path, name):
    torch.manual_seed(0)
    model, folder = MODELS[name]().eval(), tmp_path / "model"
    model.save_pretrained(folder)
    source = str(Path(sys.modules["nl_models"].__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": source,
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", CHILD, str(folder)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert child.returncode == 0, child.stderr
    module, found, logits, text = json.loads(child.stdout.splitlines()[-1])
    assert (module, found) == (type(model).__module__, type(model).__name__)
    ids = torch.arange(1, 13)[None]
    torch.testing.assert_close(torch.tensor(logits), model(ids).logits[0, -1], rtol=1e-5, atol=1e-6)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert text == model.generate(ids, **options)[0].tolist()
    for saved in (folder, folder / "again"):
        assert [path.name for path in saved.glob("*.py")] == ["modeling_nl_kernels.py"]
    assert json.loads((folder / "config.json").read_text())["auto_map"] == model.config.to_dict()["auto_map"]
    assert type(type(model).from_pretrained(folder / "again")) is type(model)


def test_trls_loader(tmp_path):
    utils = pytest.importorskip("trl.trainer.utils", reason="needs trl: pip install trl")
    hope().save_pretrained(tmp_path)
    assert isinstance(utils.create_model_from_path(str(tmp_path), trust_remote_code=True), HopeForCausalLM)


def test_a_folder_that_is_a_file_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(Exception, match="file"):
        HopeConfig().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_registered_classes_need_no_trust(tmp_path):
    import nl_models

    nl_models.register()
    hope().save_pretrained(tmp_path)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), HopeForCausalLM)
