"""One CUDA device."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch

from wan21.errors import UsageError
from wan21.runtime.base import Mark, Memory, Runtime, Stream
from wan21.runtime.host import HostPages

MOST_COMPILERS = 8
"""Kernels that are compiled at the same time."""


def pin_pages(buffer: torch.Tensor) -> Callable[[], None]:
    """Page-locks host memory; what is returned takes that back."""
    cudart = torch.cuda.cudart()
    address = buffer.data_ptr()
    torch.cuda.check_error(cudart.cudaHostRegister(address, buffer.numel(), 0))
    return lambda: torch.cuda.check_error(cudart.cudaHostUnregister(address))


class _CudaMark(Mark):
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def hold_current(self) -> None:
        torch.cuda.current_stream(None).wait_event(self.event)

    def wait(self) -> None:
        self.event.synchronize()


def _mark_in(stream: torch.cuda.Stream) -> Mark:
    # A blocking event lets a thread that waits for it sleep; for a plain one it would spin.
    return _CudaMark(stream.record_event(torch.cuda.Event(blocking=True)))


class _CudaStream(Stream):
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def context(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def mark(self) -> Mark:
        return _mark_in(self._stream)

    def mark_current(self) -> Mark:
        return _mark_in(torch.cuda.current_stream(self._device))

    def wait(self, mark: Mark) -> None:
        if not isinstance(mark, _CudaMark):
            raise TypeError(f"mark={mark!r} was not made by a CUDA stream")
        self._stream.wait_event(mark.event)


class CudaRuntime(Runtime):
    """One CUDA device.

    Args:
        index: which of the visible devices.
        memory_limit_bytes: torch's allocator may take no more than this from the driver; None: all there is.

    Raises:
        UsageError: no such device is visible.
    """

    is_asynchronous = True

    def __init__(self, index: int = 0, *, memory_limit_bytes: int | None = None) -> None:
        if index >= torch.cuda.device_count():
            raise UsageError(
                f"device=cuda:{index} does not exist: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
                "devices; choose device=cpu, or check the driver and CUDA_VISIBLE_DEVICES"
            )
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        torch.cuda.init()
        if memory_limit_bytes is not None:
            share = min(1.0, memory_limit_bytes / self.device_total_bytes())
            torch.cuda.set_per_process_memory_fraction(share, self.device)
        self._host = HostPages()

    @property
    def capability(self) -> tuple[int, int]:
        return torch.cuda.get_device_capability(self.device)

    def facts(self) -> dict[str, str]:
        cudnn: Any = torch.backends.cudnn  # carries no types
        return {
            "device": torch.cuda.get_device_name(self.device),
            "cuda": str(torch.version.cuda),
            "cudnn": str(cudnn.version()),
        }

    def warm_up(self) -> None:
        # One call of each kind that the networks make. cuBLAS keeps its workspace (32 MiB on Hopper) from here on.
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            matrix = torch.ones(64, 64, device=self.device, dtype=dtype)
            torch.nn.functional.linear(matrix @ matrix, matrix, matrix[0])
            volume = matrix.view(1, 64, 4, 4, 4).contiguous(memory_format=torch.channels_last_3d)
            torch.nn.functional.conv3d(volume, torch.ones(64, 64, 1, 1, 1, device=self.device, dtype=dtype))
            heads = matrix.view(1, 1, 64, 64)
            torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        del matrix, volume, heads
        self.synchronize()
        self.empty_cache()

    def run_ahead(self, launches: Iterable[Callable[[], object]]) -> None:
        def launch(one: Callable[[], object]) -> None:
            with torch.cuda.device(self.device), torch.no_grad():
                one()

        with ThreadPoolExecutor(min(MOST_COMPILERS, os.cpu_count() or 1)) as pool:
            list(pool.map(launch, launches))
        self.synchronize()
        self.empty_cache()

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def memory(self) -> Memory:
        # The nested form costs a tenth of torch.cuda.memory_stats, which flattens and sorts it.
        stats: dict[str, Any] = torch.cuda.memory_stats_as_nested_dict(self.device)

        def value(name: str, which: str) -> int:
            return int(stats[name]["all"][which]) if name in stats else 0

        return Memory(
            requested_bytes=value("requested_bytes", "current"),
            requested_peak_bytes=value("requested_bytes", "peak"),
            allocated_bytes=value("allocated_bytes", "current"),
            allocated_peak_bytes=value("allocated_bytes", "peak"),
            active_bytes=value("active_bytes", "current"),
            active_peak_bytes=value("active_bytes", "peak"),
            reserved_bytes=value("reserved_bytes", "current"),
            reserved_peak_bytes=value("reserved_bytes", "peak"),
            inactive_split_bytes=value("inactive_split_bytes", "current"),
            num_alloc_retries=int(stats.get("num_alloc_retries", 0)),
            num_ooms=int(stats.get("num_ooms", 0)),
        )

    def reset_memory_peaks(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def device_used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def device_total_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).total_memory

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        # Registered pages rather than torch's pinned allocator, which rounds up to a power of two: the 703 MB of a
        # 14B block would take 1 GiB of host memory.
        return self._host.allocate(num_bytes, pin=pin_pages)

    def host_buffer_bytes(self) -> int:
        return self._host.num_bytes

    def side_stream(self) -> Stream:
        return _CudaStream(self.device)
