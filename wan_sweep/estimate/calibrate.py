"""`python -m wan_sweep.estimate.calibrate [FOLDER [SHAPES]]`: measures on this GPU what no rule tells, as a table.

The shapes come from estimates of the released models, made in a child process that sees no GPU; each distinct
convolution then runs once here, and what the allocator's peak rose by beyond the result is what cuDNN took. They take a
minute or two, so where a GPU's time is dear they can be made elsewhere before: `... calibrate --shapes > SHAPES`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wan_sweep.cards import CARDS, DEFAULT_CARD, HOPPER, card_like
from wan_sweep.environment import read_machine
from wan_sweep.errors import UsageError
from wan_sweep.estimate.kernel_table import TABLES, KernelTable
from wan_sweep.nvml import ProcessMemory
from wan_sweep.schema import Job

SHAPES = "--shapes"
WORKLOADS = tuple(
    {"model": "t2v-14B", "size": size, "frame_num": frames, "vae_precision": precision}
    for size in ("832*480", "1280*720")
    for frames in (1, 81)
    for precision in ("fp32", "bf16")
)
"""Whole frames, of which every convolution counts."""
TILED = tuple(
    {"model": "t2v-14B", "size": size, "frame_num": 17, "vae_precision": precision, "vae_budget_gib": budget}
    for size in ("832*480", "1280*720")
    for precision, budget in (("fp32", 1.5), ("bf16", 0.69))
)
"""Tiles have many shapes that follow the rule; those with few channels, which may not, are measured."""
FA3_SHAPE = (1, 2048, 12, 128)


def convolution_shapes() -> list[dict[str, Any]]:
    """Every distinct convolution of the workloads, as `kernels.describe` has it."""
    from wan_sweep.allocator import Settings
    from wan_sweep.estimate.dry_run import Simulation, dry_run
    from wan_sweep.estimate.kernels import heard_convolutions

    card = CARDS[DEFAULT_CARD]

    def heard_in(workloads: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        with heard_convolutions() as heard:
            for knobs in workloads:
                job = Job(device="cuda", offload=True, load_strategy="part", sample_steps=1).replace(**knobs)
                dry_run(job, Simulation(card, Settings()))
        return heard

    tiled = {key: one for key, one in heard_in(TILED).items() if has_few_channels(one["weight"][0], one["dtype"])}
    return list((heard_in(WORKLOADS) | tiled).values())


def has_few_channels(num_channels: int, dtype: str) -> bool:
    """Whether the channels of a result do not divide by what kernels read at once."""
    import torch

    from wan_sweep.estimate.kernels import VECTOR_BYTES

    itemsize: int = getattr(torch, dtype).itemsize
    return num_channels * itemsize % VECTOR_BYTES != 0


def measured_convolution(described: dict[str, Any]) -> int:
    """What one convolution takes on this GPU besides its result, in bytes."""
    import torch
    from torch.nn import functional

    dtype = getattr(torch, described["dtype"])
    x, weight = (
        torch.empty_strided(described[name], described[f"{name}_strides"], dtype=dtype, device="cuda").zero_()
        for name in ("input", "weight")
    )
    convolve = functional.conv3d if weight.dim() == 5 else functional.conv2d
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    out = convolve(x, weight, stride=described["stride"], padding=described["padding"])
    stats = torch.cuda.memory_stats()
    del out
    after = stats["requested_bytes.all.current"]
    return int(stats["requested_bytes.all.peak"] - max(before, after))


def linear_workspace_bytes() -> int:
    """What stays from the first linear layer with a bias, beside cuBLAS's own workspace."""
    import torch

    matrix = torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16)
    torch.mm(matrix, matrix)
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.nn.functional.linear(matrix, matrix, matrix[0])
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"] - before)


def fa3_bytes_per_row() -> int | None:
    """What FlashAttention-3 takes beside its result for each query and head; None where it is not, or cannot be."""
    import torch

    if find_spec("fa3_fwd_interface") is None or torch.cuda.get_device_capability()[0] != HOPPER[0]:
        return None
    from wan21.attention import choose_attention

    attend = choose_attention("fa3")
    x = torch.zeros(FA3_SHAPE, device="cuda", dtype=torch.bfloat16)
    attend(x, x, x)  # what stays from a first call is no part of each one
    torch.cuda.reset_peak_memory_stats()
    before = int(torch.cuda.memory_stats()["requested_bytes.all.current"])
    out = attend(x, x, x)
    peak = int(torch.cuda.memory_stats()["requested_bytes.all.peak"])
    batch, length, heads, _ = FA3_SHAPE
    return round((peak - before - out.nbytes) / (batch * length * heads))


def calibrate(folder: Path, shapes: Path | None = None) -> Path:
    """Measures, and writes the table of this GPU.

    Args:
        folder: where to.
        shapes: of convolutions, if they were made before.

    Raises:
        UsageError: there is no GPU, or none that is among the known cards.
    """
    machine = read_machine()
    if not machine.num_gpus:
        raise UsageError("there is no GPU to calibrate on that this torch can use; run this on the card in question")
    card = card_like(machine.gpus[0].name, machine.gpus[0].total_bytes)
    if card is None:
        known = ", ".join(CARDS)
        raise UsageError(f"{machine.gpus[0].name} is not among the cards {known}; add it to wan_sweep/cards.py first")
    told = _shapes_of_a_child() if shapes is None else shapes.read_text("utf-8")
    import torch

    cublaslt = linear_workspace_bytes()
    fa3 = fa3_bytes_per_row()
    convolutions = {}
    for described in json.loads(told):
        try:
            convolutions[described["signature"]] = measured_convolution(described)
        except torch.OutOfMemoryError:
            sys.stderr.write(f"too large for this card, left to the rule: {described['signature']}\n")
        torch.cuda.empty_cache()
    used = ProcessMemory().read()
    reserved = torch.cuda.memory_reserved()
    outside = used - reserved if used is not None else machine.gpus[0].total_bytes - torch.cuda.mem_get_info()[0]
    version = int(torch.backends.cudnn.version() or 0)  # type: ignore[no-untyped-call]
    return KernelTable(
        card=card.name,
        torch=torch.__version__.partition("+")[0],
        cuda=torch.version.cuda or "",
        cudnn=f"{version // 10000}.{version // 100 % 100}",
        context_bytes=outside,
        cublaslt_workspace_bytes=cublaslt,
        fa3_bytes_per_row=fa3,
        convolutions=convolutions,
    ).save(folder)


def _shapes_of_a_child() -> str:
    told = subprocess.run(
        [sys.executable, "-m", "wan_sweep.estimate.calibrate", SHAPES],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        check=True,
    )
    return told.stdout.decode()


def main(arguments: list[str]) -> int:
    """Writes a table into the folder named, by default among the package's own; or shapes to standard output."""
    if arguments == [SHAPES]:
        sys.stdout.write(json.dumps(convolution_shapes()))
        return 0
    try:
        path = calibrate(*map(Path, arguments)) if arguments else calibrate(TABLES)
    except UsageError as error:
        sys.stderr.write(f"wan_sweep: {error}\n")
        return error.exit_code
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
