import pytest
from support.picture_files import noise, save
from support.text_files import LINES


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(LINES, encoding="utf-8")
    return path


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def pets(tmp_path):
    """Two classes, one nested, RGB, 6 x 5 pixels."""
    root = tmp_path / "pets"
    save(root / "dog" / "1.png", noise(5, 6, 3, seed=1))
    save(root / "dog" / "old" / "2.PNG", noise(5, 6, 3, seed=2))
    save(root / "cat" / "3.bmp", noise(5, 6, 3, seed=3))
    return root
