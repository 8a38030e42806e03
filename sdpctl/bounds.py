"""The maximum values that a recipe or the command line may set, and the classes that top-5 accuracy needs."""

MOST = 10**9
"""The maximum of a count."""

LARGEST_IMAGE = 2**14
"""The maximum height and width of an image, in pixels."""

MOST_CLASSES = 10**6
"""The maximum number of classes."""

TOP5_MIN_CLASSES = 6
"""Minimum number of classes for top-5 accuracy; with fewer classes it is always 100 %."""
