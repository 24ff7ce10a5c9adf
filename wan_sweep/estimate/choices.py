"""Takes the branches that torch takes on CUDA where a build for CPUs, or a mode, would take others.

These functions decide before a dispatch mode can see them: which attention kernel, whether the RMS norm is one kernel,
whether a bias is added in place. A function mode sits above all of that.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from wan_sweep.cards import Card

Choice = Callable[..., Any]
Attention = Literal["cudnn", "flash", "efficient"]

FLASH_MOST_HEAD_DIM = 256
CUDNN_MOST_HEAD_DIM = 256
EFFICIENT_IN_REGISTERS = 128
"""Wider heads of the memory-efficient kernel do not fit into registers: their sums wait in memory, in float32."""
CUDNN_ATTENTION_BYTES = 256
"""What cuDNN's attention asks for to work in, whatever the shapes; seen on an H200 (torch 2.11, cuDNN 9.19)."""
HALF = (torch.float16, torch.bfloat16)

_BACKENDS: Mapping[Attention, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

aten: Any = torch.ops.aten
_DEVICE: Any = torch.Tensor.device.__get__


def device_of(tensor: torch.Tensor) -> torch.device:
    """Where a tensor is; of a fake one without asking torch, which sends the question through all modes."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def attention_kernel(query: torch.Tensor, card: Card) -> Attention:
    """Which kernel torch takes for attention without a mask, in inference, of those that are allowed just now."""
    if query.dtype in HALF:
        allowed: Any = torch.backends.cuda  # carries no types
        may_be_flash = allowed.flash_sdp_enabled()
        takes_cudnn = allowed.cudnn_sdp_enabled() and (card.prefers_cudnn_attention or not may_be_flash)
        if takes_cudnn and query.shape[-1] <= CUDNN_MOST_HEAD_DIM:
            return "cudnn"
        if may_be_flash and query.shape[-1] <= FLASH_MOST_HEAD_DIM:
            return "flash"
    return "efficient"


class CudaChoices(TorchFunctionMode):
    """Makes functions on one device behave as they do on a card.

    Args:
        device: whose tensors.
        card: what plays it.
    """

    def __init__(self, device: torch.device, card: Card) -> None:
        super().__init__()
        self._device = device
        self._card = card
        self._choices: dict[Any, Choice] = {
            functional.scaled_dot_product_attention: self._attention,
            functional.rms_norm: self._rms_norm,
            functional.linear: self._linear,
            _DEVICE: device_of,
            torch._fused_sdp_choice: self._fused_choice,  # noqa: SLF001 # by which wan21 calls a kernel by its name
        }

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401 # a function of torch carries no type
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        choice = self._choices.get(func)
        if choice is None or device_of(args[0]) != self._device:
            return func(*args, **(kwargs or {}))
        return choice(*args, **(kwargs or {}))

    def _attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Of [B, N, L, K]; the networks pass nothing but these three.

        Memory: the result, in the query's layout for cuDNN and as [B, L, N, K] else; for flash one float32 for each
        row, for the memory-efficient kernel with wide heads of half precision sums in float32.
        """
        kernel = attention_kernel(query, self._card)
        batch, heads, length, _ = query.shape
        width = value.shape[-1]
        if kernel == "cudnn":
            out = torch.empty_like(query)
            # A seed and an offset for dropout, though there is none, and what the kernel works in; gone on return.
            _dropout = [query.new_empty((), dtype=torch.int64) for _ in range(2)]
            _workspace = query.new_empty(CUDNN_ATTENTION_BYTES, dtype=torch.uint8)
            return out
        out = query.new_empty(batch, length, heads, width)
        beside = None
        if kernel == "flash":
            beside = query.new_empty(batch, heads, length, dtype=torch.float32)
        elif width > EFFICIENT_IN_REGISTERS and query.dtype in HALF:
            beside = query.new_empty(batch, length, heads, width, dtype=torch.float32)
        del key, beside
        return out.transpose(1, 2)

    def _fused_choice(self, query: torch.Tensor, *_: torch.Tensor) -> int:
        """The number by which torch knows the kernel."""
        return int(_BACKENDS[attention_kernel(query, self._card)].value)

    def _rms_norm(
        self,
        x: torch.Tensor,
        normalized_shape: list[int],
        weight: torch.Tensor | None = None,
        eps: float | None = None,
    ) -> torch.Tensor:
        """One kernel.

        Memory: the result, and one float32 for each row.
        """
        if weight is not None:
            return functional.rms_norm(x, normalized_shape, weight, eps)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows = x.new_empty((*x.shape[: -len(normalized_shape)], *[1] * len(normalized_shape)), dtype=torch.float32)
        del rows
        return out

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """With a mode around, torch would add the bias into another tensor where the product was not fused."""
        if bias is None or x.dim() == 2 or x.is_contiguous():
            return functional.linear(x, weight, bias)
        return functional.linear(x, weight).add_(bias)
