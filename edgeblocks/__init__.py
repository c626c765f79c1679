"""edgeblocks: train a deep network block by block on a machine whose memory does not hold it."""
