"""Calls of one model that run at once do not see each other."""

import functools
import threading

import pytest
import torch

from nl_models.continual import ContinuumLearner, StepRule
from nl_models.hope import HopeConfig, HopeForCausalLM
from nl_models.surgery import convert_mlp_to_continuum
from tests.nl_models.surgery.models import LEVELS, VOCABULARY, make_model, random_fast_weights


def hope_model():
    torch.manual_seed(0)
    levels = [{"hidden_size": 32, "chunk_size": c, "max_rate": 0.0} for c in (4, 8)]
    config = HopeConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        continuum_levels=levels,
    )
    return HopeForCausalLM(config).eval()


def converted_model():
    return convert_mlp_to_continuum(make_model("llama"), LEVELS)


MODELS = {"hope": hope_model, "converted": converted_model}


def meeting(barrier):
    """A hook in which threads wait for each other."""

    def hook(*_):
        barrier.wait()

    return hook


def in_threads(*functions):
    """The results of functions that run at once."""
    results = [None] * len(functions)

    def run(i):
        try:
            results[i] = functions[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_fast_weights_belong_to_a_call(family, tokens):
    converted = convert_mlp_to_continuum(make_model(family), LEVELS)
    users = [random_fast_weights(converted, len(tokens), scale) for scale in (0.1, 0.2)] + [None]

    def serve(fast):
        with torch.no_grad():
            return converted(tokens, fast_weights=fast, use_cache=False).logits

    alone = [serve(fast) for fast in users]
    # All calls meet in every attention, after each layer has been given its fast weights.
    barrier = threading.Barrier(len(users), timeout=300)
    for layer in converted.base_model.decoder_layers():
        attention = getattr(layer, converted.base_model.attention_name)
        attention.register_forward_hook(meeting(barrier))
    together = in_threads(*(lambda fast=fast: serve(fast) for fast in users))
    assert all(isinstance(got, torch.Tensor) and torch.equal(got, want) for got, want in zip(together, alone))


def layers_of(model):
    return model.model.layers


def another_call_in_every_layer(model, call):
    """Have ``call()`` run in another thread while each layer serves one."""
    busy, results = threading.Event(), []

    def interrupt(*_):
        if not busy.is_set():
            busy.set()
            results.extend(in_threads(call))
            busy.clear()

    for layer in layers_of(model):
        layer.register_forward_pre_hook(interrupt)
        (layer.mixer if hasattr(layer, "mixer") else layer.self_attn).register_forward_hook(interrupt)
    return results


@pytest.mark.parametrize("rule", ["sgd", "dgd"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_model_is_free_while_a_learner_reads(kind, rule):
    model, stream = MODELS[kind](), torch.arange(1, 21) % VOCABULARY
    other = stream.flip(0)[None, :7]
    rule = StepRule(rule=rule, rate=0.05)
    alone, beside = ContinuumLearner(model, rule), ContinuumLearner(model, rule)
    loss = alone.learn(stream).loss

    def call():
        with torch.no_grad():
            return model(other).logits

    expected = call()
    results = another_call_in_every_layer(model, call)
    assert torch.equal(beside.learn(stream).loss, loss)
    for name, change in alone.state.changes.items():
        assert torch.equal(beside.state.changes[name], change)
    assert results
    assert all(isinstance(got, torch.Tensor) and torch.equal(got, expected) for got in results)


@pytest.mark.parametrize("kind", MODELS)
def test_two_learners_read_at_once(kind):
    model = MODELS[kind]()
    streams = [torch.arange(1, 41) * step % VOCABULARY for step in (1, 3)]
    rule = StepRule(rule="dgd", rate=0.05)
    alone = [ContinuumLearner(model, rule).learn(stream).loss for stream in streams]
    barrier = threading.Barrier(2, timeout=300)
    layers_of(model)[0].register_forward_hook(meeting(barrier))
    learners = [ContinuumLearner(model, rule) for _ in streams]
    reports = in_threads(*(lambda pair=pair: pair[0].learn(pair[1]).loss for pair in zip(learners, streams)))
    assert all(isinstance(got, torch.Tensor) and torch.equal(got, want) for got, want in zip(reports, alone))


@pytest.mark.parametrize("work", ["learn", "predict", "loss", "generate"])
def test_a_learner_reads_in_evaluation_mode_and_leaves_the_models_own(work):
    model = convert_mlp_to_continuum(make_model("gpt2"), LEVELS)  # which has dropout
    learner = ContinuumLearner(model, StepRule(rate=0.05))
    stream = torch.arange(1, 21)[None] % VOCABULARY

    def do():
        learner.state = ContinuumLearner(model, StepRule(rate=0.05)).state
        options = {"max_new_tokens": 4, "do_sample": False} if work == "generate" else {}
        result = getattr(learner, work)(stream, **options)
        return result.loss if work == "learn" else result

    expected = do()
    model.train()
    modes = []
    model.transformer.h[0].register_forward_hook(lambda *_: modes.append(model.transformer.h[0].training))
    assert torch.equal(do(), expected)
    assert modes
    assert all(modes)
    assert all(part.training for part in model.modules())


def test_training_mode_below_a_patched_forward_is_refused():
    model = converted_model().train()
    model.lm_head.forward = functools.partial(torch.nn.Linear.forward, model.lm_head)
    learner = ContinuumLearner(model, StepRule(rate=0.05))
    with pytest.raises(ValueError, match=r"training mode, and lm_head \(Linear\) has a forward.*model.eval"):
        learner.learn(torch.arange(1, 9))
    assert learner.tokens_read == 0
    model.eval()
    learner.learn(torch.arange(1, 9))
