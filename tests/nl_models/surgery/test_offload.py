"""Parameters that accelerate brings when a module is called: offloaded to memory or disk, or dispatched."""

import pytest
import torch

from nl_models.hope import HopeConfig, HopeForCausalLM
from nl_models.surgery import convert_attention, convert_mlp_to_continuum
from tests.nl_models.surgery.models import LEVELS, VOCABULARY, make_model, random_fast_weights

accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")

CPU = torch.device("cpu")


def hope(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return HopeForCausalLM(HopeConfig(**sizes, **options)).eval()


def converted(family):
    return lambda: convert_mlp_to_continuum(make_model(family), LEVELS)


MODELS = {
    "default Hope": hope,
    "Hope, independent levels": lambda: hope(continuum_variant="independent"),
    "Hope of titans": lambda: hope(layer_types=["titans", "gated_delta_net"]),
    "hybrid Hope": lambda: hope(layer_types=["full_attention", "self_modifying_titans"]),
    "Llama": converted("llama"),
    "GPT-2": converted("gpt2"),
    "GPT-NeoX": converted("gpt_neox"),
    "Llama with memories": lambda: convert_attention(make_model("llama"), [0]),
    "Llama with deltas": lambda: convert_attention(make_model("llama"), [1], "delta_memory"),
}


def dispatched(model, folder):
    """The second block on the disk, all else in memory."""
    prefix = model.base_model_prefix
    places = {name: "cpu" for name, _ in model.named_children() if name != prefix}
    for name, child in model.base_model.named_children():
        if isinstance(child, torch.nn.ModuleList):
            places |= {f"{prefix}.{name}.0": "cpu", f"{prefix}.{name}.1": "disk"}
        else:
            places[f"{prefix}.{name}"] = "cpu"
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


WAYS = {
    "memory": lambda model, folder: accelerate.cpu_offload(model, CPU),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, CPU),
    "dispatched": dispatched,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_an_offloaded_model_gives_what_it_gave(kind, way, tokens, tmp_path):
    model = MODELS[kind]()
    fast = None
    if getattr(model.config, "continuum_levels", None) and not isinstance(model, HopeForCausalLM):
        fast = random_fast_weights(model, len(tokens))
    options = {} if fast is None else {"fast_weights": fast}
    longer = tokens.repeat(1, 8)  # several chunks
    with torch.no_grad():
        expected = model(longer, **options).logits
        generated = model.generate(tokens, max_new_tokens=4, do_sample=False)
        model = WAYS[way](model, str(tmp_path))
        assert any(p.is_meta for p in model.parameters())
        assert torch.equal(model(longer, **options).logits, expected)
        assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False), generated)
        if fast is not None:
            empty = model.initial_fast_weights(len(tokens))
            assert torch.equal(model(longer, fast_weights=empty).logits, model(longer).logits)
    assert all(p.is_meta for n, p in model.named_parameters() if way == "memory")


def test_steps_on_the_rest_of_a_text_of_an_offloaded_hope(tokens):
    model = hope()
    with torch.no_grad():
        expected = model.model.layers[0].continuum
        state = model(tokens, use_cache=True).past_key_values.layers[0].state.continuum
        want = expected.flush(state)
        accelerate.cpu_offload(model, CPU)
        got = model.model.layers[0].continuum.flush(state)
    assert repr(got) == repr(want)
