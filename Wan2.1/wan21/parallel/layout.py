"""Which layouts a task and a request can have. No torch in here: whoever plans runs asks this."""

from wan21.errors import UsageError
from wan21.layout import SINGLE, Layout
from wan21.models import ModelSpec
from wan21.request import Request

__all__ = ["SINGLE", "Layout", "check_layout"]


def check_layout(layout: Layout, spec: ModelSpec, request: Request) -> None:
    """Refuses a layout that cannot be.

    Raises:
        UsageError: the heads do not divide, guidance is to run in parallel and is off, or there is one process to
            shard over.
    """
    heads = spec.dit.num_heads
    if heads % layout.ulysses:
        choices = [str(size) for size in range(1, heads + 1) if heads % size == 0]
        raise UsageError(
            f"num_heads={heads} of {spec.name} is not divisible by ulysses_size={layout.ulysses}; choose "
            f"{', '.join(choices[:-1])} or {choices[-1]}, and ring_size for the rest"
        )
    if layout.cfg > 1 and request.guide_scale == 1:
        raise UsageError(
            "cfg_parallel=true needs the two passes of guidance, and sample_guide_scale=1 runs one; choose another "
            "scale, or cfg_parallel=false"
        )
    if layout.world_size == 1:
        for name in ("dit_fsdp", "t5_fsdp"):
            if getattr(layout, name):
                raise UsageError(
                    f"{name}=true shards weights over ranks, and there is one; choose ulysses_size, ring_size or "
                    f"cfg_parallel so that there are several, or {name}=false"
                )
