"""The order in which one block sees the data."""

import numpy as np

from edgeblocks.seeds import seed_at


class BatchOrder:
    """Batches of one block: a fresh permutation of the training part every epoch, found again from the step alone.

    A step's batch depends on (seed, block, step) only, so that a resumed run seeks in the time of one permutation.
    """

    def __init__(self, train: np.ndarray, *, batch: int, seed: int, block: int) -> None:
        self._train = train
        self._batch = batch
        self._position = (seed, "order", block)
        self._epoch = -1
        self._permuted = train

    def indices(self, step: int) -> np.ndarray:
        """Indices into the data set, int64 [batch], of the step that counts from 0."""
        # Batches run on over the epochs' borders, so that no example is left out and every batch is full.
        positions = np.arange(step * self._batch, (step + 1) * self._batch)
        epochs, places = np.divmod(positions, len(self._train))
        chosen = np.empty(self._batch, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = self._epoch_order(int(epoch))[places[here]]
        return chosen

    def _epoch_order(self, epoch: int) -> np.ndarray:
        # One permutation is kept: at a border two are needed in turn, and elsewhere the same one for many steps.
        if epoch != self._epoch:
            rng = np.random.default_rng(seed_at(*self._position, epoch))
            self._permuted = rng.permutation(self._train)
            self._epoch = epoch
        return self._permuted
