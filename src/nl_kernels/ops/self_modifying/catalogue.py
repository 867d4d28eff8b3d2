"""What of ``self_modifying`` is compiled ahead of time: every kernel at the widths models use."""

import functools

from nl_kernels.memory.kernels.catalogue import entries

catalogue = functools.partial(entries, "self_modifying", self_made=True)
