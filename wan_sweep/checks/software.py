"""Driver, torch, CUDA and cuDNN: whether they fit each other, found out without importing torch."""

from collections.abc import Callable, Collection

from wan_sweep.checks.check import Check
from wan_sweep.environment import Machine, version_numbers
from wan_sweep.schema import AUTO

OLDEST_TORCH = (2, 6)

# From torch 2.9 on, and until cuDNN 9.15, 3-D convolutions in half precision leave cuDNN and unfold their input.
_UNFOLDING_TORCH = (2, 9)
_FOLDING_CUDNN = (9, 15)

_CHOOSE_CPU = "or choose device=cpu"


def wants_gpu(asked: Collection[str]) -> bool:
    """Whether a job would take a GPU, by the values of device that are asked for."""
    return "cuda" in asked or AUTO in asked


def check_driver(machine: Machine, asked: Collection[str]) -> Check:
    """Whether there is a driver that answers, where a job asks for a GPU."""
    if machine.driver_problem:
        text = f"the NVIDIA driver is there and does not answer (NVML: {machine.driver_problem})"
        if not wants_gpu(asked):
            return Check(name="driver", text=text)
        return Check(
            name="driver",
            state="refused",
            text=text,
            advice=f"run nvidia-smi, which should say the same; reload the driver or restart, {_CHOOSE_CPU}",
        )
    if machine.gpus:
        names = ", ".join(gpu.name for gpu in machine.gpus)
        return Check(name="driver", text=f"{machine.driver} for CUDA up to {machine.driver_cuda or '?'}; {names}")
    why = "no NVIDIA driver is loaded"
    if machine.driver:
        why = "the NVIDIA driver shows this process no GPU; see CUDA_VISIBLE_DEVICES"
    if "cuda" not in asked:
        return Check(name="driver", text=f"{why}; the jobs run on the CPU")
    return Check(
        name="driver",
        state="refused" if set(asked) == {"cuda"} else "warning",
        text=f"{why}, and device=cuda is asked for",
        advice="choose device=cpu, or a machine with a GPU",
    )


def check_torch(machine: Machine, asked: Collection[str]) -> Check:
    """Whether torch is there, new enough, and built for the device that a job asks for."""
    oldest = ".".join(map(str, OLDEST_TORCH))
    if not machine.torch_version:
        return Check(
            name="torch", state="refused", text="torch is not installed", advice=f"install torch {oldest} or newer"
        )
    if version_numbers(machine.torch_version)[:2] < OLDEST_TORCH:
        return Check(
            name="torch",
            state="refused",
            text=f"torch {machine.torch_version} is older than {oldest}, the oldest that this version is made for",
            advice=f"install torch {oldest} or newer",
        )
    if machine.gpus and not machine.torch_has_cuda and wants_gpu(asked):
        return Check(
            name="torch",
            state="refused",
            text=f"torch {machine.torch_version} is built without CUDA beside an {machine.gpus[0].name}",
            advice=f"install a CUDA build of torch, {_CHOOSE_CPU}",
        )
    return Check(name="torch", text=machine.torch_version)


def check_cuda(machine: Machine) -> Check:
    """Whether the driver is new enough for the CUDA that torch is built for.

    Within one major version of CUDA every driver will do: compiled kernels run on older ones.
    """
    if not (machine.torch_cuda and machine.driver_cuda):
        return Check(name="cuda", text="what torch is built for, or what the driver supports, is not told")
    text = f"torch is built for CUDA {machine.torch_cuda}, the driver supports up to {machine.driver_cuda}"
    if version_numbers(machine.driver_cuda)[0] < version_numbers(machine.torch_cuda)[0]:
        return Check(
            name="cuda",
            state="refused",
            text=text,
            advice=f"install a newer driver, or a torch built for CUDA {machine.driver_cuda} or older, {_CHOOSE_CPU}",
        )
    return Check(name="cuda", text=text)


def check_cudnn(machine: Machine, version_of: Callable[[str], str]) -> Check:
    """The version of cuDNN as its package tells, and whether half-precision convolutions go around it.

    Args:
        machine: With torch's version and the CUDA that it is built for.
        version_of: Tells the version of an installed package, an empty text if it is not.
    """
    major = (machine.torch_cuda or "").partition(".")[0]
    version = version_of(f"nvidia-cudnn-cu{major}") if major else ""
    if not version:
        return Check(name="cudnn", text="no package tells its version; the records do, after the first job")
    torch, cudnn = (version_numbers(one)[:2] for one in (machine.torch_version, version))
    if torch >= _UNFOLDING_TORCH and cudnn < _FOLDING_CUDNN:
        return Check(
            name="cudnn",
            state="warning",
            text=f"with torch {machine.torch_version} and cuDNN {version}, 3-D convolutions in bf16 and fp16 unfold "
            "their input: a VAE in half precision needs several times its usual memory",
            advice=f"install cuDNN {'.'.join(map(str, _FOLDING_CUDNN))} or newer, or keep vae_precision=fp32",
        )
    return Check(name="cudnn", text=version)
