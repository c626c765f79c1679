"""The tokens' codes: unit rows, all different, the same for ever."""

import weakref

import numpy as np
import pytest

from edgeblocks.diffusion.codebook import check_codes, code_rows
from edgeblocks.errors import ConfigError


@pytest.mark.parametrize(("vocabulary", "width"), [(7, 8), (27, 64), (50_000, 64), (300, 768)])
def test_rows_have_unit_norm_and_are_all_different(vocabulary, width):
    """Trap 4: the target and every mean of rows lie in the unit ball; no two tokens share a code."""
    rows = code_rows(vocabulary, width)
    assert rows.shape == (vocabulary, width) and rows.dtype == np.float32
    np.testing.assert_allclose((rows**2).sum(1), 1, rtol=1e-5)
    assert len(np.unique(rows, axis=0)) == vocabulary


def test_rows_are_nearly_orthogonal():
    """Their products have the standard deviation 1 / sqrt(width) of random signs, and signs are balanced."""
    rows = code_rows(1000, 64)
    products = (rows @ rows.T)[np.triu_indices(1000, 1)]
    assert abs(products.mean()) < 0.002 and products.std() == pytest.approx(1 / 8, rel=0.02)
    assert abs((rows > 0).mean() - 0.5) < 0.01


def test_too_few_signs_are_refused():
    """300 tokens cannot have 256 codes of 8 signs; the message names the setting."""
    for make in (code_rows, check_codes):
        with pytest.raises(ConfigError, match=r"code_width=8 gives two of 300 tokens the same code; use --set code_w"):
            make(300, 8)


def test_codes_are_in_memory_once_and_no_longer_than_someone_has_them():
    """However many blocks and chains ask."""
    first, again = code_rows(300, 64), code_rows(300, 64)
    assert first is again and code_rows(301, 64) is not first
    kept = weakref.ref(first)
    del first, again
    assert kept() is None
