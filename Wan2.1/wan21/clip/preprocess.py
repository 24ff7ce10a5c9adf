"""What the CLIP encoder is given of a picture.

Letters: H, W of the picture.
"""

import torch
from torch.nn import functional

# Of the red, green and blue of CLIP's training pictures.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(picture: torch.Tensor, image_size: int) -> torch.Tensor:
    """The picture squeezed into a square, neither cropped nor smoothed, and normalised.

    Not what CLIP's own image processor does (shorter side resized with antialiasing, then cropped), but what the
    released models were used with.

    Args:
        picture: [3, H, W] in [-1, 1], float32.
        image_size: sides of the square.

    Returns:
        [3, image_size, image_size], float32.
    """
    square = functional.interpolate(
        picture[None], size=(image_size, image_size), mode="bicubic", align_corners=False, antialias=False
    )[0]
    mean, std = (torch.tensor(values, device=picture.device).view(3, 1, 1) for values in (MEAN, STD))
    return (square * 0.5 + 0.5 - mean) / std
