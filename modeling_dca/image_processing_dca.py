"""The image processor of grayscale vision models."""

import numpy as np
from PIL import Image
from transformers import ViTImageProcessorPil


#: The weights of red, green and blue for grayscale, as in Pillow (ITU-R 601).
GREY = np.array([0.299, 0.587, 0.114])


class DCAImageProcessor(ViTImageProcessorPil):
    """
    ViT's image processor, which also converts colours for grayscale models (with one value of `image_mean`): transformers'
    pipelines convert every image to RGB.
    """

    _auto_class = "AutoImageProcessor"

    def process_image(self, image, *args, **kwargs) -> np.ndarray:
        """As in transformers, an array `(channels, height, width)`; one channel for grayscale models."""
        sees_grey = len(self.image_mean) == 1
        if sees_grey and isinstance(image, Image.Image):
            image = image.convert("L")  # also of palettes and with an alpha channel
        array = super().process_image(image, *args, **kwargs)
        if sees_grey and array.shape[0] in (3, 4):
            grey = np.tensordot(GREY, array[:3], axes=1)[None]
            array = (grey.round() if np.issubdtype(array.dtype, np.integer) else grey).astype(array.dtype)
        return array


__all__ = ["DCAImageProcessor"]
