"""Solvers of the flow: from noise to latents."""

from wan21.samplers.make import make_sampler
from wan21.samplers.sampler import Sampler

__all__ = ["Sampler", "make_sampler"]
