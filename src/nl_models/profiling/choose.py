"""What the command is to measure, from what it was asked for: names, presets and folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nl_kernels.checks import check_choice
from nl_models.hope import HopeConfig
from nl_models.hope.baseline import mixer_baseline
from nl_models.open_model import open_model
from nl_models.profiling.subjects import LAYERS, ConfiguredModel, LayerAlone, SavedModel, Source
from nl_models.training.config import TrainConfig
from nl_models.training.model import hope_config

MODELS = ("hope", "titans", "gated_delta_net", "attention", "transformer")
_ATTENTION = {
    "attention": "hope-attention",
    "transformer": "transformer",
}  # and what they are called in results


@dataclass(frozen=True)
class Sizes:
    """Of models that are neither saved nor a preset, and of layers."""

    hidden_size: int = 256
    layers: int = 2
    heads: int = 4
    vocab_size: int = 1024


def choose_sources(
    *,
    model: str | None = None,
    config: str | None = None,
    layer: str | None = None,
    models: str | None = None,
    baseline: str | None = None,
    sizes: Sizes = Sizes(),
) -> tuple[dict[str, Source], str | None]:
    """What is measured, by name, and which of the names is the baseline.

    Args:
        model: folder of one, see :func:`nl_models.open_model.open_model`.
        config: a preset of :class:`HopeConfig`.
        layer: of :data:`LAYERS`.
        models: comma-separated, of :data:`MODELS`. At most one of these four; none: ``"hope,attention"``.
        baseline: see the command; ``None``: by default attention.
        sizes: of layers and of ``models``.

    Raises:
        ValueError: several of the four, or a name that is none.
    """
    asked = {"model": model, "config": config, "layer": layer, "models": models}
    given = [f"--{name}" for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[1]}: {given[0]} says already what is measured; give one of them")
    if layer is not None:
        return _layers(layer, baseline, sizes)
    if model is not None:
        opened = open_model(model).model.config
        known = opened if isinstance(opened, HopeConfig) else None
        return _with_baseline(Path(model).resolve().name, SavedModel(model), known, baseline)
    if config is not None:
        chosen = HopeConfig.preset(config)
        return _with_baseline("hope", ConfiguredModel(config_arguments(chosen)), chosen, baseline)
    if baseline is not None:
        raise ValueError("baseline: of --model, --config or --layer; --models names all that is measured")
    names = [name.strip() for name in (models or "hope,attention").split(",") if name.strip()]
    sources: dict[str, Source] = {}
    for name in names:
        check_choice("models", name, MODELS)
        asked_for = TrainConfig(
            model="hope" if name in _ATTENTION else name,
            hidden_size=sizes.hidden_size,
            layers=sizes.layers,
            heads=sizes.heads,
        )
        made = hope_config(asked_for, sizes.vocab_size, separator_id=0)
        chosen = _attention(name, made) if name in _ATTENTION else made
        sources[_ATTENTION.get(name, name)] = ConfiguredModel(config_arguments(chosen))
    against = [name for name in sources if name in _ATTENTION.values()]
    return sources, against[0] if against and len(sources) > 1 else None


def config_arguments(config: HopeConfig) -> dict:
    """The arguments that make an equal config: plain data, for another process or a JSON file."""
    defaults = HopeConfig()
    return {
        name: getattr(config, name)
        for name in HopeConfig.__annotations__
        if getattr(config, name) != getattr(defaults, name)
    }


def _layers(layer: str, baseline: str | None, sizes: Sizes) -> tuple[dict[str, Source], str | None]:
    check_choice("layer", layer, LAYERS)
    if baseline is None:
        baseline = {"continuum": "mlp", "mlp": "none", "attention": "none"}.get(layer, "attention")
    check_choice("baseline", baseline, (*LAYERS, "none"))
    names = [layer] if baseline in (layer, "none") else [layer, baseline]
    sources: dict[str, Source] = {
        name: LayerAlone(name, hidden_size=sizes.hidden_size, heads=sizes.heads) for name in names
    }
    return sources, baseline if len(names) > 1 else None


def _with_baseline(
    name: str, source: Source, config: HopeConfig | None, baseline: str | None
) -> tuple[dict[str, Source], str | None]:
    """``config``: of the source, if it is a Hope."""
    if baseline is None:
        only_attention = config is not None and set(config.layer_types) == {"full_attention"}
        baseline = "none" if config is None or only_attention else "attention"
    if baseline == "none":
        return {name: source}, None
    other: Source
    if baseline not in MODELS[1:]:
        if not Path(baseline).is_dir():
            raise ValueError(f"baseline: expected 'none', a folder or one of {MODELS[1:]}, got {baseline!r}")
        called, other = Path(baseline).resolve().name, SavedModel(baseline)
    elif config is None:
        raise ValueError(f"baseline: {baseline!r} is made for a Hope; beside another model give a folder")
    elif baseline in _ATTENTION:
        called = _ATTENTION[baseline]
        other = ConfiguredModel(config_arguments(_attention(baseline, config)))
    else:
        called = baseline
        other = ConfiguredModel({**config_arguments(config), "layer_types": baseline})
    called = f"{called} (baseline)" if called == name else called
    return {name: source, called: other}, called


def _attention(name: str, config: HopeConfig) -> HopeConfig:
    return mixer_baseline(config, same_blocks=name == "attention")
