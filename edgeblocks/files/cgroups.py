"""Control groups (Linux): the limits that a container or a service manager sets on this process, versions 1 and 2."""

import contextlib
from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")
"""Where control groups are mounted."""
OWN_GROUPS = Path("/proc/self/cgroup")
"""Which of them this process belongs to."""


def memory_limit_bytes(cgroups: Path = CGROUPS, own_groups: Path = OWN_GROUPS) -> int | None:
    """The smallest memory limit that binds this process; None without one."""
    names = ("memory.max", "memory.limit_in_bytes")
    limits = [number_in(folder / name) for folder in group_folders("memory", cgroups, own_groups) for name in names]
    return min((limit for limit in limits if limit is not None), default=None)


def group_folders(controller: str, cgroups: Path, own_groups: Path) -> list[Path]:
    """Folders of this process's control group and of all groups around it, for versions 1 and 2.

    In a container the path in `own_groups` is often the host's and leads nowhere: then only the top is there.
    """
    folders = [cgroups, cgroups / controller]
    with contextlib.suppress(OSError):
        for line in own_groups.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            tops = {"": (cgroups, cgroups / "unified"), controller: (cgroups / controller,)}.get(controllers, ())
            path = PurePosixPath(group.lstrip("/"))
            if ".." not in path.parts:
                folders += [top / part for top in tops for part in (path, *path.parents)]
    return list(dict.fromkeys(folders))


def number_in(file: Path) -> int | None:
    """The whole number that a file holds; None for `max`, and when there is no such file."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
