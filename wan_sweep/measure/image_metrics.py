"""How far two videos are apart, frame by frame: the largest difference, PSNR and SSIM.

PSNR is 10 log10(peak**2 / mean squared error), over all pixels and channels of all frames together; the peak of 8-bit
frames is 255. There is none where nothing differs, as it would be infinite.

SSIM is the mean structural similarity of Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error
visibility to structural similarity", IEEE Transactions on Image Processing 13 (4), 2004: local means, variances and
covariance under a Gaussian window of 11 x 11 with a deviation of 1.5, K1 = 0.01, K2 = 0.03, range 255. It is taken of
the luma of ITU-R BT.601 (0.299 R + 0.587 G + 0.114 B, not rounded), over the windows that lie wholly inside the image,
so that no border is made up; then averaged over frames. Equal frames have 1 by definition; others smaller than a window
have none.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

PEAK = 255
WINDOW = 11
DEVIATION = 1.5
K1, K2 = 0.01, 0.03
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

_ROWS = 32
"""Rows of windows handled at once, so that what they need stays in the processor's cache."""

Image = npt.NDArray[np.float32]


def psnr_db(squared_error: float, num_values: int, peak: float) -> float | None:
    """PSNR from a sum of squared errors; None where it is infinite, or where there is no peak to compare with."""
    if squared_error == 0 or peak == 0:
        return None
    return float(20 * np.log10(peak) - 10 * np.log10(squared_error / num_values))


def luma(frame: npt.NDArray[np.uint8]) -> Image:
    """[H, W, 3] in RGB to [H, W]."""
    result: Image = frame.astype(np.float32) @ LUMA
    return result


def mean_ssim(one: Image, other: Image) -> float:
    """Mean SSIM of two images [H, W] with values from 0 to 255, neither side smaller than a window.

    Memory: a few arrays of _ROWS rows.
    """
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    num_rows, num_columns = one.shape[0] - WINDOW + 1, one.shape[1] - WINDOW + 1
    total = 0.0
    for start in range(0, num_rows, _ROWS):
        rows = slice(start, min(start + _ROWS, num_rows) + WINDOW - 1)
        # In float32 the variance of a bright area would be a small difference of large numbers.
        middle = one[rows].mean()
        a, b = one[rows] - middle, other[rows] - middle
        mean_a, mean_b = _windows(a), _windows(b)
        variances = _windows(a * a + b * b) - mean_a * mean_a - mean_b * mean_b
        covariance = _windows(a * b) - mean_a * mean_b
        mean_a += middle
        mean_b += middle
        ssim = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
        ssim /= (mean_a * mean_a + mean_b * mean_b + c1) * (variances + c2)
        total += float(ssim.sum(dtype=np.float64))
    return float(total / (num_rows * num_columns))


def _gaussian() -> list[np.float32]:
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * DEVIATION**2))
    return list((weights / weights.sum()).astype(np.float32))


_WEIGHTS = _gaussian()


def _windows(image: Image) -> Image:
    """The weighted mean of each window: [H, W] to [H - 10, W - 10]. The window is a product of two of one dimension."""
    return _along_rows(_along_rows(image).T).T


def _along_rows(image: Image) -> Image:
    """The weighted mean of each 11 rows; the weights are symmetric, so two rows share a product."""
    num_rows, middle = image.shape[0] - WINDOW + 1, WINDOW // 2
    result: Image = image[middle : middle + num_rows] * _WEIGHTS[middle]
    for k in range(middle):
        pair = image[k : k + num_rows] + image[WINDOW - 1 - k : WINDOW - 1 - k + num_rows]
        pair *= _WEIGHTS[k]
        result += pair
    return result


class VideoDistance:
    """Collects how far frames are from those of a reference, [H, W, 3] in uint8, one after the other."""

    def __init__(self) -> None:
        self.max_abs_diff = 0
        self._squared_error = 0
        self._num_values = 0
        self._ssim: list[float] = []
        self._is_too_small = False

    def add(self, frame: npt.NDArray[np.uint8], reference: npt.NDArray[np.uint8]) -> None:
        """Takes a frame into account."""
        self._num_values += frame.size
        if np.array_equal(frame, reference):
            self._ssim.append(1.0)
            return
        difference = np.subtract(frame, reference, dtype=np.int16)
        self.max_abs_diff = max(self.max_abs_diff, int(np.abs(difference).max()))
        self._squared_error += int(np.square(difference, dtype=np.int32).sum(dtype=np.int64))
        if min(frame.shape[:2]) < WINDOW:
            self._is_too_small = True
        else:
            self._ssim.append(mean_ssim(luma(frame), luma(reference)))

    @property
    def psnr_db(self) -> float | None:
        """None where nothing differs."""
        return psnr_db(self._squared_error, self._num_values, PEAK)

    @property
    def ssim(self) -> float | None:
        """None where frames differ that are smaller than a window."""
        return None if self._is_too_small else float(np.mean(self._ssim))


class ValuesDistance:
    """Collects how far arrays of numbers are from those of a reference; numbers that are not finite are counted."""

    def __init__(self) -> None:
        self.max_abs_diff = 0.0
        self.num_values = 0
        self.num_not_finite = 0
        self.num_not_finite_reference = 0
        self._squared_error = 0.0
        self._squares = 0.0
        self._lowest, self._highest = np.inf, -np.inf

    def add(self, values: npt.NDArray[Any], reference: npt.NDArray[Any]) -> None:
        """Takes arrays of one shape into account."""
        self.num_values += values.size
        is_finite, is_reference_finite = np.isfinite(values), np.isfinite(reference)
        self.num_not_finite += int(values.size - is_finite.sum())
        self.num_not_finite_reference += int(values.size - is_reference_finite.sum())
        if self.is_finite:
            difference = np.subtract(values, reference, dtype=np.float64)
            self.max_abs_diff = max(self.max_abs_diff, float(np.abs(difference).max()))
            self._squared_error += float(np.square(difference).sum())
            self._squares += float(np.square(reference, dtype=np.float64).sum())
            self._lowest = min(self._lowest, float(reference.min()))
            self._highest = max(self._highest, float(reference.max()))

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are; without that the other results mean nothing."""
        return self.num_not_finite == self.num_not_finite_reference == 0

    @property
    def relative_l2(self) -> float | None:
        """Norm of the difference over that of the reference; None where the reference is zero."""
        return float(np.sqrt(self._squared_error / self._squares)) if self._squares else None

    @property
    def psnr_db(self) -> float | None:
        """With the reference's range as the peak; None where nothing differs, or where the reference is constant."""
        return psnr_db(self._squared_error, self.num_values, self._highest - self._lowest)
