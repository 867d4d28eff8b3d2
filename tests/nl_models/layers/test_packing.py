"""Packed sequences by every name that collators send, and refused where the names disagree."""

import pytest
import torch
from transformers import (
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nl_models import HopeCache, HopeConfig, HopeForCausalLM
from nl_models.layers.packing import packed_bounds
from nl_models.surgery import ContinuumCache, convert_attention, convert_mlp_to_continuum

VOCABULARY = 61
LEVELS = [{"fraction": 0.5, "chunk_size": 4}]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def hope():
    types = ["self_modifying_titans", "full_attention"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "memory_chunk_size": 4}
    return HopeForCausalLM(HopeConfig(vocab_size=VOCABULARY, layer_types=types, **sizes))


def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SIZES))


def qwen3():
    config = Qwen3Config(vocab_size=VOCABULARY, head_dim=8, num_key_value_heads=4, **SIZES)
    return Qwen3ForCausalLM(config)


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=1, **sizes))


def gpt_neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCABULARY, **SIZES))


MODELS = {
    "hope": hope,
    "levels-llama": lambda: convert_mlp_to_continuum(llama(), LEVELS),
    "levels-gpt2": lambda: convert_mlp_to_continuum(gpt2(), LEVELS),
    "hybrid-llama": lambda: convert_attention(llama(), [0], chunk_size=4),
    "hybrid-qwen3": lambda: convert_attention(qwen3(), [1], kind="delta_memory"),
    "hybrid-gpt2": lambda: convert_attention(gpt2(), [1], kind="delta_memory"),
    "hybrid-gpt_neox": lambda: convert_attention(gpt_neox(), [0], kind="delta_memory"),
}
LENGTHS = [7, 1, 1, 12]


def make(name):
    torch.manual_seed(1)
    return MODELS[name]().double().eval()


def sequences():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def collated(**options):
    return DataCollatorWithFlattening(**options)([{"input_ids": s.tolist()} for s in sequences()])


BOUNDS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
SEQ_IDX = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))[None].int()
WAYS = {
    "cu_seqlens": {"cu_seqlens": BOUNDS},
    "one of two": {"cu_seq_lens_q": BOUNDS.long()},
    "both": {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 12, "max_length_k": 12},
    "seq_idx": {"seq_idx": SEQ_IDX},
    "positions": {"position_ids": POSITIONS},
    "positions and mask": {"position_ids": POSITIONS, "attention_mask": torch.ones_like(POSITIONS)},
    "all": {"position_ids": POSITIONS, "seq_idx": SEQ_IDX, "cu_seqlens": BOUNDS, "cu_seq_lens_k": BOUNDS},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_packed_sequences_do_not_see_each_other(name, way):
    model, parts = make(name), sequences()
    got = model(torch.cat(parts)[None], **WAYS[way])
    assert got.cache is None
    expected = torch.cat([model(part[None], use_cache=False).logits[0] for part in parts])
    torch.testing.assert_close(got.logits[0], expected, rtol=0, atol=1e-9)
    backbone = model.base_model(torch.cat(parts)[None], **WAYS[way])[0]
    torch.testing.assert_close(model.get_output_embeddings()(backbone), got.logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("name", ["hope", "levels-llama", "hybrid-llama"])
def test_a_batch_of_the_flattening_collator_is_its_sequences(name, flash):
    model = make(name)
    options = {"return_seq_idx": True, "return_flash_attn_kwargs": True} if flash else {}
    batch = collated(**options)
    sums = [
        model(s[None], labels=s[None], use_cache=False).loss * (len(s) - 1) for s in sequences() if len(s) > 1
    ]
    expected = sum(sums) / sum(length - 1 for length in LENGTHS)
    torch.testing.assert_close(model.train()(**batch).loss, expected, rtol=1e-5, atol=0)  # in fp32


def test_labels_need_no_separators_in_hope():
    model, ids = make("hope"), torch.cat(sequences())[None]
    expected = model(**collated()).loss
    torch.testing.assert_close(model(ids, labels=ids, seq_idx=SEQ_IDX).loss, expected)


@pytest.mark.parametrize("name", ["hope", "levels-llama", "hybrid-llama"])
def test_bounds_that_disagree_are_refused(name):
    model, ids = make(name), torch.cat(sequences())[None]
    other = BOUNDS.clone()
    other[1] = 6
    one_less = BOUNDS[:-1]
    for refused in (
        {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": other},
        {"cu_seq_lens_q": BOUNDS, "max_length_q": 11},
        {"cu_seqlens": other, "position_ids": POSITIONS},
        {"cu_seqlens": other, "seq_idx": SEQ_IDX},
        {"cu_seq_lens_q": one_less},
        {"max_length_k": 12},
        {"position_ids": POSITIONS, "use_cache": True},
        {"seq_idx": SEQ_IDX, "attention_mask": torch.arange(21)[None] > 2},
        {"seq_idx": SEQ_IDX.repeat(2, 1), "input_ids": ids.repeat(2, 1)},
        {"seq_idx": SEQ_IDX[0]},
        {"position_ids": POSITIONS[0]},
    ):
        with pytest.raises(ValueError):
            model(**{"input_ids": ids, **refused})
    cache = HopeCache(model.config) if name == "hope" else ContinuumCache(model.config)
    model(ids[:, :3], cache=cache)
    with pytest.raises(ValueError):
        model(ids, cu_seqlens=BOUNDS, cache=cache)
    assert cache.get_seq_length() == 3


def test_positions_of_padding_pack_nothing():
    left = torch.tensor([[1, 1, 1, 0, 1, 2]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert packed_bounds(left, mask) is None
    assert packed_bounds(torch.arange(6)[None].repeat(3, 1), None) is None
    assert packed_bounds(torch.tensor([[0, 5, 9]]), None) is None
    with pytest.raises(ValueError, match="lay them end to end"):
        packed_bounds(torch.tensor([[0, 1, 0], [0, 1, 2]]), None)
