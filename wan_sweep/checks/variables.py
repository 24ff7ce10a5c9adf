"""Environment variables that slow a run down or change what it takes."""

from collections.abc import Mapping
from dataclasses import dataclass

from wan_sweep.checks.check import Check


@dataclass(frozen=True, kw_only=True)
class Spoiler:
    """What a variable does to a measurement, unless its value is harmless."""

    effect: str
    harmless: tuple[str, ...] = ("", "0")
    is_for_gpus: bool = True


_LOGS = "logs are written during the run, which takes time"

SPOILERS: Mapping[str, Spoiler] = {
    "CUDA_LAUNCH_BLOCKING": Spoiler(effect="the host waits for each kernel, so times are not those of a usual run"),
    "CUDA_MODULE_LOADING": Spoiler(effect="kernels are loaded before they are used", harmless=("", "LAZY", "DEFAULT")),
    "CUDA_INJECTION64_PATH": Spoiler(effect="a profiler or debugger stands between torch and the driver"),
    "CUBLAS_WORKSPACE_CONFIG": Spoiler(effect="cuBLAS keeps a workspace of another size", harmless=("",)),
    "NVIDIA_TF32_OVERRIDE": Spoiler(effect="float32 is computed otherwise than torch's settings say", harmless=("",)),
    "CUBLAS_LOGINFO_DBG": Spoiler(effect=_LOGS),
    "CUBLASLT_LOG_LEVEL": Spoiler(effect=_LOGS),
    "CUDNN_LOGINFO_DBG": Spoiler(effect=_LOGS),
    "CUDNN_LOGLEVEL_DBG": Spoiler(effect=_LOGS),
    "ONEDNN_VERBOSE": Spoiler(effect=_LOGS, is_for_gpus=False),
    "TORCH_LOGS": Spoiler(effect=_LOGS, is_for_gpus=False),
    "PYTHONTRACEMALLOC": Spoiler(effect="Python notes each of its own allocations", is_for_gpus=False),
}


def check_variables(environ: Mapping[str, str], *, uses_gpu: bool) -> list[Check]:
    """A warning for each variable that spoils a measurement; or that there is none."""
    found = [
        Check(
            name="variables",
            state="warning",
            text=f"with {name}={environ[name]} {spoiler.effect}",
            advice=f"unset {name}",
        )
        for name, spoiler in SPOILERS.items()
        if name in environ and environ[name] not in spoiler.harmless and (uses_gpu or not spoiler.is_for_gpus)
    ]
    return found or [Check(name="variables", text="none that disturbs a measurement")]
