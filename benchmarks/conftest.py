"""Options of the regression gate, ``pytest benchmarks``."""

import torch


def pytest_addoption(parser):
    parser.addoption(
        "--record-limits", action="store_true", help="write the measured ratios to benchmarks/limits.json"
    )


def pytest_configure(config):
    torch.set_num_threads(1)
