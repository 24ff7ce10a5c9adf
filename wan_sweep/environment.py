"""The machine and the software, read without importing torch: GPUs come from NVML, versions from package metadata."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from wan_sweep.schema import digest

_PACKAGES = ("torch", "numpy", "safetensors", "hydra-core", "omegaconf", "mlflow", "wan-sweep")
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

# Folders whose code shapes no measurement: a better plot does not make an old number stale.
_AFTER_THE_FACT = ("report", "track")

# What a number depends on besides the job and the code.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_FINGERPRINT = ("gpu", "driver", "cpu", "cpu_cores", "torch", "python", "allocator", "threads")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU that this process may use, at one instant."""

    name: str
    total_bytes: int
    used_bytes: int
    num_processes: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a plan needs to know about the machine."""

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    torch_version: str = ""

    @property
    def torch_has_cuda(self) -> bool:
        """Whether the installed torch is built for GPUs; a CPU build says so in its version."""
        return not self.torch_version.endswith("+cpu")

    @property
    def num_gpus(self) -> int:
        """GPUs that torch can use."""
        return len(self.gpus) if self.torch_has_cuda else 0

    def to_dict(self) -> dict[str, str]:
        """As part of the flat environment."""
        if not self.gpus:
            return {"gpu": "", "gpu_count": "0", "driver": self.driver}
        return {
            "gpu": ", ".join(dict.fromkeys(gpu.name for gpu in self.gpus)),
            "gpu_count": str(len(self.gpus)),
            "driver": self.driver,
            "gpu_memory_bytes": str(max(gpu.total_bytes for gpu in self.gpus)),
        }


@contextmanager
def _nvml() -> Iterator[Any]:
    """The NVML binding, initialised; None where there is no NVIDIA driver."""
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


def _handles(nvml: Any) -> list[Any]:  # noqa: ANN401 - NVML's binding carries no types
    """Handles of the GPUs that CUDA_VISIBLE_DEVICES leaves, up to the first entry that is none, as CUDA reads it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    handles = []
    for entry in visible.split(","):
        name = entry.strip()
        try:
            if name.isdigit():
                handles.append(nvml.nvmlDeviceGetHandleByIndex(int(name)))
            else:
                handles.append(nvml.nvmlDeviceGetHandleByUUID(name))
        except nvml.NVMLError:
            break
    return handles


def _num_processes(nvml: Any, handle: Any) -> int:  # noqa: ANN401 - NVML's binding carries no types
    try:
        return len(nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    except nvml.NVMLError:
        return 0  # some virtual and split GPUs do not tell


def _gpu(nvml: Any, handle: Any) -> Gpu:  # noqa: ANN401 - NVML's binding carries no types
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(
        name=str(nvml.nvmlDeviceGetName(handle)),
        total_bytes=int(memory.total),
        used_bytes=int(memory.used),
        num_processes=_num_processes(nvml, handle),
    )


def read_machine() -> Machine:
    """The machine as it is now."""
    torch_version = package_version("torch")
    with _nvml() as nvml:
        if nvml is None:
            return Machine(torch_version=torch_version)
        return Machine(
            gpus=tuple(_gpu(nvml, handle) for handle in _handles(nvml)),
            driver=str(nvml.nvmlSystemGetDriverVersion()),
            torch_version=torch_version,
        )


def device_used_bytes() -> list[int]:
    """Memory in use on each visible GPU, by all processes and the driver; empty without a GPU."""
    with _nvml() as nvml:
        if nvml is None:
            return []
        return [int(nvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in _handles(nvml)]


def package_version(name: str) -> str:
    """The version of an installed package, or an empty text."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def package_folder(name: str) -> Path:
    """Where a package's code lies; the package itself is not imported.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No package named {name!r}", name=name)
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def num_cpu_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _git(*arguments: str) -> str:
    git = shutil.which("git")
    root = package_folder("wan_sweep").parent
    if git is None or not (root / ".git").exists():
        return ""
    command = [git, "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def describe(machine: Machine) -> dict[str, str]:
    """Machine, system and versions, flat; a thing that is not there is left out."""
    commit = _git("rev-parse", "HEAD")
    values = {
        **machine.to_dict(),
        **{name.replace("-", "_"): package_version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu": _cpu_model(),
        "cpu_cores": str(num_cpu_cores()),
        "ram_bytes": str(psutil.virtual_memory().total),
        "git_commit": commit,
        "git_dirty": ("true" if _git("status", "--porcelain", "--untracked-files=no") else "false") if commit else "",
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "threads": ",".join(f"{name}={os.environ[name]}" for name in _THREAD_VARIABLES if name in os.environ),
        "allocator": ",".join(filter(None, map(os.environ.get, _ALLOCATOR_VARIABLES))),
    }
    values["fingerprint"] = fingerprint(values)
    return {name: value for name, value in values.items() if value}


def fingerprint(environment: Mapping[str, str]) -> str:
    """Twelve hex digits that change when something changes on which measured numbers depend."""
    return digest({name: environment.get(name, "") for name in _FINGERPRINT})


@functools.cache
def code_version() -> str:
    """Twelve hex digits over the sources that a measurement runs through."""
    total = hashlib.sha256()
    for package in ("wan21", "wan_sweep"):
        root = package_folder(package)
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if package == "wan_sweep" and relative.parts[0] in _AFTER_THE_FACT:
                continue
            total.update(f"{package}/{relative.as_posix()}\0".encode())
            total.update(path.read_bytes())
    return total.hexdigest()[:12]
