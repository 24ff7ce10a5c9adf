"""The machine and the software, read without importing torch: GPUs come from NVML, versions from package metadata."""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from wan_sweep.nvml import ProcessMemory as ProcessMemory  # noqa: PLC0414 - workers find it here
from wan_sweep.nvml import cuda_of_driver, handles, problem, session
from wan_sweep.place import Place, read_place
from wan_sweep.schema import digest

_PACKAGES = ("torch", "triton", "fa3-fwd", "numpy", "safetensors", "hydra-core", "omegaconf", "mlflow", "wan-sweep")
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
    compute_capability: str = ""


KERNEL_PACKAGES = ("triton", "fa3_fwd_interface")
"""Modules of the packages that faster kernels need; looked for, not imported."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a plan needs to know about the machine.

    Attributes:
        driver_cuda: The newest CUDA that the driver supports.
        driver_problem: Why the driver, which is there, cannot be asked.
        torch_cuda: The CUDA that torch is built for: empty if without, None if that is not known.
        packages: Those of KERNEL_PACKAGES that are installed.
        world: This process's place among several that somebody has started for the whole sweep; None if it is alone.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    driver_cuda: str = ""
    driver_problem: str = ""
    torch_version: str = ""
    torch_cuda: str | None = None
    packages: frozenset[str] = frozenset()
    world: Place | None = None

    @property
    def torch_has_cuda(self) -> bool:
        """Whether the installed torch is built for GPUs."""
        return not self.torch_version.endswith("+cpu") if self.torch_cuda is None else bool(self.torch_cuda)

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
            "driver_cuda": self.driver_cuda,
            "gpu_memory_bytes": str(max(gpu.total_bytes for gpu in self.gpus)),
        }


def _compute_capability(nvml: Any, handle: Any) -> str:  # noqa: ANN401 - NVML's binding carries no types
    """Such as "9.0"; empty where the driver does not tell."""
    try:
        return ".".join(map(str, nvml.nvmlDeviceGetCudaComputeCapability(handle)))
    except nvml.NVMLError:
        return ""


def _gpu(nvml: Any, handle: Any) -> Gpu:  # noqa: ANN401 - NVML's binding carries no types
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(
        name=str(nvml.nvmlDeviceGetName(handle)),
        total_bytes=int(memory.total),
        used_bytes=int(memory.used),
        compute_capability=_compute_capability(nvml, handle),
    )


def read_machine() -> Machine:
    """The machine as it is now."""
    torch_version, torch_cuda = torch_build()
    world = read_place()
    with session() as nvml:
        if nvml is None:
            return Machine(torch_version=torch_version, torch_cuda=torch_cuda, driver_problem=problem(), world=world)
        return Machine(
            gpus=tuple(_gpu(nvml, handle) for handle in handles(nvml)),
            driver=str(nvml.nvmlSystemGetDriverVersion()),
            driver_cuda=cuda_of_driver(nvml),
            torch_version=torch_version,
            torch_cuda=torch_cuda,
            packages=frozenset(name for name in KERNEL_PACKAGES if importlib.util.find_spec(name)),
            world=world,
        )


def device_used_bytes() -> list[int]:
    """Memory in use on each visible GPU, by all processes and the driver; empty without a GPU."""
    with session() as nvml:
        if nvml is None:
            return []
        return [int(nvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles(nvml)]


def host_available_bytes(root: Path = Path("/")) -> int:
    """Host memory that a new process could get, within the limit of a container too.

    Args:
        root: Where the system's files are.
    """
    available = int(psutil.virtual_memory().available)
    groups = root / "sys/fs/cgroup"
    for limit, used in (
        (groups / "memory.max", groups / "memory.current"),
        (groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
            available = min(available, int(limit.read_text()) - int(used.read_text()) + _file_cache_bytes(used.parent))
    return available


def _file_cache_bytes(group: Path) -> int:
    """What a control group holds of files and gives up when memory is short."""
    for line in (group / "memory.stat").read_text().splitlines():
        name, _, number = line.partition(" ")
        if name == "inactive_file":
            return int(number)
    return 0


def package_version(name: str) -> str:
    """The version of an installed package, or an empty text."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 13, 0) for 2.13.0+cu130; empty if there are none."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in found[0].split(".")) if found else ()


def torch_build() -> tuple[str, str | None]:
    """Version of the installed torch, and the CUDA that it is built for; torch itself is not imported.

    Returns:
        The version as torch tells it, such as 2.13.0+cu130, empty if torch is not there; and the version of CUDA, empty
        if torch is built without, None if that cannot be known. A package's metadata may lack both.
    """
    try:
        source = (package_folder("torch") / "version.py").read_text(encoding="utf-8")
    except (ModuleNotFoundError, OSError):
        return package_version("torch"), None
    values = dict(re.findall(r"""^(__version__|cuda)\b[^=\n]*= *(?:["'](.*)["']|None)""", source, re.MULTILINE))
    return values.get("__version__") or package_version("torch"), values.get("cuda")


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
