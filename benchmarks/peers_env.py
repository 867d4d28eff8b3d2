"""Run the benchmarks beside the peers: ``python -m benchmarks.peers_env [options of benchmarks.run]``.

The peers pin versions (of datasets, huggingface-hub) that transformers 5 cannot live with, so they get an
environment of their own, ``.venv-peers``, made once. Ours is added to it without its dependencies: the ops
need torch only. All providers are then timed in one process there.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tools.environment import LOCK, ROOT, InstallError, make

ENVIRONMENT = ROOT / ".venv-peers"
TORCH = "torch==2.13.0"
PACKAGES = (
    "numpy",
    "typer>=0.15",
    "rich>=13",
    "titans-pytorch==0.5.5",
    "nested-learning==0.2.0",
    "fla-core==0.6.0",
    "triton==3.7.1",
)
STEPS = (
    ("--constraint", str(LOCK), "pip", "setuptools"),
    # torch first and alone: a resolver that may choose takes a build for CUDA.
    (TORCH,),
    (TORCH, *PACKAGES),
    ("--no-deps", "--no-build-isolation", "--editable", str(ROOT)),
)


def main() -> int:
    """Make the environment and hand all arguments on to ``benchmarks.run`` in it; ``--help`` makes none."""
    arguments = sys.argv[1:]
    if "--help" in arguments:
        print(__doc__, flush=True)
    try:
        python = sys.executable if "--help" in arguments else make(ENVIRONMENT, STEPS)
    except InstallError as error:
        sys.exit(f"error: {error}")
    command = [str(python), "-m", "benchmarks.run", *arguments]
    # From the root, where the package ``benchmarks`` lies.
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
