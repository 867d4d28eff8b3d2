"""The table of what kernels execute: every kernel of the catalogue, with nothing wrong in any launch."""

import pytest
import torch

from tools.catalogue import collect_catalogue
from tools.ptx_emulator import instructions

pytestmark = pytest.mark.compiled


@pytest.mark.parametrize("op", instructions.CALLS)
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(x, marks=pytest.mark.slow) for x in (torch.float16, torch.float32))],
)
def test_every_kernel_of_the_catalogue_is_counted(op, dtype):
    found = {}
    for what in instructions.CALLS[op]:
        found |= instructions.count(op, what, dtype)
    expected = {entry.call.kernel.__name__ for entry in collect_catalogue("sm_80") if entry.op == op}
    assert set(found) == expected
    for programs, counted in found.values():
        assert programs > 0
        assert counted["global"] > 0
        assert set(counted) <= set(instructions.CLASSES)


def test_the_table_in_the_docs_names_every_kernel_in_each_dtype():
    page = instructions.PAGE.read_text(encoding="utf-8")
    tables = page.split("### ")[1:]
    assert [table.split("\n")[0] for table in tables] == list(instructions.DTYPES)
    for entry in collect_catalogue("sm_80"):
        for table in tables:
            rows = [line for line in table.split("\n") if line.startswith(f"| {entry.op},")]
            assert any(f"| {entry.kernel} |" in row for row in rows), (entry.op, entry.kernel)
