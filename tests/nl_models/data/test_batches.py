"""Windows: each token of an epoch once, in an order that the step number alone determines."""

import numpy as np
import pytest
import torch

from nl_models.data.batches import TrainingBatches, validation_windows
from nl_models.data.corpus import CorpusError


def test_an_epoch_visits_every_window_once_and_epochs_differ():
    batches = TrainingBatches(np.arange(103, dtype=np.uint16), sequence_length=5, batch_size=1, seed=3)
    epochs = [
        [batches.batch(epoch * batches.windows + i)[0] for i in range(batches.windows)] for epoch in (0, 1)
    ]
    for rows in epochs:
        starts = sorted(int(row[0]) for row in rows)
        assert np.diff(starts).tolist() == [5] * (batches.windows - 1)
        assert all(torch.equal(row, torch.arange(int(row[0]), int(row[0]) + 5)) for row in rows)
    assert [int(r[0]) for r in epochs[0]] != [int(r[0]) for r in epochs[1]]


def test_a_batch_depends_on_its_number_alone_across_epoch_ends():
    tokens = np.arange(103, dtype=np.uint16)
    one = TrainingBatches(tokens, 5, 3, seed=3)
    in_order = [one.batch(i) for i in range(20)]
    other = TrainingBatches(tokens, 5, 3, seed=3)
    assert all(torch.equal(other.batch(i), in_order[i]) for i in reversed(range(20)))
    assert in_order[0].shape == (3, 5)
    assert in_order[0].dtype == torch.int64
    assert not torch.equal(TrainingBatches(tokens, 5, 3, seed=4).batch(0), in_order[0])


def test_validation_windows_are_spread_and_fixed():
    windows = validation_windows(np.arange(100, dtype=np.uint16), sequence_length=10, count=4)
    assert windows[:, 0].tolist() == [0, 30, 60, 90]
    assert validation_windows(np.arange(25), sequence_length=10, count=4).shape == (2, 10)


def test_corpora_shorter_than_the_windows_are_refused():
    with pytest.raises(CorpusError, match=r"9 training tokens are too few for windows of 5"):
        TrainingBatches(np.arange(9), 5, 1, seed=0)
    with pytest.raises(CorpusError, match="validation tokens are too few"):
        validation_windows(np.arange(9), sequence_length=10, count=1)
