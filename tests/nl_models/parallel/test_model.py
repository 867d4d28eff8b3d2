"""A whole Hope over ranks is the model in one process: logits, loss, every gradient, what it carries on."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nl_models import HopeCache, HopeConfig, HopeForCausalLM
from nl_models.parallel import SequenceParallel
from tests.nl_models.parallel.processes import on_ranks, pieces

LEVELS = [
    {"hidden_size": 12, "chunk_size": 3},
    {"hidden_size": 10, "chunk_size": 6, "rule": "momentum"},
    {"hidden_size": 14},
]
STATIC = {"continuum_levels": [{"hidden_size": 14}]}
MODELS = {
    "hope": {"layer_types": "self_modifying_titans"},
    "gated_delta_net": {"layer_types": "gated_delta_net", **STATIC},
    "titans": {"layer_types": "titans", "memory_momentum": True, "continuum_variant": "nested"},
    "attention": {"layer_types": "full_attention", "use_short_convolution": False, **STATIC},
    "hybrid": {"layer_types": ["gated_delta_net", "self_modifying_titans", "full_attention", "titans"]},
}


def make(name, dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {"continuum_levels": LEVELS, **MODELS[name], **options}
    layer_types = options["layer_types"]
    config = HopeConfig(
        vocab_size=37,
        hidden_size=16,
        num_hidden_layers=2 if isinstance(layer_types, str) else len(layer_types),
        num_attention_heads=options.pop("num_attention_heads", 2),
        memory_chunk_size=4,
        memory_generator_chunk_size=2,
        memory_hidden_size=6,
        **options,
    )
    model = HopeForCausalLM(config).to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.loss_function = own_loss
    return model


def own_loss(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None):
    """The library's, which would round logits to fp32."""
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:] if shift_labels is None else shift_labels
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return loss / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def text(batch, length, seed=0):
    return torch.randint(0, 37, (batch, length), generator=torch.Generator().manual_seed(seed))


def run_model(mesh, name, options, call):
    """Of this rank: logits, its share of the loss, and all gradients after their sum over the ranks."""
    model = make(name, options.get("dtype", torch.float64))
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parallel = SequenceParallel(model, mesh, options.get("micro_batches", 1))
    mine = {key: pieces(x, options["lengths"])[parallel.ranks.rank] for key, x in call.items()}
    output = parallel(**mine)
    output.loss.backward()
    parallel.reduce_gradients()
    return output.logits.detach(), output.loss.detach(), [p.grad for p in model.parameters()]


def check(folder, name, lengths, batch=2, tolerance=1e-9, ignored=0, padded=False, **options):
    ids = text(batch, sum(lengths))
    labels = ids.clone()
    labels[:, :ignored] = -100
    call = {"input_ids": ids, "labels": labels}
    if padded:
        call["attention_mask"] = (text(batch, sum(lengths), seed=1) > 8).long()
    options = {"lengths": lengths, **options}
    found = on_ranks(len(lengths), folder, run_model, name, options, call)
    model = make(name, options.get("dtype", torch.float64))
    whole = model(**call)
    whole.loss.backward()
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(torch.cat([piece[0] for piece in found], 1), whole.logits.detach(), **close)
    torch.testing.assert_close(sum(piece[1] for piece in found), whole.loss.detach(), **close)
    for piece in found:
        torch.testing.assert_close(piece[2], [p.grad for p in model.parameters()], **close)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_are_those_of_one_process(name, size, tmp_path):
    check(tmp_path, name, [7] * size)


@pytest.mark.parametrize("name", ["hope", "hybrid"])
def test_single_precision(name, tmp_path):
    check(tmp_path, name, [8, 8], dtype=torch.float32, tolerance=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batches": 2, "batch": 3},
        {"checkpointing": True, "micro_batches": 2},
        {"padded": True},
        {"ignored": 9},  # the first rank has no target at all
    ],
    ids=str,
)
def test_with_what_training_brings(options, tmp_path):
    check(tmp_path, "hybrid", [7, 1, 8], **options)


def read_on(mesh, name, ids, masks):
    """Three pieces of a stream, each over the ranks; the cache is with the first."""
    model = make(name).eval()
    parallel = SequenceParallel(model, mesh, 2 if masks is None else 1)
    cache = HopeCache(model.config) if parallel.ranks.rank == 0 else None
    logits = []
    for part, mask in zip(ids.chunk(3, 1), masks.chunk(3, 1) if masks is not None else [None] * 3):
        mine = [None if x is None else x.chunk(mesh.size(), 1)[parallel.ranks.rank] for x in (part, mask)]
        with torch.no_grad():
            logits.append(parallel(mine[0], attention_mask=mine[1], cache=cache).logits)
    return logits, cache


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["hope", "hybrid", "gated_delta_net"])
def test_a_stream_goes_on_from_the_cache_of_the_first_rank(name, padded, tmp_path):
    ids = text(2, 42)
    masks = (text(2, 42, seed=1) > 8).long() if padded else None
    found = on_ranks(2, tmp_path, read_on, name, ids, masks)
    model = make(name).eval()
    with torch.no_grad():
        whole = model(ids, attention_mask=masks, use_cache=True)
        read = [torch.cat(parts, 1) for parts in zip(*(logits for logits, _ in found))]
        torch.testing.assert_close(torch.cat(read, 1), whole.logits, rtol=1e-9, atol=1e-9)
        assert found[1][1] is None
        cache = found[0][1]
        assert cache.get_seq_length() == 42
        assert torch.equal(cache.layers[0].tokens, whole.cache.layers[0].tokens)
        # It goes on in one process as that of one process does, with the whole mask, too.
        following = text(2, 5, seed=2)
        mask = None if masks is None else torch.cat([masks, torch.ones(2, 5, dtype=torch.int64)], 1)
        expected = model(following, attention_mask=mask, cache=whole.cache).logits
        torch.testing.assert_close(model(following, attention_mask=mask, cache=cache).logits, expected)


def gradients_with_frozen_weights(mesh, lengths):
    model = make("hybrid")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2" in name)
    rank = mesh.get_local_rank()
    parallel = SequenceParallel(model, mesh)
    ids = pieces(text(2, sum(lengths)), lengths)[rank]
    parallel(ids, labels=ids).loss.backward()
    parallel.reduce_gradients()
    return [p.grad for p in model.parameters() if p.requires_grad]


def test_frozen_weights_leave_no_rank_waiting(tmp_path):
    found = on_ranks(2, tmp_path, gradients_with_frozen_weights, [7, 7])
    model = make("hybrid")
    ids = text(2, 14)
    model(ids, labels=ids).loss.backward()
    expected = [p.grad for name, p in model.named_parameters() if "layers.2" in name]
    for gradients in found:
        torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-9)


def gradients_beside_data_parallelism(_, rows):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    row, rank = mesh["data"].get_local_rank(), mesh["sequence"].get_local_rank()
    model = make("hybrid")
    parallel = SequenceParallel(model, mesh["sequence"])
    mine = rows[row : row + 1].chunk(2, 1)[rank]
    parallel(mine, labels=mine).loss.backward()
    parallel.reduce_gradients()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad, group=mesh["data"].get_group())
    return [p.grad / 2 for p in model.parameters()]


def test_beside_data_parallelism(tmp_path):
    """A rank of the sequence is not always that of the world."""
    rows = text(2, 14)
    found = on_ranks(4, tmp_path, gradients_beside_data_parallelism, rows)
    model = make("hybrid")
    model(rows, labels=rows).loss.backward()
    for gradients in found:
        torch.testing.assert_close(gradients, [p.grad for p in model.parameters()], rtol=1e-9, atol=1e-9)


def messages_of_bad_calls(mesh):
    model, rank = make("hope"), mesh.get_local_rank()
    parallel, many = SequenceParallel(model, mesh), SequenceParallel(model, mesh, 1 + rank)
    own = HopeCache(model.config)
    foreign = HopeCache(make("titans").config)
    sharded = make("attention")
    fully_shard(sharded, mesh=mesh)
    calls = [
        lambda: SequenceParallel(sharded, mesh),
        lambda: parallel(text(2 + rank, 4)),
        lambda: parallel(text(2, 4 * (1 - rank))),
        lambda: parallel(text(2, 4), labels=text(2, 4 + rank)),
        lambda: parallel(text(2, 4), labels=text(2, 4) if rank else None),
        lambda: parallel(text(2, 4), attention_mask=text(2, 4 + rank)),
        lambda: parallel(text(2, 4)[0] if rank else text(2, 4)),
        lambda: parallel(text(2, 4), cache=own if rank else None),
        lambda: parallel(text(2, 4), cache=None if rank else foreign),
        lambda: many(text(2, 4)),
        lambda: SequenceParallel(model, mesh, 3)(text(2, 4)),
        lambda: SequenceParallel(model, init_device_mesh("cpu", (1, 2))),
        lambda: SequenceParallel(model, mesh, 0),
    ]
    found = []
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        found.append(str(error.value))
    parallel(text(2, 4))  # nothing is left over that another call would receive
    return found


def test_errors_come_on_all_ranks_and_name_the_argument(tmp_path):
    first, second = on_ranks(2, tmp_path, messages_of_bad_calls)
    assert first == second
    starts = [
        "model: expected whole weights",
        "expected pieces of the same",
        "expected a piece of at least one token",
    ]
    starts += ["labels: expected shape", "labels: expected on all", "attention_mask: ", "input_ids: "]
    starts += ["cache: expected on the first rank", "cache: this HopeCache", "micro_batches: differs"]
    starts += ["micro_batches: 3, but the batch has 2", "mesh: expected one dimension", "micro_batches: "]
    for message, start in zip(first, starts, strict=True):
        assert message.startswith(start), (message, start)


def test_another_model_is_refused():
    with pytest.raises(TypeError, match="model: expected a HopeForCausalLM, got Linear"):
        SequenceParallel(torch.nn.Linear(2, 2), None)
