"""Other programs on the GPU: who they are, and what to do about them. None is ever ended."""

import time
from collections.abc import Callable, Collection, Sequence

from wan_sweep.checks.check import Check
from wan_sweep.nvml import GpuProcess, GpuState
from wan_sweep.schema import ForeignProcesses
from wan_sweep.units import MIB, format_bytes, format_seconds

# Containers hide processes but not their memory. What nobody is known to hold is somebody's from here on: idle cards
# hold a few MiB, and a CUDA context takes hundreds.
UNEXPLAINED_BYTES = 128 * MIB

LIMIT_S = 3600.0
LOOK_EVERY_S = 5.0
SAY_EVERY_S = 60.0


def occupants(gpus: Sequence[GpuState], ours: Collection[int]) -> list[str]:
    """Who else uses these GPUs, in words; processes whose number is ours do not count."""
    words = []
    for gpu in gpus:
        words += [f"{_who(one)} on GPU {gpu.index}" for one in gpu.processes if one.pid not in ours]
        known = sum(one.used_bytes or 0 for one in gpu.processes)
        is_all_told = all(one.used_bytes is not None for one in gpu.processes)
        if gpu.allocated_bytes is not None and is_all_told and gpu.allocated_bytes - known > UNEXPLAINED_BYTES:
            words.append(f"somebody unseen with {format_bytes(gpu.allocated_bytes - known)} on GPU {gpu.index}")
    return words


def _who(process: GpuProcess) -> str:
    name = process.name or "a process unseen from here"
    used = "" if process.used_bytes is None else f" with {format_bytes(process.used_bytes)}"
    return f"{name} (pid {process.pid}){used}"


def check_processes(
    policy: ForeignProcesses,
    read: Callable[[], Sequence[GpuState]],
    *,
    ours: Collection[int],
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Check:
    """Looks for other programs and does as the policy says; with "wait" it may take up to `LIMIT_S`.

    Args:
        policy: Warn of them, refuse to start, or wait until they are gone.
        read: The state of the GPUs that the jobs will use, now.
        ours: Processes that belong to this sweep.
        say: Tells the user that it waits, and for whom.
        sleep: Waits between two looks.
        clock: Seconds, growing.
    """
    who = occupants(read(), ours)
    if not who:
        return Check(name="processes", text="nobody else uses the GPU")
    began = clock()
    if policy == "wait":
        who = _wait(lambda: occupants(read(), ours), who, say, sleep, clock)
    waited = f", {format_seconds(clock() - began)} later" if policy == "wait" else ""
    if not who:
        return Check(name="processes", text=f"nobody else uses the GPU any more{waited}")
    text = f"others use the GPU{' still' if waited else ''}{waited}: {', '.join(who)}"
    if policy == "warn":
        return Check(
            name="processes",
            state="warning",
            text=f"{text}; device_used contains them, times suffer, and less memory is left",
            advice="foreign_processes=wait waits until they are gone, foreign_processes=refuse does not start",
        )
    return Check(
        name="processes",
        state="refused",
        text=text,
        advice="end them if they are yours, choose another GPU with CUDA_VISIBLE_DEVICES, or foreign_processes=warn",
    )


def _wait(
    look: Callable[[], list[str]],
    who: list[str],
    say: Callable[[str], None],
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> list[str]:
    """Who is left when nobody is, or when the time is up."""
    deadline, say_at = clock() + LIMIT_S, clock()
    while who and clock() < deadline:
        if clock() >= say_at:
            say(f"Waiting for the GPU, {format_seconds(deadline - clock())} at most: {', '.join(who)}")
            say_at += SAY_EVERY_S
        sleep(LOOK_EVERY_S)
        who = look()
    return who
