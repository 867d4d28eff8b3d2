"""Make constraints.txt, the versions of all that ``make install`` brings: ``python -m tools.lock``.

`uv pip compile --universal` resolves once for all platforms and Pythons, with markers where versions differ.
(pip-tools resolves for the Python that it runs on.) It reads no wheels, only their metadata: which build of
torch is installed is pip's affair.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from nl_models.files import write_bytes
from tools.environment import LOCK, ROOT

HEADER = """\
# Made by `make lock` (uv pip compile --universal) from setup.py and constraints.in; do not edit.
# Every package that `make install` brings, for Python 3.10 and later. CUDA's packages are not here: torch's
# CUDA build pins them itself, and its CPU build has none.
"""
_CUDA = re.compile(r"(nvidia|cuda)-")


def main() -> None:
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    options = "--quiet --universal --python-version 3.10 --no-python-downloads --upgrade --no-annotate"
    inputs = "--no-header --extra dev --extra docs --constraint constraints.in setup.py"
    command = [uv, "pip", "compile", *options.split(), *inputs.split()]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit("error: no set of versions found (uv's message is above); constraints.txt is as it was")
    kept = [line for line in result.stdout.splitlines() if not _CUDA.match(line)]
    write_bytes(LOCK, (HEADER + "\n".join(kept) + "\n").encode())
    print(f"{LOCK}: {len(kept)} lines; 'make install' brings them")


if __name__ == "__main__":
    main()
