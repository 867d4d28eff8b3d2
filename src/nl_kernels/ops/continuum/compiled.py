"""A chunk's products as PyTorch compiles them: the element-wise work of a chunk goes into few kernels.

The functions are those of ``eager.py``. A chunk is compiled once for each shape, dtype and kind of level.
"""

from __future__ import annotations

from typing import Any

import torch

from nl_kernels.dispatch import planning
from nl_kernels.ops.continuum import eager
from nl_kernels.ops.continuum.eager import read, read_backward  # noqa: F401  alone they have nothing to fuse

IN_PLACE = False
_compiled = torch.compile(eager.learn, dynamic=False)


def learn(*arguments: Any) -> tuple:
    """See :func:`.eager.learn`."""
    return (eager.learn if planning() else _compiled)(*arguments)
