"""Which rung of the ladder runs in this process, and what is watched where kernels are interpreted."""

import os
import zlib

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    # One thread: the tests share the machine, and oversubscription costs more than it gives at these sizes.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    interpreting = os.environ.get("TRITON_INTERPRET", "0") == "1"
    reasons = {
        "slow": None if config.getoption("--slow") else "takes minutes: run with --slow",
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "interpreter": None if interpreting else "needs TRITON_INTERPRET=1",
        "aot": "cannot share a process with the Triton interpreter" if interpreting else None,
        "compiled": "cannot share a process with the Triton interpreter" if interpreting else None,
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _watch_for_races(request):
    """Every kernel that a test interprets is looked at for what only a GPU would show."""
    if not request.node.get_closest_marker("interpreter"):
        yield
        return
    from tools.race_detector import detect_races

    with detect_races():
        yield


@pytest.fixture(autouse=True)
def _fill_uninitialised_memory(request):
    """Kernels run on memory full of NaN: what a buffer held before must not matter."""
    if not any(request.node.get_closest_marker(name) for name in ("interpreter", "compiled")):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)  # with it PyTorch fills what is not written
    assert torch.empty(()).isnan(), "torch.utils.deterministic.fill_uninitialized_memory is off"
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def emulated(request):
    """Kernels run as compiled, on CPU tensors; yields the launches so far, with which nothing may be wrong.

    Each launch runs twice, in lockstep and in an order of warps and programs that the test's name draws.
    ``@pytest.mark.compiled(but=…)`` names what may be found all the same.
    """
    from tools.ptx_emulator.driver import emulated

    with emulated(seed=zlib.crc32(request.node.nodeid.encode())) as launches:
        yield launches
    assert launches
    allowed = request.node.get_closest_marker("compiled").kwargs.get("but")
    found = [f"{x.kernel}: {line}" for x in launches for line in x.findings]
    assert not [line for line in found if allowed is None or allowed not in line]
