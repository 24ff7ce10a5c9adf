"""What kernels of CUDA allocate, where an operation on a fake tensor does not show it.

An entry stands for one operation as it reaches the dispatcher. It says which memory comes before the outputs (copies of
inputs that the kernel cannot read as they lie), which with them (a kernel's own workspace), and which stays for good.
Memory that comes before goes after the call; so does a workspace, and a copy of a weight.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

from wan21.kernels import vae_ops
from wan_sweep.cards import Card
from wan_sweep.estimate.kernel_table import KernelTable, row_for
from wan_sweep.estimate.memory import Basis

aten: Any = torch.ops.aten
VECTOR_BYTES = 16
"""What cuDNN's kernels read at once; where the channels of a result do not divide by it, others take over."""

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True, slots=True)
class Hidden:
    """Memory that a kernel takes for itself."""

    num_bytes: int
    name: str
    basis: Basis


def _none(*_: object) -> list[Hidden]:
    return []


def _nothing(*_: object) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Kernel:
    """What one operation allocates besides its outputs.

    Attributes:
        before: copies made before the outputs are, from the arguments.
        beside: what comes once the outputs are there, from arguments and outputs.
        possible: bytes that may come then as well, where nobody has measured; nothing is taken, only considered.
        kept: workspaces of a library that come with the first call on a stream, and stay.
        stand_in: makes the outputs, where those of fake tensors would lie differently in memory.
    """

    before: Callable[[Sequence[Any]], list[Hidden]] = _none
    beside: Callable[[Sequence[Any], Any], list[Hidden]] = _none
    possible: Callable[[Sequence[Any], Any], int] = _nothing
    kept: tuple[Hidden, ...] = ()
    stand_in: Callable[[Sequence[Any]], Any] | None = None


_heard: list[dict[str, dict[str, Any]]] = []
"""Where convolutions are noted while somebody wants to hear of them."""


@contextmanager
def heard_convolutions() -> Iterator[dict[str, dict[str, Any]]]:
    """Inside it every distinct convolution of a dry run is noted, by signature, in what is needed to run it again."""
    heard: dict[str, dict[str, Any]] = {}
    _heard.append(heard)
    try:
        yield heard
    finally:
        _heard.remove(heard)


def signature(args: Sequence[Any]) -> str:
    """What decides over the kernel of a convolution: shapes, layouts, format, stride and padding."""
    x, weight, _, stride, padding = args[:5]
    dtype = str(x.dtype).removeprefix("torch.")
    return f"{dtype} {list(x.shape)}/{list(x.stride())} {list(weight.shape)}/{list(weight.stride())} {stride} {padding}"


def _described(args: Sequence[Any]) -> dict[str, Any]:
    x, weight, _, stride, padding = args[:5]
    return {
        "signature": signature(args),
        "dtype": str(x.dtype).removeprefix("torch."),
        "input": list(x.shape),
        "input_strides": list(x.stride()),
        "weight": list(weight.shape),
        "weight_strides": list(weight.stride()),
        "stride": list(stride),
        "padding": list(padding),
    }


def num_bytes(tensor: torch.Tensor) -> int:
    """Bytes of all elements."""
    return tensor.numel() * tensor.element_size()


def kernels(card: Card) -> Mapping[Any, Kernel]:
    """The operations of which fake tensors do not show everything, by overload."""
    row, is_measured = row_for(card)
    basis: Basis = "table" if is_measured else "guess"
    cublas = Hidden(card.cublas_workspace_bytes, "cuBLAS workspace", "rule")
    cublaslt = Hidden(row.cublaslt_workspace_bytes, "cuBLASLt workspace", basis)
    return {
        aten.mm.default: Kernel(kept=(cublas,)),
        aten.bmm.default: Kernel(kept=(cublas,)),
        aten.addmm.default: Kernel(kept=(cublas, cublaslt)),  # cuBLASLt adds the bias
        aten.native_layer_norm.default: Kernel(before=_contiguous_input),
        vae_ops.CONV: Kernel(before=_weight_as_it_is_read),
        aten.convolution.default: Kernel(
            beside=lambda args, out: _convolution_buffers(args, out, row, basis),
            possible=_nothing if is_measured else _convolution_copies,
            stand_in=_convolution,
        ),
    }


def _contiguous_input(args: Sequence[Any]) -> list[Hidden]:
    """The kernel reads rows one after the other."""
    x: torch.Tensor = args[0]
    return [] if x.is_contiguous() else [Hidden(num_bytes(x), "contiguous input", "rule")]


def _weight_as_it_is_read(args: Sequence[Any]) -> list[Hidden]:
    """Our decoder's kernel reads a weight densely, channels last; the last taps alone, for one frame, do not lie so."""
    weight: torch.Tensor = args[1]
    if weight.movedim(1, -1).is_contiguous():
        return []
    return [Hidden(num_bytes(weight), "weight in the order of the kernel", "rule")]


def _layout(x: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """The layout that torch lets cuDNN compute in: channels last as soon as one of both has it."""
    last = CHANNELS_LAST[weight.dim()]
    if suggest_memory_format(x) == last or suggest_memory_format(weight) == last:
        return last
    return torch.contiguous_format


def _convolution(args: Sequence[Any]) -> torch.Tensor:
    x, weight, _, stride, padding, dilation = args[:6]
    sides = [
        (side + 2 * pad - gap * (kernel - 1) - 1) // step + 1
        for side, kernel, step, pad, gap in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    shape = (x.shape[0], weight.shape[0], *sides)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x, weight))


def _convolution_copies(args: Sequence[Any], out: torch.Tensor) -> int:
    """Input, weight and result once more: what kernels take that want another layout."""
    return num_bytes(args[0]) + num_bytes(args[1]) + num_bytes(out)


def _convolution_buffers(args: Sequence[Any], out: torch.Tensor, row: KernelTable, basis: Basis) -> list[Hidden]:
    x, weight = args[:2]
    for heard in _heard:
        heard.setdefault(signature(args), _described(args))
    measured = row.convolutions.get(signature(args)) if row.convolutions else None
    if measured is not None:
        return [Hidden(measured, "convolution's copies and workspace", basis)] if measured else []
    layout = _layout(x, weight)
    buffers = []
    if not x.is_contiguous(memory_format=layout):
        buffers.append(Hidden(num_bytes(x), "input without gaps", "rule"))
    if not weight.is_contiguous(memory_format=layout):
        buffers.append(Hidden(num_bytes(weight), "weight in the input's layout", "rule"))
    if math.prod(weight.shape[2:]) == 1:
        return buffers
    if layout == torch.contiguous_format:
        # cuDNN's kernels for tensor cores want channels last.
        buffers.append(Hidden(_convolution_copies(args, out), "cuDNN's copies in channels-last order", basis))
    elif weight.shape[0] % (VECTOR_BYTES // x.element_size()):
        buffers.append(Hidden(_few_channels(x, weight, out), "cuDNN's copies for few channels", basis))
    return buffers


def _few_channels(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> int:
    """What cuDNN takes where a result's channels do not divide by what kernels read at once; seen on an H200.

    Input and weight again in float32. In half precision weight and result with channels up to the next that divide, or
    of a lone frame the weight again.
    """
    if x.element_size() == torch.float32.itemsize:
        return num_bytes(x) + num_bytes(weight) + VECTOR_BYTES
    if math.prod(out.shape[2:-2]) == 1:
        return num_bytes(weight) + VECTOR_BYTES
    at_once = VECTOR_BYTES // x.element_size()
    channels = math.ceil(weight.shape[0] / at_once) * at_once
    return (num_bytes(weight) + num_bytes(out)) // weight.shape[0] * channels + VECTOR_BYTES
