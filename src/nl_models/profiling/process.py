"""Each measurement in a process of its own, so that one's memory, or its death, is not another's."""

from __future__ import annotations

from multiprocessing.connection import Connection

import torch

from nl_models.processes import fork_server
from nl_models.profiling.measure import Measurement, Work, measure

OUT_OF_MEMORY = "out of memory"
OVER_TIME = "over the time limit"


def measure_alone(work: Work, *, time_limit: float) -> Measurement:
    """:func:`measure` in a fresh process that is ended after ``time_limit`` seconds."""
    context = fork_server(measure.__module__)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_and_send, args=(work, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(time_limit):
            return without_figures(work, OVER_TIME)
        return receiver.recv()
    except EOFError:
        # It died without a word: on Linux the kernel kills a process (-9) when memory runs out.
        process.join()
        killed = process.exitcode == -9
        return without_figures(work, OUT_OF_MEMORY if killed else f"failed: exit status {process.exitcode}")
    finally:
        process.kill()
        process.join()
        receiver.close()


def _measure_and_send(work: Work, sender: Connection) -> None:
    try:
        result = measure(work)
    except torch.OutOfMemoryError:
        result = without_figures(work, OUT_OF_MEMORY)
    except (RuntimeError, ValueError, TypeError, IndexError, OSError, MemoryError) as error:
        # The CPU allocator raises a plain RuntimeError.
        exhausted = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        result = without_figures(work, OUT_OF_MEMORY if exhausted else f"failed: {error}")
    sender.send(result)
    sender.close()


def without_figures(work: Work, status: str) -> Measurement:
    """What is said of work that came to nothing."""
    return Measurement(work.name, work.mode, work.context, status, batch=work.batch)
