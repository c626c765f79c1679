"""How large settings may be: what lies above is a slip of the keyboard or a damaged file."""

MOST_LAYERS = 2**12
MOST_SAMPLES = 2**20
MOST_STEPS = 2**30
MOST_NOISE = 1e30
"""Noise levels and the numbers of their distribution stay where no power of them leaves the range of a float."""
MOST_TOKENS = 2**20
"""Different ones, that is, of a vocabulary."""
LONGEST_SEQUENCE = 2**17
