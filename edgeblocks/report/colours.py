"""The colours of plots and bars: names that the page's style sheet gives a value, one for light and one for dark.

A figure of up to `MOST_NAMED` series has colours after those of Okabe and Ito (2008), which colour-blind readers tell
apart; one of more has steps of one scale, because so many colours nobody tells apart.
"""

MOST_NAMED = 8


def series_colour(index: int, count: int) -> str:
    """The CSS colour of one of `count` series.

    >>> series_colour(1, 3), series_colour(3, 13)
    ('var(--series-1)', 'color-mix(in oklab, var(--scale-middle) 50%, var(--scale-first))')
    """
    if count <= MOST_NAMED:
        return f"var(--series-{index})"
    share = 200 * index / (count - 1)
    ends = ("middle", "first") if share <= 100 else ("last", "middle")
    return f"color-mix(in oklab, var(--scale-{ends[0]}) {share - 100 * (share > 100):.0f}%, var(--scale-{ends[1]}))"
