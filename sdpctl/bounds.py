"""The largest values that a recipe or the command line may name."""

MOST = 10**9
"""The largest count."""

LARGEST_IMAGE = 2**14
"""The largest height and width of an image, in pixels."""

MOST_CLASSES = 10**6
"""The largest number of classes."""
