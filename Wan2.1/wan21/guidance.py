"""Classifier-free guidance.

Letters: B videos, C channels, t, h, w of the latents.

Reference: arXiv 2207.12598.
"""

from collections.abc import Callable

import torch

from wan21.dit.context import Context
from wan21.parallel.exchange import gathered
from wan21.parallel.world import Group

Velocity = Callable[[Context], torch.Tensor]
"""A context to a velocity [B, C, t, h, w], latents and timestep being fixed."""


def guided(velocity: Velocity, conditioned: Context, unconditioned: Context | None, scale: float) -> torch.Tensor:
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


def guided_together(velocity: Velocity, context: Context, scale: float, group: Group) -> torch.Tensor:
    """The same, each of two processes making one pass; both get the same bits, which are those of one process.

    Args:
        velocity: the model.
        context: of the prompts for the group's first member, of the negative prompts for the second.
        scale: as above.
        group: the two.

    Returns:
        [B, C, t, h, w], float32.
    """
    towards, away = gathered(group, velocity(context))
    return away + scale * (towards - away)
