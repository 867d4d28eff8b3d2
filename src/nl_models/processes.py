"""Processes that start in milliseconds, and how many can run at once."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext


def fork_server(*modules: str) -> ForkServerContext:
    """Context of processes forked from a server, which the first call starts with ``modules`` imported.

    They have no threads, no CUDA context and no memory left over from the caller's work.
    Older Pythons do not tell the server this process's module path; it then imports nothing and says nothing,
    and every process would begin with seconds of imports. So the path goes along in the environment.
    """
    forkserver.set_forkserver_preload(list(modules))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return multiprocessing.get_context("forkserver")


def available_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
