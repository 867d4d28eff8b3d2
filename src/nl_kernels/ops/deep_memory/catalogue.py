"""What of ``deep_memory`` is compiled ahead of time: every kernel at the widths models use."""

import functools

from nl_kernels.memory.kernels.catalogue import entries

catalogue = functools.partial(entries, "deep_memory", self_made=False)
