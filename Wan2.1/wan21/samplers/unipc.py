"""UniPC, order 2: each step first corrects the sample that it was given, then predicts the next one.

Letters: x a corrected sample; m an estimate of the data; index i is the step at hand, i - 1 the one before.
"""

import torch
from torch import Tensor

from wan21.samplers.sampler import Sampler
from wan21.samplers.schedule import UNIPC_SIGMA_MAX, Scalar, expm1, make_schedule

ONE, TWO, HALF = Scalar(1), Scalar(2), Scalar(0.5)


def corrector_weights(h: Scalar, r: Scalar) -> tuple[Scalar, Scalar]:
    """Weights of the earlier and of the newest slope in the corrector of order 2.

    They solve `a + b = g1 / E` and `r a + b = 2 g2 / E` with E = expm1(-h). The official code has a library solve the
    two equations; the last bit of the weights differs, and nothing else in a run.

    Args:
        h: the last step in lambda.
        r: the step before it, over h; negative, as it points backwards.
    """
    e = expm1(-h)
    g1 = e / -h - ONE
    g2 = g1 / -h - HALF
    first, second = g1 / e, TWO * g2 / e
    earlier = (first - second) / (ONE - r)
    return earlier, first - earlier


class UniPC(Sampler):
    """Predictor and corrector of order 2 on estimates of the data, with B(h) = expm1(-h); order 1 at both ends.

    The estimate is not made anew after the correction, so a step costs one call of the model.

    Reference: UniPC (arXiv 2302.04867), variant bh2. The official code forms two products in bfloat16 on CUDA, by
    accident of autocast; here everything is float32 unless that is asked for.

    Args:
        num_steps: number of calls of the model.
        shift: how far the noise levels are pushed towards noise.
        product_dtype: in which a weight is multiplied with the older slope.

    Memory:
        Kept between steps: two estimates and one sample.
    """

    num_kept = 3  # m[i - 1], m[i - 2], x[i - 1]

    def __init__(self, *, num_steps: int, shift: float, product_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(make_schedule(num_steps, shift=shift, sigma_max=UNIPC_SIGMA_MAX))
        self._product_dtype = product_dtype

    def _advance(self, index: int, data: Tensor, sample: Tensor) -> Tensor:
        previous, earlier, corrected = self._kept
        if index > 0:
            sample = self._correct(index, data, previous, earlier if index > 1 else None, corrected)
        prediction = self._predict(index, data, sample, previous if index > 0 else None)
        self._kept = [earlier.copy_(data), previous, corrected.copy_(sample)]
        return prediction

    def _correct(self, index: int, data: Tensor, previous: Tensor, earlier: Tensor | None, corrected: Tensor) -> Tensor:
        """x[i], from m[i], m[i - 1], m[i - 2] and x[i - 1]."""
        sigmas, alphas, lambdas = self._schedule.sigmas, self._schedule.alphas, self._schedule.lambdas
        h = lambdas[index] - lambdas[index - 1]
        scale = alphas[index] * expm1(-h)
        slope = data - previous
        if earlier is None:
            slope = float(HALF) * slope
        else:
            r = (lambdas[index - 2] - lambdas[index - 1]) / h
            weight_earlier, weight_newest = corrector_weights(h, r)
            older = self._product(weight_earlier, (earlier - previous) / float(r))
            slope = older + float(weight_newest) * slope
        base = float(sigmas[index] / sigmas[index - 1]) * corrected - float(scale) * previous
        return base - float(scale) * slope

    def _predict(self, index: int, data: Tensor, sample: Tensor, previous: Tensor | None) -> Tensor:
        """The sample at the next noise level, from x[i], m[i] and m[i - 1]."""
        sigmas, alphas, lambdas = self._schedule.sigmas, self._schedule.alphas, self._schedule.lambdas
        h = lambdas[index + 1] - lambdas[index]
        scale = alphas[index + 1] * expm1(-h)
        prediction = float(sigmas[index + 1] / sigmas[index]) * sample - float(scale) * data
        if previous is None:
            return prediction
        r = (lambdas[index - 1] - lambdas[index]) / h
        # A tensor without dimensions, as upstream's: times bfloat16 a CPU rounds it and a GPU does not.
        return prediction - torch.tensor(float(scale)) * self._product(HALF, (previous - data) / float(r))

    def _product(self, weight: Scalar, slope: Tensor) -> Tensor:
        """A weight times a slope, both rounded first to the dtype of the result."""
        if self._product_dtype == slope.dtype:
            return float(weight) * slope
        return float(torch.tensor(float(weight), dtype=self._product_dtype)) * slope.to(self._product_dtype)
