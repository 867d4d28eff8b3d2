"""A program that uses all of the public API: ``make lint`` checks its types, and a test runs it.

``assert_type`` says what a type checker shows to somebody who uses these packages.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from typing_extensions import assert_type

import nl_models
from nl_kernels import (
    ContinuumClock,
    ContinuumLevel,
    ContinuumLevelState,
    ContinuumState,
    DeepMemoryState,
    DeepMemoryWeights,
    MemoryRule,
    MemoryStack,
    SelfModifyingState,
    SelfModifyingWeights,
    __version__,
    chunk_gated_delta_rule,
    continuum_clone,
    continuum_detach,
    continuum_flush,
    continuum_memory,
    continuum_mlp,
    continuum_reset,
    continuum_update,
    deep_memory,
    deep_memory_step,
    delta_memory,
    delta_memory_step,
    newton_schulz,
    optimal_coefficients,
    self_modifying_memory,
    self_modifying_memory_step,
)
from nl_models import HopeCache, HopeConfig, HopeForCausalLM, HopeModel, register
from nl_models.continual import (
    ContinuumLearner,
    LearningReport,
    LevelDistance,
    MemoryFileError,
    StepRule,
    next_token_loss_through_steps,
)
from nl_models.layers import (
    Attention,
    AttentionState,
    ContinuumMemory,
    GatedDeltaNet,
    LevelConfig,
    SelfModifyingTitans,
    ShortConvolution,
    Titans,
    detach_state,
    join_states,
    load_state,
    save_state,
    select_state,
)
from nl_models.open_model import OpenedModel, open_model
from nl_models.optim import (
    M3,
    DeepMomentum,
    DeltaGradientDescent,
    DeltaMomentum,
    MultiFrequency,
    Muon,
    split_parameters,
)
from nl_models.surgery import (
    DEFAULT_LEVELS,
    ContinuumCache,
    ConversionLevel,
    FastWeights,
    LayerFastWeights,
    convert_attention,
    convert_mlp_to_continuum,
    register_families,
)

Tensor = torch.Tensor
B, T, H, D = 1, 8, 2, 4


def tokens(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def linear_memory() -> None:
    q, k, v = (tokens(B, T, H, D) for _ in range(3))
    log_decay, erase = -torch.rand(B, T, H), torch.rand(B, T, H)
    o, state = delta_memory(q, k, v, log_decay, erase, output_final_state=True)
    assert_type(o, Tensor)
    assert_type(state, Tensor | tuple[Tensor, Tensor] | None)
    assert isinstance(state, Tensor)
    o, after = delta_memory_step(q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0], erase[:, 0], state=state)
    assert_type(after, Tensor | tuple[Tensor, Tensor])
    o, last = chunk_gated_delta_rule(q, k, v, g=log_decay, beta=erase, output_final_state=True)
    assert_type(last, Tensor | None)


def memories_of_one_rule() -> None:
    rule = MemoryRule()
    q, k, v = (tokens(B, T, H, D) for _ in range(3))
    rate, log_decay = torch.rand(B, T, H), -torch.rand(B, T, H)
    weights = DeepMemoryWeights(torch.randn(H, D, D), None)
    o, state = deep_memory(
        q, k, v, rate, log_decay, weights, chunk_size=4, rule=rule, output_final_state=True
    )
    assert_type((o, state), tuple[Tensor, DeepMemoryState | None])
    assert state is not None
    q0, k0, v0 = q[:, 0], k[:, 0], v[:, 0]
    stepped = deep_memory_step(
        q0, k0, v0, rate[:, 0], log_decay[:, 0], weights, state=state, chunk_size=4, rule=rule
    )
    assert_type(stepped, tuple[Tensor, DeepMemoryState])

    gate = DeepMemoryWeights(torch.randn(H, 1, D), None)
    five = SelfModifyingWeights(weights, weights, weights, gate, gate)
    made = self_modifying_memory(q, k, v, q, five, chunk_size=4, output_final_state=True)
    assert_type(made, tuple[Tensor, SelfModifyingState | None])
    assert made[1] is not None
    assert_type(made[1].running, MemoryStack)
    again = self_modifying_memory_step(q0, k0, v0, q0, five, state=made[1], chunk_size=4)
    assert_type(again, tuple[Tensor, SelfModifyingState])


def continuum() -> None:
    x, up, down = tokens(B, T, D), torch.randn(6, D), torch.randn(D, 6)
    level = ContinuumLevel(
        norm=torch.ones(D), up=up, down=down, chunk_size=4, rate=torch.tensor(0.1), value=torch.eye(D)
    )
    assert_type(continuum_mlp(x, up, down), Tensor)
    y, state = continuum_memory(x, [level], output_final_state=True)
    assert_type((y, state), tuple[Tensor, ContinuumState | None])
    assert state is not None
    for part in state:
        assert part is None or isinstance(part, (ContinuumLevelState, ContinuumClock))
    assert_type(continuum_flush(state, [level]), ContinuumState)
    assert_type(continuum_detach(state), ContinuumState)
    assert_type(continuum_clone(state), ContinuumState)
    assert_type(continuum_reset(state, [level]), ContinuumState)
    weight, momentum = continuum_update(down, torch.randn_like(down), rule="sgd")
    assert_type((weight, momentum), tuple[Tensor, Tensor | None])
    assert_type(newton_schulz(down), Tensor)
    assert_type(optimal_coefficients(3), tuple[tuple[float, float, float], ...])


def layers(folder: Path) -> None:
    x, width = torch.randn(2, T, 8), 8
    y, keys = Attention(width, H).forward(x, output_state=True)
    assert_type(keys, AttentionState | None)
    y, deep = Titans(width, H).forward(x, output_state=True)
    assert_type(deep, DeepMemoryState | None)
    y, modified = SelfModifyingTitans(width, H).forward(x, output_state=True)
    assert_type(modified, SelfModifyingState | None)
    y, matrix = GatedDeltaNet(width, H).forward(x, output_state=True)
    assert_type(matrix, Tensor | None)
    y, inputs = ShortConvolution(width).forward(x, output_state=True)
    assert_type(inputs, Tensor | None)
    levels = [LevelConfig(hidden_size=16, chunk_size=4)]
    y, learned = ContinuumMemory(width, levels).forward(x, output_state=True)
    assert_type(learned, ContinuumState | None)
    assert_type(y, Tensor)
    save_state(folder / "layer.safetensors", detach_state(deep))
    loaded = load_state(folder / "layer.safetensors")
    join_states([loaded, select_state(loaded, torch.tensor([1]))])


def hope(folder: Path) -> HopeForCausalLM:
    register()
    config = HopeConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    assert_type(HopeConfig.preset("tiny"), HopeConfig)
    HopeModel(config).forward(torch.arange(T)[None])
    model = HopeForCausalLM(config)
    cache = HopeCache(config)
    model.forward(torch.arange(T)[None], cache=cache, use_cache=True)
    cache.save(folder / "cache.safetensors")
    assert_type(HopeCache.load(folder / "cache.safetensors", config), HopeCache)
    assert_type(cache.num_bytes(), int)
    with contextlib.suppress(ValueError):
        assert_type(open_model(folder / "nowhere"), OpenedModel)
    return model


def optimisers(model: HopeForCausalLM) -> None:
    groups = split_parameters(model, weight_decay=0.1)
    for optimizer in (Muon(groups), M3(groups), DeltaMomentum(groups), DeepMomentum(groups)):
        assert_type(optimizer.describe(), str)
    DeltaGradientDescent(split_parameters(model, linear_only=True), model=model)
    MultiFrequency(Muon(groups, lr=1e-3), periods=[1, 4])


def learning(folder: Path) -> None:
    register_families()
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    llama = LlamaForCausalLM(config)
    assert_type(DEFAULT_LEVELS[0], ConversionLevel)
    levels = [ConversionLevel(fraction=0.5, chunk_size=4)]
    model = convert_mlp_to_continuum(llama, levels)
    assert_type(model, PreTrainedModel)
    assert_type(convert_attention(model, [1]), PreTrainedModel)
    learner = ContinuumLearner(model, StepRule(rate=0.1))
    ids = torch.randint(16, (1, 12))
    report = learner.learn(ids)
    assert_type(report, LearningReport)
    assert_type(learner.loss(ids), Tensor)
    assert_type(learner.compare(learner.fork()), list[LevelDistance])
    fast = learner.fast_weights()
    assert_type(fast, FastWeights)
    assert all(isinstance(layer, LayerFastWeights) for layer in fast.layers)
    ContinuumCache(model.config, fast)
    assert_type(next_token_loss_through_steps(model, ids, [StepRule(rate=0.1)]), Tensor)
    learner.save(folder / "memory.safetensors")
    (folder / "bad.safetensors").write_bytes(b"not a memory")
    with contextlib.suppress(MemoryFileError):
        learner.load(folder / "bad.safetensors")


def main(folder: Path) -> None:
    assert_type(__version__, str)
    assert "HopeModel" in dir(nl_models)
    linear_memory()
    memories_of_one_rule()
    continuum()
    layers(folder)
    optimisers(hope(folder))
    learning(folder)
