"""Fashion-MNIST as an .npz that edgeblocks reads: 60,000 training and 10,000 test images of 28x28.

apt-get install dataset-fashion-mnist
python tests/bench/fashion_mnist.py fashion.npz
"""

import gzip
import sys
from pathlib import Path

import numpy as np

FOLDER = Path("/usr/share/datasets/fashion-mnist")


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes: two zero bytes, type 8, number of dimensions, big-endian sizes, data."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, dtype=">u4", count=dimensions, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def main() -> None:
    found = {path.name.split("-ubyte")[0]: path for path in FOLDER.glob("*.gz")}
    np.savez(
        sys.argv[1],
        x_train=read_idx(found["train-images-idx3"]),
        y_train=read_idx(found["train-labels-idx1"]),
        x_test=read_idx(found["t10k-images-idx3"]),
        y_test=read_idx(found["t10k-labels-idx1"]),
    )


if __name__ == "__main__":
    main()
