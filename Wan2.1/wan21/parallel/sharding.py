"""Weights that lie on several processes and are gathered unit by unit, ahead of use: torch's FSDP.

Sharded are the linear layers of each unit, which are all but some 0.1 % of it. The rest (norms, modulation, position
biases: small, and of another number format) every process keeps whole, so a unit has one format, and what is float32
stays float32 to the bit. Weights are never cast.

Import this only where weights are sharded: torch's FSDP takes a process longer to import than the rest of wan21.

Reference: FSDP (arXiv 2304.11277), in its per-parameter form, `torch.distributed.fsdp.fully_shard`.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from wan21.errors import UsageError
from wan21.parallel.table import own_rows
from wan21.parts import InParts

WritePart = Callable[[str, torch.Tensor, int], None]
"""Fills a flat tensor with the elements of the weight of this name, from a number on."""


def shard(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    *,
    others: Sequence[nn.Module] = (),
    entrances: Sequence[str] = (),
    line: DeviceMesh,
) -> None:
    """Cuts the weights of a module on the meta device into everybody's shares, still without values.

    Args:
        module: all of whose parameters need no gradients from here on.
        blocks: units that are used one after the other; while one is used the next is gathered.
        others: units besides.
        entrances: methods by which the module is used beside `forward`.
        line: all processes, and the kind of device on which the shares will be.

    Raises:
        UsageError: this torch cannot leave parameters out of a unit.

    Memory: this process's share of all, and in passing three times a unit: the one in use, what it was gathered in,
    which torch keeps until the next one is copied out, and what the next one is gathered in.
    """
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise UsageError(
            f"dit_fsdp and t5_fsdp need torch 2.7 or later, and this is {torch.__version__}; install that, or choose "
            "load_strategy=block, which shares streamed weights among the processes"
        )
    module.requires_grad_(requires_grad=False)
    units = [*blocks, *others]
    shared = {weight for unit in units for weight in _linear_weights(unit)}
    whole = set(module.parameters()) - shared
    for unit in (*units, module):
        fully_shard(unit, mesh=line, reshard_after_forward=True, ignored_params=whole)
    for one, following in pairwise(blocks):
        if isinstance(one, FSDPModule) and isinstance(following, FSDPModule):
            one.set_modules_to_forward_prefetch([following])
    for name in entrances:
        register_fsdp_forward_method(module, name)


def _linear_weights(unit: nn.Module) -> Iterator[nn.Parameter]:
    """Of the layers that are used with the unit; what has to be there always may be used without it."""
    always = tuple(f"{owner}." for owner in unit.ALWAYS) if isinstance(unit, InParts) else ()
    for name, layer in unit.named_modules():
        if isinstance(layer, nn.Linear) and not f"{name}.".startswith(always):
            yield from layer.parameters(recurse=False)


def share_bytes(module: nn.Module) -> int:
    """Bytes of this process's part of all parameters; torch makes the parts of a weight all as large as the first."""
    sizes = [
        -(-weight.shape[0] // weight.device_mesh.size()) * weight.shape[1:].numel()
        if isinstance(weight, DTensor)
        else weight.numel()
        for weight in module.parameters()
    ]
    return sum(size * weight.element_size() for size, weight in zip(sizes, module.parameters(), strict=True))


def fill_shares(module: nn.Module, write: WritePart, device: torch.device) -> None:
    """Gives a module that `shard` has cut this process's share of its weights; nothing else is ever there.

    Args:
        module: on the meta device.
        write: where the weights come from.
        device: where the shares shall be.
    """
    # Not `to_empty`, which exchanges the insides of tensors: torch refuses that while its profiler knows them.
    empty = {name: torch.empty_like(parameter, device=device) for name, parameter in module.named_parameters()}
    module.load_state_dict(empty, assign=True)
    for name, (part, first) in own_parts(module).items():
        write(name, part.view(-1), first)


def own_parts(module: nn.Module) -> dict[str, tuple[torch.Tensor, int]]:
    """Like `own_rows`, also of a module that `shard` has cut."""
    found = own_rows(module)
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            rows = parameter.shape[0]
            first_row = min(parameter.device_mesh.get_local_rank() * -(-rows // parameter.device_mesh.size()), rows)
            found[name] = (parameter.to_local(), first_row * math.prod(parameter.shape[1:]))
    return found
