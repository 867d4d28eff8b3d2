"""What a run is planned to take on several ranks, against what it takes there (gloo)."""

import gc
import json
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from typer.testing import CliRunner

from nl_models.cli import app
from nl_models.data.prepare import prepare_data
from nl_models.parallel import SequenceParallel
from nl_models.parallel.mesh import Mesh
from nl_models.processes import fork_server
from nl_models.profiling.dry_run import count_token_flops, plan_run
from nl_models.profiling.flops import count_flops
from nl_models.training.config import TrainConfig
from nl_models.training.loop import Trainer, create_run
from nl_models.training.model import build_model, build_optimizer, hope_config
from tests.nl_models.profiling.test_plan import allocated_peak

COMMON = {
    "tokenizer": "bytes", "hidden_size": 64, "layers": 2, "heads": 2, "sequence_length": 48, "batch_size": 4,
    "validation_windows": 2, "validation_fraction": 0.2, "device": "cpu", "threads": 1,
}  # fmt: skip
WIDE = {"model": "gated_delta_net", "model_options": {"continuum_levels": [{"hidden_size": 512}]}}
CASES = {
    "hope": {},
    "weights that outweigh activations": {**WIDE, "sequence_length": 8},
    "several passes": {**WIDE, "gradient_accumulation": 2},
    "a checkpoint a block": {"gradient_checkpointing": True},
    "muon": {**WIDE, "optimizer": "muon"},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(12):
        (folder / f"{i:02d}.txt").write_text("the quick brown fox jumps over the dog. " * (i + 3))
    return str(folder)


def measure(rank, file, configs, target):
    """The peaks of two steps of the trainer, each with its model and optimiser, and of the first rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    peaks = []
    for number, config in enumerate(configs):
        folder = Path(f"{target}-{number}-{rank}")
        create_run(folder, config)
        data = prepare_data(config, folder / "data")

        def steps(config=config, folder=folder, data=data):
            trainer = Trainer(folder, config, build_model(config, 257, 256), data)
            for _ in range(2):
                trainer._train_step()

        gc.collect()  # what the case before has left would be freed in this one
        peaks.append(allocated_peak(steps))
    if rank == 0:
        Path(target).write_text(json.dumps(peaks))
    dist.destroy_process_group()


def measure_sequence(rank, file, config, target):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def steps():
        model = build_model(config, 257, 256).train()
        optimizer = build_optimizer(model, config)
        parallel = SequenceParallel(model, mesh)
        ids = torch.zeros(config.batch_size, config.sequence_length // 2, dtype=torch.int64)
        for _ in range(2):
            parallel(ids, labels=ids).loss.backward()
            parallel.reduce_gradients()
            optimizer.step()
            optimizer.zero_grad()

    Path(f"{target}-{rank}").write_text(str(allocated_peak(steps)))
    dist.destroy_process_group()


def start(function, *arguments):
    fork_server("nl_models.training.loop", "nl_models.training.model")
    torch.multiprocessing.start_processes(function, arguments, 2, start_method="forkserver")


@pytest.mark.slow
def test_the_plan_is_the_peak_of_the_trainer_on_two_ranks(corpus, tmp_path):
    kinds = {"ddp": {}, "fsdp": {"fsdp": True}, "heads": {"mesh": "heads=2"}}
    configs = {
        (name, kind): TrainConfig(corpus=corpus, **{**COMMON, **options, **shared})
        for name, options in CASES.items()
        for kind, shared in kinds.items()
    }
    start(measure, tempfile.mktemp(dir=tmp_path), list(configs.values()), str(tmp_path / "peaks"))
    peaks = json.loads((tmp_path / "peaks").read_text())
    for (case, config), real in zip(configs.items(), peaks, strict=True):
        mesh = Mesh(data=2) if config.mesh is None else Mesh.parse(config.mesh)
        assert plan_run(config, mesh).rank.peak == pytest.approx(real, rel=0.05), case


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"model": "attention"}, WIDE], ids=str)
def test_the_plan_is_the_peak_of_two_ranks_that_share_a_sequence(options, tmp_path):
    config = TrainConfig(**{**COMMON, "sequence_length": 64, **options})
    start(measure_sequence, tempfile.mktemp(dir=tmp_path), config, str(tmp_path / "peak"))
    peaks = [int((tmp_path / f"peak-{rank}").read_text()) for rank in range(2)]
    found = plan_run(config, Mesh(sequence=2))
    assert found.rank.peak == pytest.approx(max(peaks), rel=0.15)


def test_what_a_rank_sends():
    config = TrainConfig(**{**COMMON, **WIDE})
    whole, sharded = (
        plan_run(TrainConfig(**{**COMMON, **WIDE, "fsdp": x}), Mesh(data=4)) for x in (False, True)
    )
    weights = 4 * whole.parameters
    assert whole.rank.sent == 2 * weights * 3 // 4  # an all-reduce
    # Gathered forward and backward, but for the root, which stays; gradients are scattered.
    root = 4 * 64 * (257 + 1)
    assert sharded.rank.sent == pytest.approx((3 * weights - root) * 3 / 4, rel=0.01)
    assert sharded.rank.parameters < 0.3 * whole.rank.parameters
    twice = plan_run(
        TrainConfig(**{**COMMON, **WIDE, "fsdp": True, "gradient_accumulation": 2}), Mesh(data=4)
    )
    assert twice.rank.sent == 2 * sharded.rank.sent
    assert plan_run(config, Mesh()).rank.sent == 0


def test_what_ranks_that_share_heads_send_and_have():
    config = TrainConfig(**{**COMMON, "heads": 4, "layers": 2, "gradient_accumulation": 2})
    one, four, eight = (
        plan_run(config, Mesh(data, heads=heads), 1.0).rank for data, heads in ((1, 1), (1, 4), (2, 4))
    )
    # Two all-reduces of [B, T, d] a block and pass, in fp32, and one of each norm behind the memories.
    norms = 2 * 16 * 4
    assert four.sent == 2 * 2 * (2 * 2 * 4 * 48 * 64 * 4 + norms) * 3 // 4
    # With half of the windows half of that, and then the gradients' mean.
    assert eight.sent == 2 * 2 * (2 * 2 * 2 * 48 * 64 * 4 + norms) * 3 // 4 + 2 * eight.gradients // 2
    assert four.parameters < one.parameters
    assert four.optimizer < one.optimizer
    assert eight.peak < four.peak < one.peak


@pytest.mark.parametrize(
    "options", [pytest.param({}, marks=pytest.mark.slow), {"model": "attention"}], ids=str
)
def test_operations_of_a_long_window_and_a_deep_model_come_from_small_ones(options):
    levels = [{"hidden_size": 24, "chunk_size": 16}, {"hidden_size": 24}]
    config = TrainConfig(**{**COMMON, "layers": 4, **options, "model_options": {"continuum_levels": levels}})
    model = hope_config(config, 257, 256)
    real = build_model(config, 257, 256)
    ids = torch.zeros(1, 112, dtype=torch.int64)
    counted = count_flops(lambda: real(input_ids=ids, labels=ids, use_cache=False).loss.backward())
    assert count_token_flops(model, 112) * 112 == pytest.approx(counted, rel=1e-9)
    assert count_token_flops(model, 112, True) > count_token_flops(model, 112)


def test_the_command_plans_a_preset_for_a_mesh(tmp_path):
    call = ["train", "--preset", "tiny", "--dry-run", "--sequence-length", "64", "--batch-size", "8"]
    output = ["--output", str(tmp_path / "run")]
    planned = CliRunner().invoke(app, [*call, *output, "--mesh", "data=4", "--fsdp"])
    assert planned.exit_code == 0, planned.output
    for said in (
        "616,660 parameters",
        "4 ranks (data=4,sequence=1), weights sharded",
        "GFLOP a token",
        "a rank sends",
    ):
        assert said in planned.output
    assert not (tmp_path / "run").exists()
    heads = CliRunner().invoke(app, [*call, "--mesh", "data=2,heads=2"])
    assert "4 ranks (data=2,sequence=1,heads=2), weights shared out by head" in heads.output
    shared = CliRunner().invoke(app, [*call, "--mesh", "data=2,sequence=4"])
    assert f"and waits {3 / (2 * 4 + 3):.0%} of a step" in shared.output  # four windows a rank, in four parts
    for options, error in (
        (["--mesh", "data=3"], "batch_size: expected a multiple of the ranks that share it (data=3)"),
        (
            ["--mesh", "sequence=3"],
            "sequence_length: expected a multiple of the ranks",
        ),
        (["--mesh", "sequence=2", "--fsdp"], "fsdp: goes with data ranks alone"),
        (["--mesh", "pipeline=2"], "mesh: expected such as data=8,sequence=4"),
        (["--mesh", "data=0"], "mesh: expected numbers of ranks from 1"),
        (["--mesh", "data=2,data=2"], "mesh: expected such as data=8,sequence=4"),
        (["--mesh", "sequence=2,heads=2"], "mesh: sequence and heads do not go together"),
        (["--mesh", "heads=3"], "heads: expected a multiple of the ranks that share it (heads=3)"),
    ):
        refused = CliRunner().invoke(app, [*call, *options])
        assert refused.exit_code == 2
        assert error in " ".join(refused.stderr.split())
    refused = CliRunner().invoke(app, ["train", *output, "--mesh", "data=2"])
    assert "has 2 ranks, but the number of processes is 1" in " ".join(refused.stderr.split())
    assert not (tmp_path / "run").exists()
