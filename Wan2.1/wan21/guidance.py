"""Classifier-free guidance.

Letters: B videos, C channels, t, h, w of the latents.

Reference: arXiv 2207.12598.
"""

from collections.abc import Callable

import torch

Velocity = Callable[[torch.Tensor], torch.Tensor]
"""A context [B, S, D] to a velocity [B, C, t, h, w], latents and timestep being fixed."""


def guided(
    velocity: Velocity, conditioned: torch.Tensor, unconditioned: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The velocity for the prompt, pushed away from that for the negative prompt.

    Two passes, the conditioned one first. Without an unconditioned context there is one pass, which is what scale 1
    amounts to.

    Args:
        velocity: the model.
        conditioned: context of the prompts.
        unconditioned: context of the negative prompts, or None.
        scale: 1 is no guidance.

    Returns:
        [B, C, t, h, w], float32.
    """
    towards = velocity(conditioned)
    if unconditioned is None:
        return towards
    away = velocity(unconditioned)
    return away + scale * (towards - away)
