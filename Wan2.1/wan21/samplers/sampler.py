"""What every solver has in common. An object serves one run, in order, and then is used up."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from wan21.samplers.schedule import Schedule


class Sampler(ABC):
    """Turns velocities of the model into the next sample, from noise to latents.

    The model's velocity v at noise level sigma gives an estimate of the data, `sample - sigma * v`. Solvers differ in
    how they move along from this estimate and the earlier ones. At the last step sigma becomes 0 and both arrive at
    the estimate itself.

    A run starts at the first noise level, always. (The official search for the starting index takes the second one
    if the first two timesteps are the same integer, which happens at many steps, and then fails at the end.)

    Attributes:
        num_kept: of a kind of solver: how many tensors like the sample it keeps between steps.
        timesteps: integers for the model, in the order of the steps.
        sigmas: the noise level of each step, and the 0 that the last one reaches.
    """

    num_kept: ClassVar[int]
    timesteps: list[int]
    sigmas: list[float]

    def __init__(self, schedule: Schedule) -> None:
        self.timesteps = list(schedule.timesteps)
        self.sigmas = [float(sigma) for sigma in schedule.sigmas]
        self._schedule = schedule
        self._num_done = 0
        self._kept: list[Tensor] = []

    def begin(self, noise: Tensor) -> None:
        """Makes the places of what is kept between steps; without it the first step makes them.

        A run calls it before the model computes: what outlives a step would otherwise lie in the midst of the memory
        that the model has just given back, and the next forward would find no room there for its keys and values
        (T2V-14B, 1280*720: 1.4 GiB more reserved).

        Args:
            noise: what the run starts from; not modified.
        """
        if len(self.timesteps) > 1:  # a lone step remembers nothing
            self._kept = [torch.empty_like(noise) for _ in range(self.num_kept)]

    def step(self, velocity: Tensor, sample: Tensor) -> Tensor:
        """The sample at the next noise level.

        Neither argument is modified, and the solver holds on to neither.

        Args:
            velocity: the model's output for `sample` at this step's timestep, [...] in float32, on any device.
            sample: what the step before returned, or the noise; shape, dtype and place of the velocity.

        Returns:
            A new tensor, [...] in float32.

        Raises:
            ValueError: a tensor is not float32; a narrower one would lower the precision of the run in silence.
            RuntimeError: the run is over.

        Memory:
            Tensors like the sample, beside the two arguments. Kept between steps: `num_kept`, in the same places, and
            none after the last step. While a step runs: up to five more, the result included.
        """
        for name, tensor in (("velocity", velocity), ("sample", sample)):
            if tensor.dtype != torch.float32:
                raise ValueError(f"{name}.dtype={tensor.dtype} cannot be: a sampler computes in torch.float32")
        index = self._num_done
        if index == len(self.timesteps):
            raise RuntimeError(f"step {index + 1} of {index}: this run is over; make a new sampler for the next one")
        self._num_done += 1
        data = sample - self.sigmas[index] * velocity
        if self._num_done == len(self.timesteps):
            self._kept = []
            return data
        if not self._kept:
            self.begin(sample)
        return self._advance(index, data, sample)

    @abstractmethod
    def _advance(self, index: int, data: Tensor, sample: Tensor) -> Tensor:
        """The sample at noise level `index + 1`, which is not the last one; writes to what is kept.

        Args:
            index: number of the step, from 0.
            data: the estimate of the data at this step.
            sample: the sample that the estimate was made from.
        """
