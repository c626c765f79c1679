import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeblocks.units import format_bytes, format_count, format_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1", 1),
        ("700", 700),
        ("2KB", 2000),
        ("2 kb", 2000),
        ("2KiB", 2048),
        ("6GB", 6 * 10**9),
        ("6g", 6 * 10**9),
        ("1.5GiB", 3 * 2**29),
        (".5MB", 500_000),
        ("1TiB", 2**40),
        ("  3 MiB ", 3 * 2**20),
    ],
)
def test_sizes_are_read_in_decimal_and_binary_units(text, size_bytes):
    """KB is 1000 bytes and KiB 1024, in any case and with or without a space."""
    assert parse_size(text) == size_bytes


@given(whole=st.integers(1000, 10**12), percent=st.integers(1, 100))
def test_a_percentage_is_that_share_of_the_whole(whole, percent):
    """p% of n bytes is n p / 100, to a byte."""
    assert abs(parse_size(f"{percent}%", whole_bytes=whole) - whole * percent / 100) <= 1


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not a size"),
        ("GB", "not a size"),
        ("-3GB", "not a size"),
        ("1e9", "not a size"),
        ("6 G B", "not a size"),
        ("٣GB", "not a size"),
        ("6XB", "'XB'"),
        ("0GB", "larger than zero"),
        ("0.1B", "larger than zero"),
        ("101%", "100%"),
        ("0%", "larger than zero"),
    ],
)
def test_what_is_no_size_is_refused_with_the_reason(text, word):
    """A wrong size is a ValueError that shows the text and says what is wrong."""
    with pytest.raises(ValueError, match=word) as caught:
        parse_size(text, whole_bytes=10**9)
    assert text in str(caught.value)


def test_a_percentage_of_nothing_known_is_refused():
    """Without a whole, `50%` has no meaning."""
    with pytest.raises(ValueError, match="percentage"):
        parse_size("50%")


@given(st.integers(1, 10**14))
def test_a_formatted_size_reads_back_within_three_digits(size_bytes):
    """format_bytes keeps three significant digits, in a form that parse_size reads."""
    assert parse_size(format_bytes(size_bytes)) == pytest.approx(size_bytes, rel=0.0051)


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(999, "999 B"), (999_499, "999 KB"), (999_600, "1 MB"), (2_000_000_000_000, "2 TB")]
)
def test_a_size_never_shows_more_than_three_digits(size_bytes, text):
    """Rounding up to 1000 moves on to the next unit."""
    assert format_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0.5, "500 ms"),
        (1, "1 s"),
        (59.9, "59.9 s"),
        (60, "1 min 00 s"),
        (3599.7, "1 h 00 min"),
        (90_000, "25 h 00 min"),
    ],
)
def test_durations_read_naturally(duration_s, text):
    """Milliseconds, seconds, minutes, hours, each up to where the next begins."""
    assert format_duration(duration_s) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (12_345, "12.3k"), (33_000_000, "33M"), (2.5e9, "2.5B")]
)
def test_counts_have_a_suffix(count, text):
    """Thousands, millions and billions of parameters."""
    assert format_count(count) == text
