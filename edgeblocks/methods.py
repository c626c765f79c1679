"""What the methods of training are."""

from typing import Literal

Method = Literal["diffusion", "exact"]
"""Each block alone as a denoiser, or the whole network end to end, stage by stage."""

Clipping = Literal["stage", "network"]
"""By which norm a gradient is clipped: each block's or stage's by its own, or all stages' by the whole network's."""

BoundaryTier = Literal["ram", "disk"]
"""Where it waits what enters each stage on the way forward."""

BoundaryDtype = Literal["float32", "bfloat16"]
"""As what it is kept."""
