"""What a runtime is: streams, marks in them, memory counters, generators."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

P = TypeVar("P")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The device allocator's counters in bytes, now and at their peak since `Runtime.reset_memory_peaks`."""

    requested_bytes: int
    requested_peak_bytes: int
    allocated_bytes: int
    allocated_peak_bytes: int
    active_bytes: int
    active_peak_bytes: int
    reserved_bytes: int
    reserved_peak_bytes: int
    inactive_split_bytes: int
    num_alloc_retries: int
    num_ooms: int


class Runtime(ABC):
    """What differs between a CPU and a GPU."""

    device: torch.device
    is_asynchronous: bool
    """Whether the device works on while the host goes ahead."""

    computes: bool = True
    """Whether tensors hold values; where they do not, weights need not be read."""

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability of an NVIDIA GPU; None of other devices."""
        return None

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """What a record should say of the device and of the libraries that compute on it."""

    @abstractmethod
    def warm_up(self) -> None:
        """Starts what starts once per process, so that no phase pays for it. Some libraries keep a workspace."""

    def counting(self) -> AbstractContextManager[object]:
        """Inside it the allocator's counters are kept. On CUDA they always are."""
        return nullcontext()

    @abstractmethod
    def generator(self, seed: int) -> torch.Generator:
        """A random generator on the device. CPU and CUDA generators draw different numbers from one seed."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until the device has done all that was asked of it."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Gives memory that the allocator holds and no tensor uses back to the driver."""

    @abstractmethod
    def memory(self) -> Memory:
        """The allocator's counters. Reading them does not move the peaks."""

    @abstractmethod
    def reset_memory_peaks(self) -> None:
        """Lets the peaks start again from the present values."""

    @abstractmethod
    def device_used_bytes(self) -> int:
        """Bytes in use on the whole device by every process and library; on a CPU, this process's resident bytes."""

    @abstractmethod
    def device_total_bytes(self) -> int:
        """Bytes that the device has."""

    @abstractmethod
    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        """A uint8 tensor of host memory from which copies to the device can run beside other work."""

    @abstractmethod
    def host_buffer_bytes(self) -> int:
        """Host memory that live host buffers take, with the allocator's rounding."""

    @abstractmethod
    def side_stream(self) -> "Stream":
        """A stream for copies beside the computation."""

    def as_run(self, blocks: Iterable[nn.Module]) -> Iterable[nn.Module]:
        """A model's blocks as they are run here: themselves. One that only counts need not run equal blocks again."""
        return blocks

    def run_ahead(self, launches: Iterable[Callable[[], object]]) -> None:  # noqa: B027  # most compile nothing
        """Runs what would else be compiled in the middle of a run. Here nothing is compiled."""

    def as_planned(self, plan: P) -> P:
        """The VAE's plan as it is carried out here: itself. One that only counts need not go through all frames."""
        return plan


class Stream(ABC):
    """Work in order, beside the current stream. On a CPU everything happens at once and in order anyway."""

    @abstractmethod
    def context(self) -> AbstractContextManager[object]:
        """What is asked for inside runs on this stream."""

    @abstractmethod
    def mark(self) -> "Mark":
        """The point that this stream has reached."""

    @abstractmethod
    def mark_current(self) -> "Mark":
        """The point that the current (computing) stream has reached."""

    @abstractmethod
    def wait(self, mark: "Mark") -> None:
        """What this stream does next waits until the mark has passed."""


class Mark(ABC):
    """A point in a stream."""

    @abstractmethod
    def hold_current(self) -> None:
        """What the current (computing) stream does next waits until this mark has passed."""

    @abstractmethod
    def wait(self) -> None:
        """The calling thread waits until this mark has passed."""
