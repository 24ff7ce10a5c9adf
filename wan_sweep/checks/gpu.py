"""How a GPU is set up, and whether it runs at its usual speed."""

from wan_sweep.checks.check import Check
from wan_sweep.nvml import GpuState

_WATT = 1000  # milliwatts, in which NVML counts


def check_mode(gpu: GpuState) -> Check:
    """Modes of the card: who may use it, as a whole or in instances, with error correction or without."""
    if gpu.compute_mode == "prohibited":
        return Check(
            name="mode",
            state="refused",
            text=f"GPU {gpu.index} is in compute mode prohibited: no program may compute on it",
            advice="have an administrator run nvidia-smi -c DEFAULT, or choose another GPU with CUDA_VISIBLE_DEVICES",
        )
    if gpu.is_split:
        return Check(
            name="mode",
            state="warning",
            text=f"GPU {gpu.index} is split into instances (MIG): device_used may be that of the whole card",
            advice="compare with jobs on the same kind of instance only",
        )
    switches = {"ECC": gpu.has_ecc, "persistence mode": gpu.is_persistent}
    words = [f"{name} {'on' if is_on else 'off'}" for name, is_on in switches.items() if is_on is not None]
    if gpu.compute_mode:
        words.insert(0, f"compute mode {gpu.compute_mode}")
    return Check(name="mode", text=f"GPU {gpu.index}: {', '.join(words) or 'the driver tells nothing'}")


def check_speed(gpu: GpuState) -> Check:
    """Whether something holds the clocks down now, or a lowered power limit will."""
    state = f"GPU {gpu.index}: {', '.join(_readings(gpu)) or 'the driver tells nothing'}"
    if gpu.slowdowns:
        return Check(
            name="speed",
            state="warning",
            text=f"{state}; its clocks are held down now: {', '.join(gpu.slowdowns)}; times will not compare",
            advice="let it cool down, see to its cooling and power, and measure again",
        )
    limit, usual = gpu.power_limit_mw, gpu.default_power_limit_mw
    if limit is not None and usual is not None and limit < usual:
        return Check(
            name="speed",
            state="warning",
            text=f"{state}, below its default of {usual // _WATT} W; times compare with jobs at this limit only",
            advice=f"have an administrator run nvidia-smi -pl {usual // _WATT}",
        )
    return Check(name="speed", text=state)


def _readings(gpu: GpuState) -> list[str]:
    words = []
    if gpu.sm_clock_mhz is not None:
        words.append(f"{gpu.sm_clock_mhz} MHz of {gpu.max_sm_clock_mhz or '?'}")
    if gpu.temperature_c is not None:
        words.append(f"{gpu.temperature_c} degrees Celsius")
    if gpu.power_limit_mw is not None:
        words.append(f"power limit {gpu.power_limit_mw // _WATT} W")
    return words
