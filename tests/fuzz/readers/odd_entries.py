"""Entries of a folder that are no plain files, or none of this folder's."""

import contextlib
import os
import socket


def replace_by_something(rng, path, outside):
    """A file's place is taken by what is no file of this folder."""
    path.unlink(missing_ok=True)
    way = rng.randrange(9)
    if way == 0:
        os.mkfifo(path)
    elif way == 1:
        path.symlink_to(outside)
    elif way == 2:
        path.symlink_to(path)
    elif way == 3:
        path.symlink_to(rng.choice(("/dev/zero", "/dev/random", "/dev/tty", "/proc/self/mem", "/proc/kmsg")))
    elif way == 4:
        path.mkdir()
    elif way == 5:
        bound = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):  # the path may be too long for a socket
            bound.bind(str(path))
        bound.close()
    elif way == 6:
        path.touch()
    elif way == 7:
        path.symlink_to("../" * rng.randrange(3) + "nowhere")
    else:
        with path.open("wb") as file:
            file.truncate(rng.choice((2**20, 2**33)))  # nothing but a hole
