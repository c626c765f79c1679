"""Writing in folders that may hold links."""

import os

import pytest

from edgeblocks.files import own
from edgeblocks.files.durable import write_atomically


@pytest.fixture
def victim(tmp_path):
    """A file outside, and a folder of ours with a link to it: (victim, name of ours)."""
    (tmp_path / "outside").write_text("my only copy")
    (tmp_path / "ours").mkdir()
    name = tmp_path / "ours/name"
    name.symlink_to(tmp_path / "outside")
    yield tmp_path / "outside", name
    assert (tmp_path / "outside").read_text() == "my only copy"


def test_a_new_file_takes_the_place_of_a_link(victim):
    """What the link led to is untouched, and the name is a file of its own."""
    _, name = victim
    with own.create(name) as file:
        file.write(b"new")
    assert name.read_bytes() == b"new"
    assert not name.is_symlink()


def test_a_temporary_name_that_is_a_link_is_not_written_through(victim, tmp_path):
    """The name of a file on its way can be foreseen."""
    outside, _ = victim
    (tmp_path / f"ours/.plan.json.{os.getpid()}.tmp").symlink_to(outside)
    write_atomically(tmp_path / "ours/plan.json", [b"{}"])
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["name", "plan.json"]


def test_nothing_is_added_to_what_a_link_leads_to(victim):
    """Neither to a link nor to a second name of a file, and a pipe is not waited for."""
    outside, name = victim
    with pytest.raises(OSError, match="it is a link"):
        own.append(name, b"x")
    name.unlink()
    name.hardlink_to(outside)
    with pytest.raises(OSError, match="another name elsewhere"):
        own.append(name, b"x")
    name.unlink()
    os.mkfifo(name)
    with pytest.raises(OSError, match=r"no file|No such device"):
        own.append(name, b"x")


def test_a_link_to_a_folder_is_no_folder_of_ours(tmp_path):
    """A folder that is there already is; a link to one is refused."""
    own.make_folder(tmp_path / "a/b")
    own.make_folder(tmp_path / "a/b")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="it is a link"):
        own.make_folder(tmp_path / "link")
