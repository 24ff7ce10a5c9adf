"""DPM-Solver++(2M): each step draws a line through the last two estimates of the data.

Letters: m an estimate of the data; index i is the step at hand, i - 1 the one before.
"""

from torch import Tensor

from wan21.samplers.sampler import Sampler
from wan21.samplers.schedule import DPMPP_SIGMA_MAX, Scalar, exp, make_schedule

ONE, HALF = Scalar(1), Scalar(0.5)


class DPMSolverPP(Sampler):
    """Multistep solver of order 2, midpoint kind, without noise; order 1 at both ends.

    The run starts at sigma = 1, where lambda is -inf: the first step blends noise and estimate, and the second finds
    the first infinitely far away, so that the line through both estimates is flat.

    Reference: DPM-Solver++ (arXiv 2211.01095), algorithm 2.

    Args:
        num_steps: number of calls of the model.
        shift: how far the noise levels are pushed towards noise.

    Memory:
        Kept between steps: one estimate.
    """

    num_kept = 1  # m[i - 1]

    def __init__(self, *, num_steps: int, shift: float) -> None:
        super().__init__(make_schedule(num_steps, shift=shift, sigma_max=DPMPP_SIGMA_MAX))

    def _advance(self, index: int, data: Tensor, sample: Tensor) -> Tensor:
        sigmas, alphas, lambdas = self._schedule.sigmas, self._schedule.alphas, self._schedule.lambdas
        h = lambdas[index + 1] - lambdas[index]
        scale = alphas[index + 1] * (exp(-h) - ONE)
        prediction = float(sigmas[index + 1] / sigmas[index]) * sample - float(scale) * data
        (previous,) = self._kept
        if index > 0:
            r = (lambdas[index] - lambdas[index - 1]) / h
            prediction -= float(HALF * scale) * (float(ONE / r) * (data - previous))
        previous.copy_(data)
        return prediction
