"""From a source of weights to a module that can compute."""

from collections.abc import Iterable

import torch
from torch import nn

from wan21.errors import CheckpointError
from wan21.weights.source import WeightSource

NUM_NAMED = 5


def module_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every name in a module's state dict with its shape."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict(keep_vars=True).items()}


def check_names(module: nn.Module, source: WeightSource) -> None:
    """Refuses a source whose names or shapes are not exactly the module's.

    Raises:
        CheckpointError: names tensors that are missing, unexpected or of another shape, the first few of each.
    """
    needed, stored = module_shapes(module), source.shapes()
    misshaped = [
        f"{name} {list(stored[name])} instead of {list(shape)}"
        for name, shape in needed.items()
        if name in stored and stored[name] != shape
    ]
    problems = [
        f"{label}: {_first(names)}"
        for label, names in (
            ("missing", [name for name in needed if name not in stored]),
            ("unexpected", [name for name in stored if name not in needed]),
            ("of another shape", misshaped),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the weights do not fit {type(module).__name__}; {'; '.join(problems)}; "
            "use the checkpoint that belongs to this model"
        )


def _first(names: list[str]) -> str:
    more = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def materialize(module: nn.Module, source: WeightSource, device: torch.device) -> None:
    """Gives a module built on the meta device its weights, and makes it ready for inference.

    Each parameter is made in its own dtype on the device and written there; there is never a second copy of it. The
    source may hold more than the module needs; `check_names` is what compares the two.
    """
    for name, parameter in list(module.named_parameters()):
        weight = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        source.write(name, weight)
        put(module, name, weight)
    module.eval()


def put(module: nn.Module, name: str, weight: torch.Tensor) -> None:
    """Makes the tensor the module's parameter of this name, without a gradient."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of all parameters, in the dtypes that they have."""
    return total_bytes(module.parameters())


def total_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all these tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
