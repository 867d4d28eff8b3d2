"""``chunk_gated_delta_rule`` inside the models of transformers that call flash-linear-attention's."""

import pytest
import torch

from nl_kernels import chunk_gated_delta_rule

modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")


def make_model():
    torch.manual_seed(0)
    config = modeling.Qwen3NextConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=6,
        num_experts=0,
        mlp_only_layers=[0, 1],
    )
    return modeling.Qwen3NextForCausalLM(config).eval()


def use_ours(model, monkeypatch):
    """In the places of both rules, called as this version calls them; returns the calls' lengths."""
    lengths = []

    def ours(query, key, value, **options):
        lengths.append(query.shape[1])
        return chunk_gated_delta_rule(query, key, value, **options)

    for rule in ("chunk", "recurrent"):
        monkeypatch.setattr(modeling, f"torch_{rule}_gated_delta_rule", ours)
    for module in model.modules():
        if hasattr(module, "recurrent_gated_delta_rule"):  # transformers before 5.20 kept them on the layer
            module.chunk_gated_delta_rule = module.recurrent_gated_delta_rule = ours
    return lengths


def logits_and_gradients(model, ids):
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_qwen3_next_reads_and_decodes_as_with_its_own(monkeypatch):
    """Two value heads share a head of queries and keys."""
    model = make_model()
    ids = torch.randint(1, 31, (2, 9), generator=torch.Generator().manual_seed(1))
    generation = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generation |= {"output_logits": True, "return_dict_in_generate": True}
    expected, spoken = logits_and_gradients(model, ids), model.generate(ids, **generation)
    lengths = use_ours(model, monkeypatch)
    found, again = logits_and_gradients(model, ids), model.generate(ids, **generation)
    assert lengths == [9, 9, 1, 1, 1, 1]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert torch.equal(again.sequences, spoken.sequences)
    for a, b in zip(again.logits, spoken.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
