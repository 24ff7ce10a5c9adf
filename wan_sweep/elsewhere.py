"""Jobs that Hydra's launcher sends to other machines, which cannot be looked at when the sweep is planned."""

from collections.abc import Mapping

from omegaconf import DictConfig

from wan_sweep.environment import Gpu, Machine

WHERE = "where"
"""In the environment of a plan: the launcher that finds machines for its jobs."""

# What describes the machine that plans, and none of those that run.
_OF_THIS_MACHINE = ("fingerprint", "host", "cpu", "cpu_cores", "ram_bytes", "platform", "cuda_visible_devices")


def launcher_of(config: DictConfig) -> str:
    """The name of Hydra's launcher: basic unless another one was chosen."""
    return str(config.hydra.runtime.choices.get("hydra/launcher") or "basic")


def machine_elsewhere(config: DictConfig) -> Machine | None:
    """What is known of the machines that jobs will be sent to; None if they run on this one.

    That is how many GPUs the launcher asks for, and nothing of what they are.
    """
    launcher = config.hydra.launcher
    name = launcher_of(config)
    if name == "submitit_slurm":
        num_gpus = launcher.get("gpus_per_node") or 0
    elif name == "ray" and launcher.ray.init.get("address"):
        num_gpus = launcher.ray.remote.get("num_gpus") or 0
    else:
        return None
    return Machine(gpus=(Gpu(name="", total_bytes=0, used_bytes=0),) * int(num_gpus))


def environment_elsewhere(environment: Mapping[str, str], launcher: str) -> dict[str, str]:
    """What is known of the environment of such jobs: that of this process without what is this machine's."""
    kept = {name: value for name, value in environment.items() if name not in _OF_THIS_MACHINE}
    return {**kept, WHERE: launcher}
