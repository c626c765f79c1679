"""What the chains of families make: images, classes, text, continuations of text."""

TEXT_TASKS = ("text", "continuation")
"""Of networks that make text: by filling gaps, or from its beginning."""

IMAGE_STEPS = 18
"""Noise levels of a chain that makes images, where it has no more blocks than these."""

GRID_SAMPLES = {"images": 40, "classes": 0, "text": 4, "continuation": 4}
"""Samples made together during training, by what the family's chain makes."""

GRID_TOKENS = 64
"""Of such a sample that is written token by token: where blocks are on disk each token loads them all."""
