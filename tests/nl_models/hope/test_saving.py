"""Models and conversations come back from disk as they were, and foreign files are refused."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import nl_models
from nl_models import HopeCache, HopeConfig, HopeForCausalLM, HopeModel
from nl_models.hope.configuration_hope import LAYER_TYPES
from nl_models.hope.modeling_hope import LAYERS_WITH_PARAMETERS
from nl_models.layers.state import state_tensors
from tests.nl_models.full_disk import small_files

HYBRID = list(LAYER_TYPES)


@pytest.fixture
def hybrid(make_model):
    return make_model(HYBRID, dtype=torch.float32, num_hidden_layers=4, memory_rule={"erase": "input"})


def test_a_saved_model_gives_the_same_logits(hybrid, tokens, tmp_path):
    hybrid.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = HopeForCausalLM.from_pretrained(tmp_path)
    ids = tokens(2, 11)
    assert torch.equal(loaded(ids).logits, hybrid(ids).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.to_dict() == {**hybrid.config.to_dict(), "_name_or_path": str(tmp_path)} or (
        loaded.config.fingerprint() == hybrid.config.fingerprint()
    )


def test_untied_output_layers_are_saved(make_model, tokens, tmp_path):
    model = make_model("titans", dtype=torch.float32, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    loaded, ids = HopeForCausalLM.from_pretrained(tmp_path), tokens(1, 5)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_registered_names_load_the_model(hybrid, tokens, tmp_path):
    nl_models.register()
    nl_models.register()
    hybrid.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is HopeConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is HopeModel
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path), tokens(1, 6)
    assert type(loaded) is HopeForCausalLM
    assert torch.equal(loaded(ids).logits, hybrid(ids).logits)


def test_loading_in_bf16_keeps_states_in_fp32(hybrid, tokens, tmp_path):
    hybrid.save_pretrained(tmp_path)
    loaded = HopeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    output = loaded(tokens(2, 9), use_cache=True)
    assert output.logits.dtype == torch.bfloat16
    assert output.logits.isfinite().all()
    for block, layer in zip(loaded.model.layers, output.cache.layers):
        dtypes = {t.dtype for t in state_tensors(layer.state.mixer)}
        attention = block.mixer.__class__.__name__ == "Attention"
        assert dtypes <= ({torch.bfloat16, torch.int64} if attention else {torch.float32, torch.int64})


def test_a_saved_conversation_goes_on_as_if_it_had_not_stopped(hybrid, tokens, tmp_path):
    ids, path = tokens(3, 17), tmp_path / "conversation.safetensors"
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    cache = HopeCache(hybrid.config)
    with torch.no_grad():
        hybrid(ids[:, :10], attention_mask=mask[:, :10], cache=cache)
        cache.save(path)
        resumed = HopeCache.load(path, hybrid.config)
        expected = hybrid(ids[:, 10:], cache=cache).logits
        assert resumed.get_seq_length() == 10
        assert torch.equal(hybrid(ids[:, 10:], cache=resumed).logits, expected)
        assert torch.equal(
            hybrid(ids[:, :1], cache=HopeCache(hybrid.config)).logits, hybrid(ids[:, :1]).logits
        )
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_empty_cache_can_be_saved(hybrid, tmp_path):
    HopeCache(hybrid.config).save(tmp_path / "empty")
    assert HopeCache.load(tmp_path / "empty", hybrid.config).get_seq_length() == 0


def test_foreign_and_broken_files_are_refused(hybrid, make_config, tokens, tmp_path):
    path = tmp_path / "conversation"
    cache = hybrid(tokens(1, 5), use_cache=True).cache
    cache.save(path)
    with pytest.raises(ValueError, match="another config"):
        HopeCache.load(path, make_config("titans"))
    whole = path.read_bytes()
    for size in (0, 5, 200, len(whole) - 1):
        (tmp_path / "truncated").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated or no saved HopeCache"):
            HopeCache.load(tmp_path / "truncated", hybrid.config)
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="no saved HopeCache"):
        HopeCache.load(tmp_path / "foreign", hybrid.config)
    with pytest.raises(FileNotFoundError):
        HopeCache.load(tmp_path / "missing", hybrid.config)


def test_a_failed_save_leaves_the_old_file(hybrid, tokens, tmp_path):
    path = tmp_path / "conversation"
    cache = hybrid(tokens(1, 5), use_cache=True).cache
    cache.save(path)
    before = path.read_bytes()

    with small_files(100), pytest.raises(OSError, match="File too large"):
        cache.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_missing_weights_get_their_initial_values(make_config, tmp_path):
    """A checkpoint without the layers' own parameters, as one made by turning another model into Hope."""
    torch.manual_seed(0)
    model = HopeForCausalLM(make_config(HYBRID, num_hidden_layers=4, hidden_size=32))
    own = {
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if isinstance(module, LAYERS_WITH_PARAMETERS)
        for name, _ in module.named_parameters(recurse=False)
    }
    kinds = {name.rsplit(".", 1)[1] for name in own}
    assert kinds >= {"weight", "inner", "outer", "rate_bias", "log_rate", "up", "rate_logit"}
    model.config.save_pretrained(tmp_path)
    rest = {name: w.contiguous() for name, w in model.state_dict().items() if name not in own}
    save_file({n: w for n, w in rest.items() if n != "lm_head.weight"}, tmp_path / "model.safetensors")
    loaded = HopeForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, weight in model.state_dict().items():
        constant = weight.unique().numel() == 1 or name.endswith(".key")  # the key starts as the identity
        if name not in own or constant:
            assert torch.equal(loaded[name], weight), name
        else:
            assert loaded[name].isfinite().all(), name
            ratio = loaded[name].square().mean().sqrt() / weight.square().mean().sqrt()
            assert 0.3 < ratio < 3, name
