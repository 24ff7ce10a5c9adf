"""FlashAttention-3 where its package is not: what a call allocates, and nothing that computes.

The pipeline imports the package where it calls it. While an estimate runs a module of its name stands in, whether the
package is installed or not, for its own operations know nothing of fake tensors.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from wan_sweep.estimate.memory import Basis, DeviceMemory, Holding

PACKAGE = "fa3_fwd_interface"


@contextmanager
def stand_in(memory: DeviceMemory, lse_bytes_per_row: int | None) -> Iterator[None]:
    """Inside it the package is one that only counts.

    Args:
        memory: where.
        lse_bytes_per_row: what it takes beside the result for each query and head, as measured; None: nobody has, and
            a float32 is what the log of a denominator takes.
    """
    basis: Basis = "guess" if lse_bytes_per_row is None else "table"

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object) -> torch.Tensor:
        """Of [B, L, N, K] each; in eight bits the result is in bfloat16."""
        del k
        dtype = torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype
        out = torch.empty((*q.shape[:3], v.shape[3]), dtype=dtype, device=q.device)
        num_bytes = q.shape[:3].numel() * (4 if lse_bytes_per_row is None else lse_bytes_per_row)
        memory.give(memory.take(Holding(num_bytes, "fa3_fwd (log of denominators)", memory.place, basis)))
        return out

    module = ModuleType(PACKAGE)
    module.__spec__ = ModuleSpec(PACKAGE, None)  # it is asked whether the package is there
    module.__dict__["flash_attn_func"] = flash_attn_func
    before = sys.modules.get(PACKAGE)
    sys.modules[PACKAGE] = module
    try:
        yield
    finally:
        if before is None:
            del sys.modules[PACKAGE]
        else:
            sys.modules[PACKAGE] = before
