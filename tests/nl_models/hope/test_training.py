"""Losses, gradients and mixed precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from nl_models import HopeCache, HopeConfig, HopeForCausalLM
from nl_models.hope.configuration_hope import LAYER_TYPES
from nl_models.layers.state import state_tensors


@pytest.fixture(params=LAYER_TYPES)
def kind(request):
    return request.param


def next_token_loss(model, ids):
    """In the model's dtype: the library takes its loss in fp32, too coarse for what is compared here."""
    return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model, ids):
    model.zero_grad()
    next_token_loss(model, ids).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_the_loss_is_the_mean_of_the_next_token_losses(make_model, tokens):
    model, ids = make_model("gated_delta_net"), tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    output = model(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    summed = model(ids, labels=labels, num_items_in_batch=100).loss
    torch.testing.assert_close(summed * 100, expected * (16 - 3))


def test_every_parameter_gets_a_gradient_at_its_initial_value(make_config, tokens, kind):
    torch.manual_seed(0)
    model = HopeForCausalLM(make_config(kind, memory_momentum=True)).double().train()
    for name, gradient in gradients(model, tokens(2, 25)).items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 1e-12, name


def test_gradients_are_those_of_finite_differences(make_model, tokens, kind):
    model, ids = make_model(kind, memory_momentum=True, num_hidden_layers=1), tokens(2, 11)
    found = gradients(model, ids)
    for name, parameter in model.named_parameters():
        direction = torch.randn(
            parameter.shape, dtype=parameter.dtype, generator=torch.Generator().manual_seed(1)
        )
        losses = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                losses.append(next_token_loss(model, ids))
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-6)
        difference = (losses[0] - losses[1]) / 2e-6
        expected = (found[name] * direction).sum()
        assert (difference - expected).abs() <= 1e-4 * expected.abs() + 1e-6, name


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # its new name is too new
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(make_model, tokens, kind, reentrant):
    model, ids = make_model(kind).train(), tokens(2, 13)
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for name, gradient in gradients(model, ids).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12, msg=name)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradients_flow_through_the_carried_state(make_model, tokens, kind):
    """Two segments with a state between them are the whole; replays by checkpointing write nothing."""
    model, ids = make_model(kind).train(), tokens(2, 16)
    targets = ids.roll(-1, 1)

    def loss(cuts):
        cache = HopeCache(model.config)
        logits = [model(piece, cache=cache, use_cache=True).logits for piece in ids.split(cuts, 1)]
        return F.cross_entropy(torch.cat(logits, 1).flatten(0, 1), targets.flatten())

    def backward(cuts):
        model.zero_grad()
        loss(cuts).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    whole = backward([16])
    for name, gradient in backward([7, 9]).items():
        torch.testing.assert_close(gradient, whole[name], rtol=0, atol=1e-11, msg=name)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in backward([7, 9]).items():
        torch.testing.assert_close(gradient, whole[name], rtol=0, atol=1e-11, msg=name)


def test_detach_cuts_the_graph(make_model, tokens, kind):
    model = make_model(kind).train()
    cache = HopeCache(model.config)
    first = model(inputs_embeds=torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True), cache=cache)
    assert first.cache is cache
    cache.detach()
    kept = [t for layer in cache.layers for t in state_tensors(layer.state)]
    assert kept
    assert not any(t.requires_grad for t in kept)


def test_padding_gets_no_gradient(make_model, tokens, kind):
    model = make_model(kind)
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = mask[1, 6:] = 0
    logits = model(inputs_embeds=x, attention_mask=mask).logits
    logits[mask.bool()].square().sum().backward()
    assert (x.grad[~mask.bool()] == 0).all()
    assert (x.grad[mask.bool()].abs().sum(-1) > 0).all()


def test_autocast_keeps_states_in_fp32(make_model, tokens, kind):
    model, ids = make_model(kind, dtype=torch.float32, noise=0.05).train(), tokens(2, 21)
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        cache = HopeCache(model.config)
        output = model(ids, labels=ids, cache=cache)
    output.loss.backward()
    assert abs(output.loss - exact) < 0.05
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for layer in cache.layers:
        parts = (layer.state.continuum,) if kind == "full_attention" else layer.state[1:]
        assert {t.dtype for t in state_tensors(parts)} <= {torch.float32, torch.int64}


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_sharded_training_keeps_states_in_fp32(make_model, tokens, one_process):
    """FSDP2 casts parameters and what it finds among the arguments to bf16, and shards no scalars."""
    model, ids = (
        make_model(list(LAYER_TYPES), dtype=torch.float32, noise=0.05, num_hidden_layers=4),
        tokens(2, 16),
    )
    exact = next_token_loss(model, ids)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    cache = HopeCache(model.config)
    logits = [model(piece, cache=cache).logits for piece in ids.split([7, 9], 1)]
    loss = F.cross_entropy(torch.cat(logits, 1)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    assert abs(loss - exact) < 0.05
    assert all(p.grad.to_local().isfinite().all() for p in model.parameters())
    for kind, layer in zip(LAYER_TYPES, cache.layers):
        parts = (layer.state.continuum,) if kind == "full_attention" else layer.state[1:]
        assert {t.dtype for t in state_tensors(parts)} <= {torch.float32, torch.int64}


def test_no_cache_is_made_in_training(make_model, tokens):
    model, ids = make_model("titans"), tokens(1, 4)
    assert model.train()(ids).cache is None
    assert model.eval()(ids).cache.get_seq_length() == 4
    assert model(ids, use_cache=False).cache is None


def test_a_rate_of_zero_switches_the_memory_off(make_model, tokens):
    for kind in ("titans", "self_modifying_titans"):
        model = make_model(
            kind, memory_rate_max=0.0, use_short_convolution=False, continuum_levels=[{"hidden_size": 8}]
        )
        ids = tokens(1, 12)
        other = torch.cat([tokens(1, 6, seed=5), ids[:, 6:]], 1)
        torch.testing.assert_close(model(ids).logits[:, 6:], model(other).logits[:, 6:], rtol=0, atol=0)
        remembering = copy.deepcopy(model)
        for block in remembering.model.layers:
            block.mixer.rate_max = 1.0
        assert not torch.equal(remembering(ids).logits[:, 6:], remembering(other).logits[:, 6:])


def test_a_few_steps_learn_a_constant_text(kind):
    torch.manual_seed(0)
    model = HopeForCausalLM(
        HopeConfig(
            vocab_size=11,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            layer_types=kind,
            memory_hidden_size=8,
            memory_chunk_size=4,
            continuum_levels=[{"hidden_size": 32, "chunk_size": 8}],
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    ids = torch.arange(24).remainder(7)[None].repeat(2, 1)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_through_a_carried_cache(make_model, tokens, kind, reentrant):
    """Equal gradients without reentry; with it they would be lost on the way through the cache."""
    ids = tokens(1, 12)

    def gradients(checkpointing):
        model = make_model(kind).train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        cache = HopeCache(model.config)
        sum(model(p, labels=p, past_key_values=cache).loss for p in ids.split(6, 1)).backward()
        return [p.grad for p in model.parameters()]

    if reentrant:
        with pytest.raises(ValueError, match="past_key_values: checkpointing with use_reentrant=True loses"):
            gradients(True)
        model = make_model(kind).train()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model(ids, labels=ids).loss.backward()  # without a cache nothing is lost
        with torch.no_grad():
            model(ids, past_key_values=HopeCache(model.config))
        return
    for found, expected in zip(gradients(reentrant), gradients(None), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
