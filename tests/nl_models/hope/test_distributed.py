"""Plain DDP over two processes (gloo): short texts and carried states, which leave parameters unused."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from nl_models import HopeCache, HopeConfig, HopeForCausalLM
from nl_models.hope.configuration_hope import LAYER_TYPES
from nl_models.surgery import convert_attention, convert_mlp_to_continuum
from tests.nl_models.parallel.processes import on_ranks

LEVELS = [{"hidden_size": 8, "chunk_size": 64}, {"hidden_size": 8, "chunk_size": 128}]


def make_hope(variant):
    torch.manual_seed(0)
    return HopeForCausalLM(
        HopeConfig(
            vocab_size=31,
            hidden_size=8,
            num_hidden_layers=len(LAYER_TYPES),
            num_attention_heads=2,
            layer_types=list(LAYER_TYPES),
            continuum_levels=LEVELS,
            continuum_variant=variant,
        )
    ).train()


def make_converted():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=31, **sizes))
    continuum = convert_mlp_to_continuum(llama, [{"fraction": 0.5, "chunk_size": 4}])
    return convert_attention(continuum, [1], chunk_size=4)


def texts(rank):
    return torch.randint(1, 31, (1, 40), generator=torch.Generator().manual_seed(rank))


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def check_hope(rank, variant, checkpointing):
    single, model = make_hope(variant), make_hope(variant)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parallel = DistributedDataParallel(model)
    caches = [HopeCache(model.config) for _ in range(3)]  # of this process, and of both in one
    for length in (40, 1, 27, 40, 40):  # not a step in the first pieces, two in the last
        model.zero_grad()
        single.zero_grad()
        mine, *both = (texts(r)[:, :length] for r in (rank, 0, 1))
        output = parallel(mine, past_key_values=caches[0])
        loss_of(output.logits, mine).backward()
        for ids, cache in zip(both, caches[1:]):
            (loss_of(single(ids, past_key_values=cache).logits, ids) / 2).backward()
        torch.testing.assert_close(gradients(model), gradients(single))
        for cache in caches:
            cache.detach()


def loss_of(logits, ids):
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def check_converted(rank):
    model = make_converted().train()
    parallel = DistributedDataParallel(model)
    for fast_weights in (None, model.initial_fast_weights()):
        for length in (1, 40):
            ids = texts(rank)[:, :length]
            model.zero_grad()
            loss_of(parallel(ids, fast_weights=fast_weights, use_cache=False).logits, ids).backward()
            assert gradients(model).any()


def check(mesh):
    for variant in ("sequential", "nested", "independent"):
        check_hope(mesh.get_rank(), variant, checkpointing=variant == "nested")
    check_converted(mesh.get_rank())


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_have_the_gradients_of_one(tmp_path):
    on_ranks(2, tmp_path, check)
