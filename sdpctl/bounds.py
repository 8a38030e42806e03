"""The maximum values that a recipe or the command line may set."""

MOST = 10**9
"""The maximum of a count."""

LARGEST_IMAGE = 2**14
"""The maximum height and width of an image, in pixels."""

MOST_CLASSES = 10**6
"""The maximum number of classes."""
