"""GPUs that an estimate can be made for, without asking one. No torch in here: whoever plans imports this file."""

from collections.abc import Mapping
from dataclasses import dataclass

from wan21.errors import UsageError
from wan_sweep.units import MIB

HOPPER = (9, 0)
BLACKWELL_SERVER = (10, 0)


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU.

    Attributes:
        name: as `card=` takes it.
        capability: compute capability, major and minor; decides which kernels torch takes.
        device_bytes: what the driver says that it has.
    """

    name: str
    capability: tuple[int, int]
    device_bytes: int

    @property
    def cublas_workspace_bytes(self) -> int:
        """What torch gives cuBLAS for each stream on which it is used (aten/src/ATen/cuda/CublasHandlePool.cpp)."""
        return 32 * MIB if self.capability == HOPPER else 8_519_680  # 8.125 MiB

    @property
    def prefers_cudnn_attention(self) -> bool:
        """Whether torch takes cuDNN's attention before all others."""
        return self.capability in {HOPPER, BLACKWELL_SERVER}


def _card(name: str, capability: tuple[int, int], device_mib: int) -> Card:
    return Card(name=name, capability=capability, device_bytes=device_mib * MIB)


CARDS: Mapping[str, Card] = {
    card.name: card
    for card in (
        _card("H100-80GB", HOPPER, 81559),
        _card("H200-141GB", HOPPER, 143771),
        _card("A100-80GB", (8, 0), 81920),
        _card("A100-40GB", (8, 0), 40960),
        _card("L40S-48GB", (8, 9), 46068),
        _card("RTX4090-24GB", (8, 9), 24564),
        _card("RTX3090-24GB", (8, 6), 24576),
        _card("RTX4080-16GB", (8, 9), 16376),
        _card("RTX3060-12GB", (8, 6), 12288),
        _card("RTX4060-8GB", (8, 9), 8188),
    )
}


def card_named(name: str) -> Card:
    """The card of this name.

    Raises:
        UsageError: it is not known.
    """
    if name not in CARDS:
        known = ", ".join(CARDS)
        raise UsageError(f"card={name} is not known; choose {known}")
    return CARDS[name]
