"""The noise levels that a solver visits, and the timesteps that it hands to the model.

A sample at noise level sigma is `(1 - sigma) * data + sigma * noise`. Solvers think in alpha = 1 - sigma and in
lambda = ln(alpha) - ln(sigma), which rises from noise to data.

The official solvers compute every scalar in float32, and differences of lambda amplify its rounding. Ours does the same
operations in the same order, so that runs agree to a few units in the last place. Arithmetic is numpy's, which rounds
correctly and therefore like torch's; log, exp and expm1 are torch's own, as libraries differ in their last bit (that
alone moved latents by up to 8e-6 in 50 steps). One number at a time goes through torch: even a dry run on fake tensors
computes those.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wan21.errors import UsageError
from wan21.request import NUM_TRAIN_TIMESTEPS

Scalar = np.float32
"""Type of every scalar of a solver. Plain literals are wrapped in it: numpy 1 would widen the result to float64."""

UNIPC_SIGMA_MAX = float(Scalar(0.999))
DPMPP_SIGMA_MAX = 1.0


def log(value: Scalar) -> Scalar:
    """The natural logarithm; -inf at 0."""
    return Scalar(_tensor(value).log().item())


def exp(value: Scalar) -> Scalar:
    """The exponential."""
    return Scalar(_tensor(value).exp().item())


def expm1(value: Scalar) -> Scalar:
    """The exponential less one; keeps its digits near 0."""
    return Scalar(_tensor(value).expm1().item())


def _tensor(value: Scalar) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float32, device="cpu")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Noise levels of a run of N steps.

    Attributes:
        timesteps: N integers for the model.
        sigmas: N + 1 noise levels, the last one 0.
        alphas: N + 1 shares of data, 1 - sigma.
        lambdas: N + 1 values of ln(alpha) - ln(sigma); the last is +inf, the first -inf where sigma is 1.
    """

    timesteps: tuple[int, ...]
    sigmas: npt.NDArray[np.float32]
    alphas: npt.NDArray[np.float32]
    lambdas: npt.NDArray[np.float32]


def make_schedule(num_steps: int, *, shift: float, sigma_max: float) -> Schedule:
    """Noise levels that fall evenly from `sigma_max` to 0, then are pushed towards noise by the shift.

    Reference: the time shift of SD3 (arXiv 2403.03206, section 5.3.2).

    Args:
        num_steps: number of calls of the model, at least 1.
        shift: 1 keeps the even grid; the larger, the more steps at high noise.
        sigma_max: the first noise level before the shift.

    Raises:
        UsageError: no steps, or a shift so far from 1 that two noise levels are the same float32.
    """
    if num_steps < 1:
        raise UsageError(f"num_steps={num_steps} is not a number of at least 1")
    even = np.linspace(sigma_max, 0, num_steps + 1)[:-1]
    with np.errstate(all="ignore"):  # what comes of an extreme shift is refused below
        shifted = shift * even / (1 + (shift - 1) * even)
    sigmas = np.append(shifted, 0).astype(np.float32)
    alphas = Scalar(1) - sigmas
    lambdas = np.array([log(alpha) - log(sigma) for alpha, sigma in zip(alphas, sigmas, strict=True)])
    if not np.all(lambdas[1:] > lambdas[:-1]):
        raise UsageError(
            f"shift={shift} makes neighbours among {num_steps} noise levels equal in float32; "
            "choose a shift nearer to 1, or fewer steps"
        )
    timesteps = tuple(int(value) for value in shifted * NUM_TRAIN_TIMESTEPS)
    return Schedule(timesteps=timesteps, sigmas=sigmas, alphas=alphas, lambdas=lambdas)
