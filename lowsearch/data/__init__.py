"""Image data sets behind one name: `load_data("fashion-mnist-mini")`."""

from lowsearch.data.images import IMAGE_MEAN, IMAGE_STD, ImageData, Split
from lowsearch.data.sources import load_data

__all__ = ["IMAGE_MEAN", "IMAGE_STD", "ImageData", "Split", "load_data"]
