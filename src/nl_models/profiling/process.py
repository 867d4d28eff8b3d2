"""Each measurement in a process of its own, so that one's memory, or its death, is not another's."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.connection import Connection

import torch

from nl_models.profiling.measure import Measurement, Work, measure

OUT_OF_MEMORY = "out of memory"
OVER_TIME = "over the time limit"


def measure_alone(work: Work, *, time_limit: float) -> Measurement:
    """:func:`measure` in a fresh process that is ended after ``time_limit`` seconds.

    The process is forked from a server that has imported this package and done nothing else: it starts in
    milliseconds, with no threads, no CUDA context and no memory left over from earlier work.
    """
    context = multiprocessing.get_context("forkserver")
    _start_server()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_and_send, args=(work, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(time_limit):
            return _without_figures(work, OVER_TIME)
        return receiver.recv()
    except EOFError:
        # It died without a word: on Linux the kernel kills a process (-9) when memory runs out.
        process.join()
        killed = process.exitcode == -9
        return _without_figures(work, OUT_OF_MEMORY if killed else f"failed: exit status {process.exitcode}")
    finally:
        process.kill()
        process.join()
        receiver.close()


def _start_server() -> None:
    """Start the server, once, with this package imported in it.

    Older Pythons do not tell the server this process's module path; it then imports nothing and says nothing,
    and every measurement would begin with seconds of imports. So the path goes along in the environment.
    """
    forkserver.set_forkserver_preload([measure.__module__])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _measure_and_send(work: Work, sender: Connection) -> None:
    try:
        result = measure(work)
    except torch.OutOfMemoryError:
        result = _without_figures(work, OUT_OF_MEMORY)
    except (RuntimeError, ValueError, MemoryError) as error:
        # The CPU allocator raises a plain RuntimeError.
        exhausted = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        result = _without_figures(work, OUT_OF_MEMORY if exhausted else f"failed: {error}")
    sender.send(result)
    sender.close()


def _without_figures(work: Work, status: str) -> Measurement:
    return Measurement(work.name, work.mode, work.context, status)
