"""Products of Hopper run on: their operands stay, and their shared memory, until all have waited."""

import pytest

from tests.nl_kernels.planned_calls import kind_of
from tests.nl_kernels.triton_support.machine_code import (
    ASSEMBLERS,
    assemble,
    operands_overwritten,
    unordered_stores,
    written,
)
from tools.ahead_of_time import compile_call
from tools.catalogue import collect_catalogue

pytestmark = pytest.mark.aot


def listing(*lines):
    """Instructions with the addresses that the disassembler puts before them, and labels."""
    return "\n".join(
        x if x.endswith(":") else f"        /*{16 * i:04x}*/   {x} ;" for i, x in enumerate(lines)
    )


ARRIVE, WAIT = "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
FIRST = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0"
SECOND = "HGMMA.64x64x16.F32.BF16 R24, R60, gdesc[UR8], R24, gsb0"
SHARED = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"
BARRIER, STORE = "BAR.SYNC.DEFER_BLOCKING 0x0", "STS.128 [R71+UR16+0xe000], R8"


@pytest.mark.parametrize(
    "lines",
    [
        [ARRIVE, FIRST, "MOV R7, R9", WAIT, "EXIT"],
        [ARRIVE, FIRST, "@P0 IADD3 R4, P1, PT, R8, R9, RZ", WAIT, "EXIT"],
        [ARRIVE, FIRST, "LDS.128 R4, [R10]", WAIT, "EXIT"],
        [ARRIVE, FIRST, "IMAD.WIDE R2, R8, 0x4, R8", "LDSM.16.M88.4 R0, [R1]", "DADD R6, R8, R10", WAIT],
        [FIRST, SECOND, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R62, R9", WAIT, "EXIT"],
        [".L_x_0:", "MOV R5, R9", FIRST, "@P0 BRA `(.L_x_0)", WAIT, "EXIT"],
        [FIRST, "@P0 BRA `(.L_x_1)", WAIT, "EXIT", ".L_x_1:", "MOV R5, R9", WAIT, "EXIT"],
    ],
)
def test_planted_operands_that_are_overwritten(lines):
    assert operands_overwritten(listing(*lines))


@pytest.mark.parametrize(
    "lines",
    [
        [ARRIVE, FIRST, WAIT, "MOV R7, R9", "EXIT"],
        [ARRIVE, FIRST, "MOV R8, R4", "STS [R4], R5", "ISETP.GE.AND P0, PT, R4, R5, PT", WAIT, "EXIT"],
        [ARRIVE, SHARED, "MOV R4, R9", WAIT, "EXIT"],
        [FIRST, SECOND, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R4, R9", WAIT, "EXIT"],
        [FIRST, "BRA `(.L_x_1)", "MOV R4, R9", ".L_x_1:", WAIT, "EXIT"],
    ],
)
def test_operands_that_stay(lines):
    assert not operands_overwritten(listing(*lines))


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        ([SHARED, WAIT, STORE, BARRIER, "EXIT"], 1),
        ([SHARED, WAIT, "@!P0 BRA `(.L_x_1)", BARRIER, ".L_x_1:", STORE, "EXIT"], 1),
        ([".L_x_0:", STORE, SHARED, WAIT, "@P0 BRA `(.L_x_0)", "EXIT"], 1),
        ([SHARED, WAIT, "LDGSTS.E.BYPASS.128 [R19+0x8000], desc[UR22][R12.64], P4", "EXIT"], 1),
        ([SHARED, WAIT, BARRIER, STORE, "EXIT"], 0),
        ([STORE, BARRIER, SHARED, WAIT, "STG.E [R4], R8", "EXIT"], 0),
    ],
)
def test_planted_stores_after_a_wait(lines, count):
    assert len(unordered_stores(listing(*lines))) == count


def test_what_instructions_write():
    assert written("@!P0 LDG.E.64 R10, desc[UR4][R2.64]") == {10, 11}
    assert written("SHFL.BFLY PT, R5, R4, 0x10, 0x1f") == {5}
    assert written("HGMMA.64x16x8.F32.TF32 R24, gdesc[UR4], R24") == set(range(24, 32))
    assert written("CS2R R4, SRZ") == {4, 5}
    assert written("R2UR UR4, R7") == written("FSETP.GT.AND P0, PT, R4, R5, PT") == set()


QUICK = {
    "delta_memory": ("bfloat16 64x64 after", "bfloat16 128x128 after"),
    "continuum": (
        "bfloat16 8x64x1024x4096 plain hidden",
        "bfloat16 8x64x1024x4096 plain signal",
        "bfloat16 8x64x1024x4096 read and learned up",
        "bfloat16 8x64x1024x4096 read and learned down",
    ),
    "newton_schulz": ("bfloat16 24x1024x4096 gram",),
}


@pytest.mark.parametrize("assembler", ASSEMBLERS)
@pytest.mark.parametrize(
    ("op", "all_variants"),
    [(op, False) for op in QUICK]
    + [pytest.param(op, True, marks=pytest.mark.slow) for op in (*QUICK, "deep_memory", "self_modifying")],
)
def test_the_catalogue(op, all_variants, assembler, tmp_path):
    entries = [e for e in collect_catalogue("sm_90") if e.op == op]
    entries = [e for e in entries if all_variants or e.variant in QUICK[op]]
    assert entries
    found = {}
    for entry in {kind_of(e.call): e for e in entries}.values():
        compiled = compile_call(entry.call, "sm_90")
        if "wgmma.mma_async" not in compiled.asm["ptx"]:
            continue
        text = assemble(compiled.asm["ptx"], assembler, tmp_path)
        faults = operands_overwritten(text)
        if entry.call.num_warps > 4:
            faults += unordered_stores(text)
        if faults:
            found[f"{entry.kernel} {entry.variant}"] = faults
    assert not found
