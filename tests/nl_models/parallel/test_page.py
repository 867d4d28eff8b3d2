"""The program of the page, as torchrun runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_program_runs_under_torchrun_with_the_losses_of_one_process(tmp_path):
    page = (ROOT / "docs/sequence_parallelism.md").read_text(encoding="utf-8")
    program = tmp_path / "program.py"
    # The same text whatever the number of ranks.
    program.write_text(re.search(r"```python\n(.*?)```", page, re.S).group(1).replace("32 * size", "128"))
    losses = []
    for size in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(
            [*command, program], env=environment, capture_output=True, text=True, cwd=tmp_path, check=True
        )
        assert ran.stdout.count("waited") == size
        losses.append([float(loss) for loss in re.findall(r"loss (\d\.\d+)", ran.stdout)])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)
