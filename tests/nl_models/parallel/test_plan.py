"""What is sent and how long ranks wait: counted, and as the formulas of the plan say."""

import time

import pytest
import torch

from nl_models.parallel import SequenceParallel, SequenceRanks, over_ranks, plan
from tests.nl_models.parallel.processes import on_ranks, pieces
from tests.nl_models.parallel.test_layers import LAYERS, D, draw, make
from tests.nl_models.parallel.test_model import make as make_model
from tests.nl_models.parallel.test_model import text


def sent_for_layers(mesh, lengths, dtype):
    ranks = SequenceRanks(mesh)
    counted = []
    for name in LAYERS:
        layer = make(name, dtype)
        x = draw(2, lengths[ranks.rank], D, seed=1, dtype=dtype).requires_grad_()
        ranks.sent.clear()
        y, _ = over_ranks(layer, x, ranks)
        y.sum().backward()
        counted.append([ranks.sent[type(layer).__name__, way] for way in ("forward", "backward")])
    ranks.finish()
    return counted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[7, 7, 7], [6, 4, 9, 5]], ids=str)
def test_bytes_are_as_the_formula_says(lengths, dtype, tmp_path):
    counted = on_ranks(len(lengths), tmp_path, sent_for_layers, lengths, dtype)
    for i, name in enumerate(LAYERS):
        layer = make(name, dtype)
        for rank, of_layers in enumerate(counted):
            expected = plan.sent_bytes(layer, 2, lengths, rank, dtype.itemsize)
            assert tuple(of_layers[i]) == expected, (name, rank)
            assert (name == "static") == (expected == (0, 0)), (name, rank)


def sent_and_waited(mesh, name, micro_batches, pause):
    """Bytes, and the share of a forward pass for which this rank waited where a block takes ``pause``."""
    model = make_model(name)
    parallel = SequenceParallel(model, mesh, micro_batches)
    ids = pieces(text(2, 7 * mesh.size()), [7] * mesh.size())[mesh.get_local_rank()]
    with torch.no_grad():
        parallel(ids)
        for block in model.model.layers:
            block.continuum.register_forward_pre_hook(lambda *_: time.sleep(pause))
        parallel.ranks.sent.clear()
        waited, start = parallel.ranks.waited, time.perf_counter()
        parallel(ids)
        share = (parallel.ranks.waited - waited) / (time.perf_counter() - start)
    return parallel.ranks.sent, share, parallel.ranks.report()


@pytest.mark.slow  # waits are measured: on a machine that does other work they are longer
@pytest.mark.parametrize(
    ("name", "size", "micro_batches"), [("hope", 2, 2), ("titans", 4, 1), ("gated_delta_net", 4, 1)]
)
def test_idle_share_of_the_last_rank(name, size, micro_batches, tmp_path):
    found = on_ranks(size, tmp_path, sent_and_waited, name, micro_batches, 0.5)
    expected = plan.idle_share(make_model(name), size, micro_batches)
    assert expected == pytest.approx({"hope": 1 / 5, "titans": 3 / 5, "gated_delta_net": 0}[name])
    assert found[-1][1] == pytest.approx(expected, abs=0.15)
    assert found[0][1] < 0.05  # no rank waits for a later one
    assert "rank 0 of" in found[0][2]
    assert f"{found[0][0]['ShortConvolution', 'forward']:,} bytes forward  ShortConvolution" in found[0][2]


def test_the_command(capsys):
    plan.main("340m", "self_modifying_titans", 8, 1, "128K", 1)
    printed = " ".join(capsys.readouterr().out.split())
    # 24 blocks: a convolution's 3 tokens of 1,024 channels; snapshot and running weights of five memories of
    # 16 heads of 64, three square and two of one row; a level of two matrices of 1,024 x 2,560; all in fp32.
    memory = 24 * (2 * 16 * (3 * 64 * 64 + 2 * 64) * 4 + 8) / 1e6
    assert f"ShortConvolution {24 * 3 * 1024 * 4 / 1e6:.2f}" in printed
    assert f"SelfModifyingTitans {memory:.2f}" in printed
    assert f"ContinuumMemory {24 * 2 * 1024 * 2560 * 4 / 1e6:.2f}" in printed
    assert f"idle: {7 / 31:.1%}" in printed


def test_the_command_refuses_what_it_cannot_divide(capsys):
    for ranks, length, argument in ((0, "128K", "ranks"), (3, "128K", "length"), (8, "some", "length")):
        with pytest.raises(SystemExit):
            plan.main("340m", "titans", ranks, 1, length, 1)
        assert f"error: {argument}: expected" in capsys.readouterr().err
