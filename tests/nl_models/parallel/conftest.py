"""The server that ranks are forked from imports everything once, before the first test."""

import pytest

from nl_models.processes import fork_server


@pytest.fixture(scope="session", autouse=True)
def _server_of_ranks():
    process = fork_server("nl_models.parallel", "torch.distributed.device_mesh").Process(target=print)
    process.start()
    process.join()
