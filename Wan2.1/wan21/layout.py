"""How a run is spread over processes, as sizes. No torch in here.

The processes form a grid of guidance x ring x ulysses, the last of which changes fastest from rank to rank: Ulysses'
exchanges are the most frequent and stay between neighbours.
"""

from dataclasses import dataclass
from typing import Literal

from wan21.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many processes share what; the default is one process that does everything.

    ulysses: processes that share the heads of self attention.
    ring: processes that pass keys and values around.
    cfg: 2 runs the two passes of guidance on two halves of the processes.
    dit_fsdp: each process keeps its part of the transformer's weights, and blocks are gathered ahead of use.
    t5_fsdp: likewise the text encoder.

    Raises:
        UsageError: a size below 1, or `cfg` neither 1 nor 2.
    """

    ulysses: int = 1
    ring: int = 1
    cfg: Literal[1, 2] = 1
    dit_fsdp: bool = False
    t5_fsdp: bool = False

    def __post_init__(self) -> None:
        for name in ("ulysses", "ring"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}_size={getattr(self, name)} is not a number of processes; choose 1 or more")
        if self.cfg not in {1, 2}:
            raise UsageError(f"cfg={self.cfg} cannot be: guidance has two passes; choose 1 or 2")

    @property
    def sequence(self) -> int:
        """How many processes share the tokens of a video."""
        return self.ulysses * self.ring

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        return self.sequence * self.cfg

    def words(self) -> str:
        """The knobs that spread the run, as one sets them."""
        words = [f"{name}_size={size}" for name, size in (("ulysses", self.ulysses), ("ring", self.ring)) if size > 1]
        return ", ".join([*words, "cfg_parallel=true"] if self.cfg > 1 else words) or "ulysses_size=1"


SINGLE = Layout()
