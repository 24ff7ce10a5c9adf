"""`torchrun --nproc-per-node=2 -m wan_sweep.estimate.calibrate_nccl [FOLDER]`: what NCCL takes on two such GPUs.

It adds one figure to the kernel table of the card, which `calibrate` has to have made before: the memory outside
torch's allocator that a process holds more, once a group of processes has sent, gathered, broadcast and added up. The
first group is measured, with all that the library loads for it; further ones are taken to be as large.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from wan21.layout import Layout
from wan21.parallel.exchange import add_up, all_gather, broadcast, send_and_receive
from wan21.parallel.world import Group, connect
from wan21.runtime import CudaRuntime
from wan_sweep.cards import CARDS, card_like
from wan_sweep.errors import UsageError
from wan_sweep.estimate.kernel_table import TABLES, row_for

MESSAGE_BYTES = 64 * 2**20
"""As large as those of a real run, for which NCCL opens all its channels."""


def exchange_all_ways(group: Group, device: torch.device) -> None:
    """Every kind of message that a run sends, once."""
    own = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8, device=device)
    everything = own.new_empty(group.size * own.numel())
    ahead, behind = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    send_and_receive(group, [(ahead, own)], [(behind, everything[: own.numel()])]).wait()
    all_gather(group, everything, own)
    broadcast(group, own)
    add_up(group, own)


def outside_bytes(runtime: CudaRuntime) -> int:
    """What is used on the device and is not torch's allocator's; nobody else may use it meanwhile."""
    runtime.synchronize()
    return runtime.device_used_bytes() - torch.cuda.memory_reserved(runtime.device)


def calibrate_nccl(folder: Path) -> Path | None:
    """Measures, and writes the figure into the table of this GPU; ranks but the first return None.

    Raises:
        UsageError: there is one process, the card is not known, or it has no table yet.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        raise UsageError("one process has nobody to talk to; start this with torchrun --nproc-per-node=2")
    runtime = CudaRuntime(int(os.environ["LOCAL_RANK"]))
    name, total = torch.cuda.get_device_name(runtime.device), runtime.device_total_bytes()
    card = card_like(name, total)
    if card is None:
        raise UsageError(f"{name} is not among the cards {', '.join(CARDS)}; add it to wan_sweep/cards.py first")
    row, is_measured = row_for(card)
    if not is_measured:
        raise UsageError(f"{card.name} has no kernel table; make it first: python -m wan_sweep.estimate.calibrate")
    runtime.warm_up()
    before = outside_bytes(runtime)
    world = connect(Layout(ulysses=size), runtime)
    exchange_all_ways(world.everyone, runtime.device)
    most = torch.tensor(outside_bytes(runtime) - before, device=runtime.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    world.close()
    return replace(row, nccl_bytes_per_communicator=int(most)).save(folder) if world.rank == 0 else None


def main(arguments: list[str]) -> int:
    """Writes into the folder named, by default among the package's own tables."""
    try:
        path = calibrate_nccl(Path(arguments[0]) if arguments else TABLES)
    except UsageError as error:
        sys.stderr.write(f"wan_sweep: {error}\n")
        return error.exit_code
    if path is not None:
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
