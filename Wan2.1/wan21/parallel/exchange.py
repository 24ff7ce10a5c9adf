"""Messages between the members of a group.

On a GPU all of this is asked of NCCL's own stream: it begins when the current stream has come to the call, and whoever
waits makes the current stream wait, never the host. So what is sent must not be written to, nor what is received be
touched, between the call and the wait. On a CPU, with gloo, the host waits.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from wan21.parallel.world import Group

# The newer name of the same call; the older one warns.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Messages:
    """Messages on their way.

    Args:
        sent: kept until they have arrived.
        works: what torch gave for them.
    """

    def __init__(self, sent: Sequence[torch.Tensor], works: Sequence[dist.Work]) -> None:
        self._sent = list(sent)
        self._works = list(works)

    def wait(self) -> None:
        """What the current stream does next comes after them."""
        for work in self._works:
            work.wait()
        self._sent, self._works = [], []


def send_and_receive(
    group: Group, sends: Sequence[tuple[int, torch.Tensor]], receives: Sequence[tuple[int, torch.Tensor]]
) -> Messages:
    """Starts to exchange tensors with other members; all of the group do so in the same order.

    Args:
        group: the members.
        sends: to whom, by rank in the group, and what, contiguous.
        receives: from whom, and where to, contiguous; between two members in the order of their sends.
    """
    operations = [dist.P2POp(dist.isend, tensor, group.ranks[rank], group.handle) for rank, tensor in sends]
    operations += [dist.P2POp(dist.irecv, tensor, group.ranks[rank], group.handle) for rank, tensor in receives]
    return Messages([tensor for _, tensor in sends], dist.batch_isend_irecv(operations))


def exchange(
    group: Group,
    sends: Mapping[int, torch.Tensor],
    receives: Mapping[int, torch.Tensor],
    before: Messages | None = None,
) -> Messages:
    """Starts to exchange tensors with some members; all members of the group have to call it together.

    With NCCL this is one collective, which, unlike messages between two, does not keep torch's allocator from giving
    away what was sent as soon as `wait` was called.

    Args:
        group: the members.
        sends: what each member gets, by rank in the group, contiguous.
        receives: where what each member sends arrives, contiguous.
        before: an earlier message of this group, if these send on what it brings, or arrive where it was sent from. On
            a GPU they come after it anyway, as all of a group travel one after the other.
    """
    example = next(iter(sends.values()))
    if example.device.type != "cuda":
        if before is not None:
            before.wait()
        return send_and_receive(group, list(sends.items()), list(receives.items()))
    nothing = example.new_empty(0)
    outgoing, incoming = (
        [tensors.get(member, nothing) for member in range(group.size)] for tensors in (sends, receives)
    )
    work = dist.all_to_all(incoming, outgoing, group=group.handle, async_op=True)
    return Messages(outgoing, [] if work is None else [work])


def all_gather(group: Group, out: torch.Tensor, own: torch.Tensor) -> None:
    """Everybody's tensors, one after the other, in `out`; `own` may be this process's part of it.

    Args:
        group: the members.
        out: contiguous, as many times the elements of `own` as there are members.
        own: contiguous.
    """
    if group.size == 1:
        if not (in_one_memory(out, own) and out.storage_offset() == own.storage_offset()):
            out.copy_(own.view_as(out))
        return
    _all_gather(out.view(-1), own.view(-1), group=group.handle)


def in_one_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors lie in the same memory; fake tensors have no address to compare."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata  # noqa: SLF001 # their only identity


def gathered(group: Group, own: torch.Tensor) -> torch.Tensor:
    """Everybody's tensors of one shape: [members, ...]."""
    out = own.new_empty(group.size, *own.shape)
    all_gather(group, out, own.contiguous())
    return out


def broadcast(group: Group, tensor: torch.Tensor) -> None:
    """Fills everybody's tensor with that of the group's first member."""
    if group.size > 1:
        dist.broadcast(tensor, group.ranks[0], group=group.handle)


def add_up(group: Group, tensor: torch.Tensor) -> None:
    """Replaces everybody's tensor with the sum of all."""
    if group.size > 1:
        dist.all_reduce(tensor, group=group.handle)


def agreed(group: Group, number: int, device: torch.device) -> int:
    """The number of the group's first member."""
    if group.size == 1:
        return number
    shared = torch.tensor(number, dtype=torch.int64, device=device)
    broadcast(group, shared)
    return int(shared)


def agreed_text(group: Group, text: str, device: torch.device) -> str:
    """The text of the group's first member."""
    if group.size == 1:
        return text
    letters = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    if (size := agreed(group, len(letters), device)) != len(letters):
        letters = torch.empty(size, dtype=torch.uint8, device=device)
    if size:
        broadcast(group, letters)
    return bytes(letters.tolist()).decode()
