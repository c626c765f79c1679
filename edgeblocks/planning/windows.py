"""Windows of layers, which a network is trained in from the bottom up (`--method greedy`). Plain arithmetic; no torch.

The first window are the lowest layers with the stem, and a readout on top: a short network, trained end to end. Then
its lower half is frozen, as many new layers come on top, and the window is trained again, until it is the network's
top. The parts of the network are what was frozen each time, and the last window.
"""

from collections.abc import Sequence
from itertools import accumulate


def layers_in_windows(num_layers: int, window: int) -> tuple[int, ...]:
    """Layers of each part; of the last one as many as a window has.

    The window goes up by half of itself at a time, the last time by what is left.

    >>> layers_in_windows(12, 6), layers_in_windows(5, 2), layers_in_windows(7, 4), layers_in_windows(4, 4)
    ((3, 3, 6), (1, 1, 1, 2), (2, 1, 4), (4,))
    """
    stride, rest = max(1, window // 2), num_layers - window
    full = [stride] * (rest // stride)
    return (*full, *([rest % stride] if rest % stride else []), window)


def layers_so_far(layers: Sequence[int], number: int) -> tuple[int, ...]:
    """Layers of each part while window `number`, counted from 0, is trained: of the frozen ones, and of the window.

    >>> layers_so_far((3, 3, 6), 0), layers_so_far((3, 3, 6), 1), layers_so_far((3, 3, 6), 2)
    ((6,), (3, 6), (3, 3, 6))
    """
    return (*layers[:number], layers[-1])


def last_steps(steps: int, windows: int) -> tuple[int, ...]:
    """The step at which the training of each window ends, of `steps` that all make together; each has as many.

    >>> last_steps(1000, 3)
    (334, 667, 1000)
    """
    return tuple(-(-steps * (number + 1) // windows) for number in range(windows))


def latest_steps(steps: int, windows: int) -> tuple[int, ...]:
    """The same where a window is trained for as long as its loss falls: at the latest when just `look_steps` are left
    for each window above it.

    >>> latest_steps(1000, 3)
    (834, 917, 1000)
    """
    return tuple(steps - look_steps(steps, windows) * (windows - 1 - number) for number in range(windows))


def look_steps(steps: int, windows: int) -> int:
    """After so many steps each time it is looked at whether the loss still falls: a quarter of an even share.

    >>> look_steps(1000, 3)
    83
    """
    return max(1, steps // (4 * windows))


def frozen_below(layers: Sequence[int]) -> tuple[int, ...]:
    """Frozen layers below each window.

    >>> frozen_below((3, 3, 6))
    (0, 3, 6)
    """
    return (0, *accumulate(layers[:-1]))
