"""Loops over chunks that ``torch.compile`` calls as they are, since a trace would unroll them.

Imported where the compiler is at work alone: PyTorch takes a second to load it.
"""

from __future__ import annotations

import torch

from nl_kernels.memory import call
from nl_kernels.ops.continuum import loop

_REASON = "{} is a loop over chunks, which a trace would unroll; without fullgraph=True it runs as it is"

learn = torch.compiler.disable(call.learn, reason=_REASON.format("the eager path of a chunked memory"))
walk_levels = torch.compiler.disable(loop.walk_levels, reason=_REASON.format("a step of continuum_memory"))
numbers = torch.compiler.disable(torch.Tensor.tolist, reason="the host must know the positions of a state")
