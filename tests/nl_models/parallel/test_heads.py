"""A Hope whose heads are shared out over ranks is the model in one process, through a training step."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from nl_models.parallel import parallelize_heads
from tests.nl_models.parallel.processes import on_ranks
from tests.nl_models.parallel.test_model import MODELS, make, text

HEADS = {"num_attention_heads": 4}


def step(model, ids, mask=None):
    """Logits, loss, all gradients, and all weights after a clipped step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    output = model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False)
    output.loss.backward()
    found = {"logits": output.logits.detach(), "loss": output.loss.detach()}
    found |= {f"gradient of {name}": whole(x.grad) for name, x in model.named_parameters()}
    norm = clip_grad_norm_(model.parameters(), 0.1)
    found["norm"] = whole(norm)
    optimizer.step()
    return found | {name: whole(x).detach().clone() for name, x in model.state_dict().items()}


def whole(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()


def run(mesh, name, options, ids, mask):
    model = make(name, **HEADS)
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parallelize_heads(model, mesh)
    shard = model.model.layers[0].mixer.q_proj.weight.numel()  # as the layer sees it
    return {**step(model, ids, mask), "shard": shard}


CALLS = [(name, {}) for name in MODELS] + [("hybrid", {"checkpointing": True})]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_training_step_is_that_of_one_process(size, tmp_path):
    ids = text(2, 14)
    mask = (text(2, 14, seed=1) > 8).long()
    for name, options in CALLS:
        padding = mask if name == "hybrid" else None
        expected = step(make(name, **HEADS), ids, padding)
        for found in on_ranks(size, tmp_path, run, name, options, ids, padding):
            assert found.pop("shard") == 16 * 16 // size
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def refuse(mesh, _):
    two = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "heads"))
    with pytest.raises(ValueError, match="mesh: expected one dimension, got 2"):
        parallelize_heads(make("hope"), two)
    with pytest.raises(ValueError, match="expected a divisor of the 1 heads as its size, got 2"):
        parallelize_heads(make("hope", num_attention_heads=1), mesh)
    with pytest.raises(TypeError, match="expected a HopeForCausalLM, got Linear"):
        parallelize_heads(torch.nn.Linear(2, 2), mesh)
    model = parallelize_heads(make("hope"), mesh)
    with pytest.raises(ValueError, match="expected whole weights on every rank, got sharded ones"):
        parallelize_heads(model, mesh)


def test_what_is_refused(tmp_path):
    on_ranks(2, tmp_path, refuse, None)
