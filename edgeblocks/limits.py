"""How large settings, networks and data sets may be: what lies above is a slip of the keyboard or a damaged file, and
is refused before memory is taken for it.

Decoding was measured to take 4 to 20 bytes a pixel (WebP with transparency most, PNG 4 to 11), so that one picture
costs at most 0.7 GB, and 0.35 GB where the set keeps the pictures' own size.
"""

MOST_DECODED_PIXELS = 2**25
"""Of one picture that is then made smaller. A JPEG counts with the size that its decoder reduces it to."""
MOST_PROGRESSIVE_PIXELS = 2**26
"""Of a progressive JPEG, whose decoder keeps all of it, 3 to 6 bytes a pixel, before it can reduce anything."""
MOST_PICTURE_BYTES = 2**28
"""Of a picture's file, which some decoders read whole."""
MOST_PIXELS = 2**24
"""Of one image as it is trained on: 4096 x 4096."""
MOST_IMAGE_VALUES = 4 * MOST_PIXELS
"""Of one image with all its channels: as many as the largest picture with transparency has."""
LONGEST_SIDE = 2**16
MOST_CHANNELS = 2**10
MOST_IMAGES = 2**24
"""Labels, moments and order of a set stay in memory: some 40 bytes an image."""
MOST_CLASSES = 100_000
MOST_UNREADABLE = 100_000
"""Names of skipped files are kept."""
MOST_LAYERS = 2**12
"""So many blocks there can be, too, of one layer each."""
MOST_WIDTH = 2**20
MOST_HEADS = 2**12
MOST_CODE_WIDTH = 2**12
MOST_SAMPLES = 2**20
MOST_STEPS = 2**30
MOST_NOISE = 1e30
"""Noise levels and the numbers of their distribution stay where no power of them leaves the range of a float."""
MOST_TOKENS = 2**20
"""Different ones, that is, of a vocabulary."""
LONGEST_SEQUENCE = 2**17
