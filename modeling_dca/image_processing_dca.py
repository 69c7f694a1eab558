"""The image processor of vision models that see one channel."""

import numpy as np
from PIL import Image
from transformers import ViTImageProcessorPil


#: How much of red, green and blue is in grey, as Pillow has it (ITU-R 601).
GREY = np.array([0.299, 0.587, 0.114])


class DCAImageProcessor(ViTImageProcessorPil):
    """
    ViT's image processor, which takes colours, too, where the model sees grey (`image_mean` has one value): transformers'
    pipelines make every image RGB.
    """

    _auto_class = "AutoImageProcessor"

    def process_image(self, image, *args, **kwargs) -> np.ndarray:
        """As in transformers, an array `(channels, height, width)`; one channel for models that see grey."""
        sees_grey = len(self.image_mean) == 1
        if sees_grey and isinstance(image, Image.Image):
            image = image.convert("L")  # also of palettes and with an alpha channel
        array = super().process_image(image, *args, **kwargs)
        if sees_grey and array.shape[0] in (3, 4):
            grey = np.tensordot(GREY, array[:3], axes=1)[None]
            array = (grey.round() if np.issubdtype(array.dtype, np.integer) else grey).astype(array.dtype)
        return array


__all__ = ["DCAImageProcessor"]
