"""Memories in the place of attention: one cache for both kinds, decoding equal to the forward pass."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, DynamicCache

import nl_models
from nl_models.continual import ContinuumLearner, StepRule
from nl_models.surgery import ContinuumCache, convert_attention, convert_mlp_to_continuum
from tests.nl_models.surgery.models import CONFIGS, LEVELS, make_model, random_fast_weights

KINDS = {"self_modifying_titans": {"chunk_size": 4}, "delta_memory": {}}
# The first layer is asked for the length of the past, and the last is not: both must work.
HYBRIDS = [("llama", [0]), ("llama", [1]), *((family, [0, 1]) for family in CONFIGS)]


def make_hybrid(family, kind, layers, dtype=torch.float64):
    torch.manual_seed(3)
    return convert_attention(make_model(family, dtype), layers, kind, **KINDS[kind]).eval()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize(("family", "layers"), HYBRIDS)
def test_a_cut_sequence_equals_the_uncut_one(family, layers, kind, tokens):
    hybrid = make_hybrid(family, kind, layers)
    whole = hybrid(tokens, use_cache=False)
    assert whole.cache is None
    for cut in (1, 6):
        first = hybrid(tokens[:, :cut])
        assert isinstance(first.cache, ContinuumCache)
        second = hybrid(tokens[:, cut:], cache=first.cache)
        pieces = torch.cat([first.logits, second.logits], dim=1)
        torch.testing.assert_close(pieces, whole.logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("family", "layers"), HYBRIDS)
def test_generation_is_the_forward_pass(family, layers, kind, tokens):
    hybrid = make_hybrid(family, kind, layers)
    generated = hybrid.generate(tokens, max_new_tokens=9, do_sample=False)
    greedy = hybrid(generated).logits.argmax(-1)
    assert torch.equal(generated[:, tokens.shape[1] :], greedy[:, tokens.shape[1] - 1 : -1])


@pytest.mark.parametrize(("family", "layers"), HYBRIDS)
def test_left_padding_changes_nothing(family, layers, kind, tokens):
    hybrid = make_hybrid(family, kind, layers)
    padded = torch.cat([torch.zeros(len(tokens), 5, dtype=torch.int64), tokens], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 5).long().expand_as(padded)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = hybrid(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(logits, hybrid(tokens).logits, atol=1e-6, rtol=0)
    options = {"max_new_tokens": 6, "do_sample": False}
    shifted = hybrid.generate(padded, attention_mask=mask, **options)
    assert torch.equal(shifted[:, 5:], hybrid.generate(tokens, **options))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_beams_keep_their_states(family, kind, tokens):
    hybrid = make_hybrid(family, kind, [0])
    options = {"max_new_tokens": 7, "do_sample": False, "num_beams": 3}
    with_cache = hybrid.generate(tokens, **options)
    assert torch.equal(with_cache, hybrid.generate(tokens, use_cache=False, **options))


def test_projections_go_over(family, kind):
    model = make_model(family)
    hybrid = convert_attention(model, [0], kind, **KINDS[kind])
    memory = hybrid.base_model.decoder_layers()[0].get_submodule(hybrid.base_model.attention_name).memory
    x = torch.randn(2, 16)
    found = [projection(x) for projection in (memory.q_proj, memory.k_proj, memory.v_proj)]
    if family == "gpt2":
        attention = model.transformer.h[0].attn
        expected = (attention.c_attn(x) - attention.c_attn.bias).chunk(3, dim=-1)
        out = attention.c_proj
    elif family == "gpt_neox":
        attention = model.gpt_neox.layers[0].attention
        fused = (attention.query_key_value(x) - attention.query_key_value.bias).view(2, 2, 3, 8)
        expected = [fused[:, :, i].flatten(1) for i in range(3)]
        out = attention.dense
    else:
        attention = model.model.layers[0].self_attn
        names = ("q_proj", "k_proj", "v_proj")
        expected = [torch.nn.functional.linear(x, attention.get_submodule(n).weight) for n in names]
        expected[1:] = [value.repeat(1, 2) for value in expected[1:]]  # one head serves two
        out = attention.o_proj
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    bias = 0 if out.bias is None else out.bias
    torch.testing.assert_close(memory.output.o_proj(x), out(x) - bias, atol=1e-5, rtol=0)
    shared = dict(hybrid.named_parameters())
    kept = [name for name in dict(model.named_parameters()) if name in shared]
    assert all(shared[name] is model.get_parameter(name) for name in kept)
    assert not any(t.is_meta for t in (*hybrid.parameters(), *hybrid.buffers()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_loads_as_what_it_is(family, kind, tokens, tmp_path):
    nl_models.register()
    hybrid = make_hybrid(family, kind, [1], torch.float32)
    hybrid.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(hybrid)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, hybrid(tokens).logits)


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox"])
def test_it_trains_with_checkpointing_too(family, kind, tokens):
    gradients = []
    for checkpointing in (False, True):
        hybrid = make_hybrid(family, kind, [0, 1])
        for module in hybrid.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        hybrid.train()
        if checkpointing:
            for module in hybrid.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = True
                    module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        hybrid(tokens, labels=tokens).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in hybrid.named_parameters()})
    for name, plain in gradients[0].items():
        assert plain is not None, name
        torch.testing.assert_close(plain, gradients[1][name], atol=1e-8, rtol=0)


@pytest.mark.parametrize(("family", "mlp_first"), [("llama", True), ("gpt_neox", False), ("gpt2", True)])
def test_both_conversions_go_together(family, kind, mlp_first, tokens, tmp_path):
    torch.manual_seed(3)
    model = make_model(family)
    if mlp_first:
        both = convert_attention(convert_mlp_to_continuum(model, LEVELS), [0], kind, **KINDS[kind])
    else:
        both = convert_mlp_to_continuum(convert_attention(model, [0], kind, **KINDS[kind]), LEVELS)
    both.eval()
    fast = random_fast_weights(both, len(tokens))
    whole = both(tokens, fast_weights=fast).logits
    first = both(tokens[:, :7], fast_weights=fast)
    second = both(tokens[:, 7:], cache=first.cache)
    pieces = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(pieces, whole, atol=1e-4, rtol=0)
    first.cache.reorder_cache(torch.tensor([2, 0, 1]))
    # A learner's context holds the states of memories as well.
    rule = StepRule(rate=0.02)
    learner, loaded = ContinuumLearner(both, rule), ContinuumLearner(both, rule)
    learner.learn(tokens[:1, :6])
    learner.save(tmp_path / "memory.safetensors")
    loaded.load(tmp_path / "memory.safetensors")
    reports = [candidate.learn(tokens[:1, 6:]) for candidate in (learner, loaded)]
    assert torch.equal(reports[0].loss, reports[1].loss)


def test_memories_converted_before_they_said_where_errors_are_taken_keep_the_snapshot(tokens):
    hybrid = convert_attention(make_model("llama"), [0]).eval()
    fields = hybrid.config.to_dict()
    del fields["memory_layers"]["0"]["error_at"]
    old = type(hybrid)(type(hybrid.config)(**fields)).eval()
    old.load_state_dict(hybrid.state_dict())
    assert old.model.layers[0].self_attn.memory.rule.error_at == "snapshot"
    with torch.no_grad():
        assert not torch.allclose(old(tokens).logits, hybrid(tokens).logits)


def test_what_it_cannot_do_is_refused(tokens):
    model = make_model("llama")
    hybrid = convert_attention(model, [0])
    options = {"kind": "self_modifying_titans", "chunk_size": 16, "error_at": "anchor"}
    assert hybrid.config.memory_layers == {"0": options}
    with pytest.raises(ValueError, match="kind: expected one of"):
        convert_attention(model, [0], "mamba")
    with pytest.raises(ValueError, match="layers: expected distinct indices below 2"):
        convert_attention(model, [2])
    with pytest.raises(ValueError, match="have one already"):
        convert_attention(hybrid, [0, 1])
    with pytest.raises(ValueError, match="chunk_size: a delta_memory has no chunks"):
        convert_attention(model, [0], "delta_memory", chunk_size=4)
    with pytest.raises(ValueError, match="chunk_size: expected an integer of at least 1"):
        convert_attention(model, [0], chunk_size=0)
    with pytest.raises(ValueError, match="a DynamicCache has no place for the states of memories"):
        hybrid(tokens, cache=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="position_ids: tells of packed sequences in a batch of"):
        hybrid(tokens, position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]] * len(tokens)))
    with pytest.raises(ValueError, match="cache_implementation"):
        hybrid.generate(tokens, max_new_tokens=3, cache_implementation="static")
    with pytest.raises(ValueError, match="attention_mask: expected shape"):
        hybrid(tokens, attention_mask=torch.ones(3, 4))


@pytest.mark.parametrize(("family", "layers"), HYBRIDS)
def test_a_conversation_goes_on_with_new_tokens_alone(family, layers, kind, tokens):
    hybrid, turn = make_hybrid(family, kind, layers), tokens[:, 2:5]
    options = {"max_new_tokens": 5, "do_sample": False}
    first = hybrid.generate(tokens, return_dict_in_generate=True, **options)
    history = torch.cat([first.sequences, turn], dim=1)
    expected = hybrid.generate(history, **options)[:, first.sequences.shape[1] :]
    assert torch.equal(hybrid.generate(turn, cache=first.cache, **options), expected)


def test_new_tokens_go_on_after_padding(kind, tokens):
    hybrid = make_hybrid("llama", kind, [0])
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    cache, options = ContinuumCache(hybrid.config), {"max_new_tokens": 2, "do_sample": False}
    first = hybrid.generate(tokens, attention_mask=mask, cache=cache, **options)
    found = hybrid.generate(tokens[:, :3], cache=cache, **options)
    for row, start in enumerate((2, 0, 0)):
        history = torch.cat([first[row, start:], tokens[row, :3]])[None]
        expected = hybrid.generate(history, use_cache=False, **options)
        assert torch.equal(found[row], expected[0, -5:])
