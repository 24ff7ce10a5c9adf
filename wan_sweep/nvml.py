"""What NVIDIA's management library (NVML) tells of the GPUs that this process may use. Nothing here starts CUDA."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

Nvml = Any  # the binding carries no types, and neither do its handles

_COMPUTE_MODES = ("default", "exclusive_thread", "prohibited", "exclusive_process")


@dataclass(frozen=True, kw_only=True)
class GpuProcess:
    """A process that uses a GPU; its name is empty where it cannot be seen, its bytes None where nobody tells."""

    pid: int
    name: str = ""
    used_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class GpuState:
    """A GPU's settings and condition at one instant. None is what the driver does not tell.

    Attributes:
        index: Its place among the visible ones, which is its number for CUDA.
        allocated_bytes: Memory in use, without what the driver has set aside for itself.
        processes: Those that compute or draw on it, as far as this process may know.
        is_split: Whether it is cut into instances (MIG), or is one of them.
        slowdowns: Why its clocks are held down now.
        sm_clock_mhz: Of the multiprocessors, now.
        power_limit_mw: What is enforced, in milliwatts; `default_power_limit_mw` is what the card came with.
    """

    index: int
    allocated_bytes: int | None = None
    processes: tuple[GpuProcess, ...] = ()
    compute_mode: str | None = None
    is_split: bool = False
    has_ecc: bool | None = None
    is_persistent: bool | None = None
    slowdowns: tuple[str, ...] = ()
    temperature_c: int | None = None
    sm_clock_mhz: int | None = None
    max_sm_clock_mhz: int | None = None
    power_limit_mw: int | None = None
    default_power_limit_mw: int | None = None


@contextmanager
def session() -> Iterator[Nvml]:
    """The NVML binding, initialised; None where it cannot be."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def problem() -> str:
    """Why NVML cannot be read although there is a driver; empty if it can, and where no driver is loaded."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        absent = {pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED}
        return "" if error.value in absent else str(error)
    pynvml.nvmlShutdown()
    return ""


def handles(nvml: Nvml) -> list[Any]:
    """Handles of the GPUs that CUDA_VISIBLE_DEVICES leaves, up to the first entry that is none, as CUDA reads it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    found = []
    for entry in visible.split(","):
        name = entry.strip()
        try:
            if name.isdigit():
                found.append(nvml.nvmlDeviceGetHandleByIndex(int(name)))
            else:
                found.append(nvml.nvmlDeviceGetHandleByUUID(name))
        except nvml.NVMLError:
            break
    return found


def visible_gpus() -> dict[str, str]:
    """The GPUs that this process may use: what CUDA_VISIBLE_DEVICES calls each, and the identity that it always has."""
    with session() as nvml:
        if nvml is None:
            return {}
        found = [str(nvml.nvmlDeviceGetUUID(handle)) for handle in handles(nvml)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(len(found))] if visible is None else visible.split(",")
    return {name.strip(): identity for name, identity in zip(names, found, strict=False)}


def cuda_of_driver(nvml: Nvml) -> str:
    """The newest CUDA that the driver supports, such as 13.0; empty if it does not tell.

    libcuda is asked first, since a package for forward compatibility replaces it without replacing the driver.
    """
    for ask in (nvml.nvmlSystemGetCudaDriverVersion_v2, nvml.nvmlSystemGetCudaDriverVersion):
        number = _told(nvml, ask)
        if number:
            return f"{number // 1000}.{number % 1000 // 10}"
    return ""


def read_gpu_states() -> tuple[GpuState, ...]:
    """All visible GPUs as they are now; empty without a driver."""
    with session() as nvml:
        if nvml is None:
            return ()
        return tuple(_state(nvml, index, handle) for index, handle in enumerate(handles(nvml)))


def _state(nvml: Nvml, index: int, handle: object) -> GpuState:
    def told(question: str, *arguments: object) -> Any:  # noqa: ANN401 - as various as the questions
        return _told(nvml, getattr(nvml, f"nvmlDeviceGet{question}"), handle, *arguments)

    memory, mode, mig = told("MemoryInfo", nvml.nvmlMemory_v2), told("ComputeMode"), told("MigMode")
    ecc, persistence = told("EccMode"), told("PersistenceMode")
    is_slice = _told(nvml, nvml.nvmlDeviceIsMigDeviceHandle, handle)
    return GpuState(
        index=index,
        allocated_bytes=None if memory is None else int(memory.used),
        processes=_processes(nvml, handle),
        compute_mode=None if mode is None else _COMPUTE_MODES[mode],
        is_split=bool(is_slice or (mig and mig[0])),
        has_ecc=None if ecc is None else bool(ecc[0]),
        is_persistent=None if persistence is None else bool(persistence),
        slowdowns=_slowdowns(nvml, handle),
        temperature_c=told("Temperature", nvml.NVML_TEMPERATURE_GPU),
        sm_clock_mhz=told("ClockInfo", nvml.NVML_CLOCK_SM),
        max_sm_clock_mhz=told("MaxClockInfo", nvml.NVML_CLOCK_SM),
        power_limit_mw=told("EnforcedPowerLimit"),
        default_power_limit_mw=told("PowerManagementDefaultLimit"),
    )


def _told(nvml: Nvml, ask: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401 - as various as the questions
    """NVML's answer, or None where this GPU, driver or user gets none."""
    try:
        return ask(*arguments)
    except nvml.NVMLError:
        return None


def _processes(nvml: Nvml, handle: object) -> tuple[GpuProcess, ...]:
    """Who computes or draws on a GPU; one that does both is listed once."""
    used: dict[int, int | None] = {}
    for ask in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        for process in _told(nvml, ask, handle) or ():
            before = used.get(process.pid)
            used[process.pid] = before if process.usedGpuMemory is None else process.usedGpuMemory
    return tuple(GpuProcess(pid=pid, name=_name(pid), used_bytes=used_bytes) for pid, used_bytes in used.items())


def _name(pid: int) -> str:
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return ""  # it has ended, or is seen from outside of its container


def _slowdowns(nvml: Nvml, handle: object) -> tuple[str, ...]:
    reasons = _told(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
    words = {
        nvml.nvmlClocksThrottleReasonSwThermalSlowdown: "temperature",
        nvml.nvmlClocksThrottleReasonHwThermalSlowdown: "temperature, by hardware",
        nvml.nvmlClocksThrottleReasonSwPowerCap: "power limit",
        nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "power brake",
        nvml.nvmlClocksThrottleReasonHwSlowdown: "hardware slowdown",
    }
    return tuple(word for bit, word in words.items() if reasons & bit)


class ProcessMemory:
    """How much memory a process holds on the visible GPUs, its context and libraries included, as the driver tells.

    NVML stays initialised until `close`, so that a reading is one question to the driver for each GPU.

    Args:
        pid: The process; None is this one.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._pid = os.getpid() if pid is None else pid
        self._open = ExitStack()
        self._nvml: Nvml = self._open.enter_context(session())
        self._handles = [] if self._nvml is None else handles(self._nvml)

    def read(self) -> int | None:
        """Bytes now; None where the driver does not tell, as in containers that number their processes anew."""
        told = [
            process.usedGpuMemory
            for handle in self._handles
            for process in _told(self._nvml, self._nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()
            if process.pid == self._pid and process.usedGpuMemory is not None
        ]
        return sum(told) if told else None

    def close(self) -> None:
        """Lets NVML go; there is nothing to read any more."""
        self._handles = []
        self._open.close()
