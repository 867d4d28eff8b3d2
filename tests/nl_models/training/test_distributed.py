"""Several processes (gloo): they train as one does, and any number of them continues what others began."""

import dataclasses
import datetime
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import load_file

from nl_models.console import Display
from nl_models.data.batches import DocumentStreams
from nl_models.data.prepare import prepare_data
from nl_models.parallel.mesh import Mesh
from nl_models.parallel.plan import messages
from nl_models.processes import fork_server
from nl_models.training.config import TrainConfig
from nl_models.training.distributed import on_first, rank, run_mesh
from nl_models.training.loop import Trainer, create_run
from nl_models.training.metrics import read_metrics
from nl_models.training.model import build_model

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def sharing(corpus):
    """Five validation windows share out unevenly, and a level's chunk does not end where a window does."""
    return TrainConfig(
        corpus=str(corpus), tokenizer="bytes", validation_fraction=0.2, steps=6, batch_size=4,
        sequence_length=16, gradient_accumulation=2, learning_rate=1e-2, warmup_steps=2, evaluate_every=3,
        validation_windows=5, checkpoint_every=2, device="cpu", threads=1, seed=7, model="gated_delta_net",
        hidden_size=16, layers=1, heads=2, carry_state=True,
        model_options={"continuum_levels": [{"hidden_size": 8, "chunk_size": 7}]},
    )  # fmt: skip


class StopAt:
    """A signal that only the last process receives."""

    def __init__(self, step, trainer, number):
        self.step, self.trainer, self.number = step, trainer, number

    def __call__(self):
        last = dist.get_world_size() - 1 if dist.is_initialized() else 0
        received = self.trainer.step == self.step and rank() == last
        if received and self.number == signal.SIGKILL:
            os.kill(os.getpid(), signal.SIGKILL)
        return received


def train(folder, config, stop_at=None, number=signal.SIGTERM):
    resumed = folder.exists()
    on_first(lambda: None)  # all have looked
    on_first(lambda: resumed or create_run(folder, config))
    on_first(lambda: bool(prepare_data(config, folder / "data")))
    data = prepare_data(config, folder / "data")
    trainer = Trainer(folder, config, build_model(config, 257, 256), data)
    if resumed:
        trainer.resume()
    display = Display(Console(file=io.StringIO()), total=config.steps, start=trainer.step, label="x")
    return trainer.run(display, StopAt(stop_at, trainer, number))


def work(number, processes, file, calls):
    torch.set_num_threads(1)
    address = {"init_method": f"file://{file}", "rank": number, "world_size": processes}
    dist.init_process_group("gloo", **address, timeout=datetime.timedelta(seconds=60))
    try:
        for call in calls:
            train(*call)
            dist.barrier()
    finally:
        dist.destroy_process_group()


def on(processes, tmp_path, *calls):
    file = tempfile.mktemp(dir=tmp_path)
    start(work, processes, processes, file, calls)


def start(function, processes, *arguments):
    fork_server("nl_models.training.loop", "nl_models.training.model")  # one import for all
    torch.multiprocessing.start_processes(function, arguments, processes, start_method="forkserver")


def losses(folder):
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl")]


def test_one_two_and_four_processes_continue_each_others_runs(sharing, tmp_path):
    sharded = dataclasses.replace(sharing, fsdp=True)
    train(tmp_path / "one", sharing)
    whole = losses(tmp_path / "one")
    assert len(whole) == 8
    assert whole[-1] < whole[0]
    # Two processes stop in the middle, by a signal to one of them.
    on(2, tmp_path, (tmp_path / "ddp", sharing, 3), (tmp_path / "fsdp", sharded, 3))
    for kind in ("ddp", "fsdp"):
        assert [r["step"] for r in read_metrics(tmp_path / kind / "metrics.jsonl")][-1] == 3
        shutil.copytree(tmp_path / kind, tmp_path / f"{kind}-on-four")
        train(tmp_path / kind, sharing)  # the one here
        assert losses(tmp_path / kind) == pytest.approx(whole, rel=1e-4)
    on(4, tmp_path, (tmp_path / "ddp-on-four", sharded), (tmp_path / "fsdp-on-four", sharing))
    weights = (tmp_path / "one" / "model" / "model.safetensors").stat().st_size
    for kind in ("ddp-on-four", "fsdp-on-four"):
        assert losses(tmp_path / kind) == pytest.approx(whole, rel=1e-4)
        assert (tmp_path / kind / "model" / "model.safetensors").stat().st_size == weights


@pytest.mark.parametrize("model", ["hope", "titans"])
def test_ranks_of_which_one_alone_has_padding_do_not_wait_for_one_another(model, sharing, tmp_path):
    """With two calls of a block in one backward pass they did, under FSDP."""
    config = dataclasses.replace(sharing, model=model, sequence_length=48)
    train(tmp_path / "one", config)
    data = prepare_data(config, tmp_path / "one" / "data").train
    streams = DocumentStreams(data, 256, 48, 4, 2, config.seed)
    padded = [[bool((streams.batch(i).lengths[own::2] < 48).any()) for own in (0, 1)] for i in range(12)]
    assert [False, True] in padded
    on(2, tmp_path, (tmp_path / "fsdp", dataclasses.replace(config, fsdp=True)))
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["hope", "attention"])
def test_ranks_that_share_windows_or_heads_train_as_one_process(model, sharing, tmp_path):
    """Started on two ranks, continued on four; then what four of another form began, by one."""
    config = dataclasses.replace(sharing, model=model, carry_state=False)
    train(tmp_path / "one", config)
    whole = losses(tmp_path / "one")
    weights = load_file(tmp_path / "one" / "model" / "model.safetensors")
    meshes = {"sequence": ("sequence=2", "data=2,sequence=2"), "heads": ("heads=2", "data=2,heads=2")}
    two, four = (
        {kind: dataclasses.replace(config, mesh=pair[i]) for kind, pair in meshes.items()} for i in (0, 1)
    )
    on(2, tmp_path, *((tmp_path / kind, mesh, 3) for kind, mesh in two.items()))
    on(4, tmp_path, *((tmp_path / kind, mesh) for kind, mesh in four.items()))
    on(4, tmp_path, *((tmp_path / f"{kind} first", mesh, 3) for kind, mesh in four.items()))
    model = build_model(config, 257, 256)
    for run, data in (("sequence", 2), ("sequence first", 2)):
        last = [r for r in read_metrics(tmp_path / run / "metrics.jsonl") if r["kind"] == "train"][-1]
        assert last["sent_bytes"] == 2 * data * sum(messages(model, 4 // data, [8, 8]))  # of two passes
        assert 0 < last["waiting"] < 1
    for kind in meshes:
        train(tmp_path / f"{kind} first", config)
        for run in (kind, f"{kind} first"):
            assert losses(tmp_path / run) == pytest.approx(whole, rel=1e-6)
            found = load_file(tmp_path / run / "model" / "model.safetensors")
            torch.testing.assert_close(found, weights, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_options_that_go_with_several_processes(fsdp, sharing, tmp_path):
    config = dataclasses.replace(
        sharing, fsdp=fsdp, precision="bf16", gradient_checkpointing=True, compile=True, optimizer="muon"
    )
    alone = dataclasses.replace(config, fsdp=False)
    start(compiled_by_aot, 1, tempfile.mktemp(dir=tmp_path), 1, ((tmp_path / "one", alone),))
    start(compiled_by_aot, 2, tempfile.mktemp(dir=tmp_path), 2, ((tmp_path / "two", config),))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-2)
    weights = load_file(tmp_path / "two" / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def compiled_by_aot(number, file, processes, calls):
    """``torch.compile`` traces and splits graphs as ever, and writes no machine code, which takes minutes."""
    compiled = torch.nn.Module.compile
    torch.nn.Module.compile = lambda module: compiled(module, backend="aot_eager")
    work(number, processes, file, calls)


@pytest.mark.slow
def test_a_killed_process_of_two_loses_nothing_behind_the_checkpoint(sharing, tmp_path):
    train(tmp_path / "one", sharing)
    ends = (torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException)
    with pytest.raises(ends, match=r"SIGKILL|Connection"):  # of the killed one, or of the one that it left
        on(2, tmp_path, (tmp_path / "killed", sharing, 5, signal.SIGKILL))
    checkpoints = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").glob("step-*"))
    assert checkpoints[-1] == "step-00000004"
    on(2, tmp_path, (tmp_path / "killed", sharing))
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


OPTIONS = [
    "--tokenizer", "bytes", "--model", "titans", "--hidden-size", "16", "--layers", "1", "--heads", "2",
    "--sequence-length", "16", "--position-length", "32", "--device", "cpu", "--threads", "1",
]  # fmt: skip
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1",
    # Otherwise a rank that starts anew may read the address that another had before, from the old store.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}  # fmt: skip


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(*arguments, launcher=TORCHRUN, fresh=True):
    command = [sys.executable, "-m", *launcher, "-m", "nl_models.train"]
    command += [*(OPTIONS if fresh else ()), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
def test_the_command_under_torchrun(corpus, tmp_path):
    options = ["--corpus", corpus, "--steps", 3, "--warmup-steps", 1]
    done = launch(*options, "--output", tmp_path / "run", "--batch-size", 2, "--fsdp")
    output, error = done.communicate()
    assert done.returncode == 0, error
    assert output.count("3/3  validation") == 1  # one of them speaks
    assert (tmp_path / "run" / "position.json").is_file()
    for mesh in ("sequence=2", "heads=2"):
        more = ["--output", tmp_path / "run", "--resume", "--no-fsdp", "--mesh", mesh]
        done = launch(*more, "--steps", {"sequence=2": 4, "heads=2": 5}[mesh], fresh=False)
        output, error = done.communicate()
        assert done.returncode == 0, error
        states = re.search(r"states +(.+) a step \(formula: (.+?)\), waiting \d+% of it", output)
        assert states is None if mesh == "heads=2" else states[1] == states[2]
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 3, 4, 4, 5, 5]
    refused = launch(*options, "--output", tmp_path / "odd", "--batch-size", 3)
    error = " ".join(refused.communicate()[1].split())
    assert refused.returncode != 0
    assert "batch_size: expected a multiple of the ranks" in error
    assert not (tmp_path / "odd").exists()


@pytest.mark.slow
def test_accelerate_and_several_nodes_start_the_same_run(corpus, tmp_path):
    pytest.importorskip("accelerate")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = ["--master-addr", "127.0.0.1", "--master-port", str(free.getsockname()[1])]
    node = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *address, "--node-rank"]
    launchers = {
        "torchrun": [TORCHRUN],
        "accelerate": [["accelerate.commands.launch", "--cpu", "--num_processes", "2"]],
        "nodes": [[*node, "0"], [*node, "1"]],
    }
    for name, launched in launchers.items():
        options = ["--corpus", corpus, "--steps", 3, "--batch-size", 2, "--output", tmp_path / name]
        for process in [launch(*options, launcher=launcher) for launcher in launched]:
            error = process.communicate()[1]
            assert process.returncode == 0, error
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "torchrun"), rel=1e-6)


@pytest.mark.slow
def test_torchrun_starts_anew_what_was_killed_and_nothing_behind_the_checkpoint_is_lost(corpus, tmp_path):
    options = ["--corpus", corpus, "--steps", 40, "--batch-size", 2, "--checkpoint-every", 4]
    elastic = [*TORCHRUN, "--max-restarts", "1"]
    killed = launch(*options, "--output", tmp_path / "killed", launcher=elastic)
    folder = tmp_path / "killed" / "checkpoints"
    while not (newest := sorted(folder.glob("step-*"))):
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.02)
    workers = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    output, error = killed.communicate()
    assert killed.returncode == 0, error
    begun = int(re.search(r"continued after step (\d+)", output)[1])
    assert int(newest[-1].name.removeprefix("step-")) <= begun < 40
    whole = launch(*options, "--output", tmp_path / "whole")
    error = whole.communicate()[1]
    assert whole.returncode == 0, error
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_an_error_of_the_first_process_is_raised_by_all(tmp_path):
    start(fail, 2, tmp_path / "rendezvous")


def fail(number, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=number, world_size=2)
    called = []

    def refuse():
        called.append(rank())
        raise FileNotFoundError(2, "no such file", "/nowhere")

    with pytest.raises(FileNotFoundError, match="/nowhere"):
        on_first(refuse)
    assert called == [0] * (number == 0)
    for options, message in (
        ({"batch_size": 3}, r"batch_size: expected a multiple of the ranks that share it \(data=2\), got 3"),
        ({"mesh": "sequence=4"}, "mesh: data=1,sequence=4 has 4 ranks, but the number of processes is 2"),
        ({"mesh": "sequence=2", "sequence_length": 9}, "sequence_length: expected a multiple"),
        ({"mesh": "heads=2", "hidden_size": 12, "heads": 3}, "heads: expected a multiple"),
        ({"mesh": "sequence=2", "fsdp": True}, "fsdp: goes with data ranks alone"),
        ({"mesh": "heads=2", "carry_state": True}, "carry_state: goes with data ranks alone"),
        ({"mesh": "sequence=2", "compile": True}, "compile: goes with data ranks alone"),
    ):
        with pytest.raises(ValueError, match=message):
            run_mesh(TrainConfig(**options))
    assert run_mesh(TrainConfig()) == Mesh(data=2)
    dist.destroy_process_group()
