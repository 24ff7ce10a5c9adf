"""GPUs that can be estimated and planned for without asking one. No torch in here: whoever plans imports this file."""

from collections.abc import Mapping
from dataclasses import dataclass

from wan21.errors import UsageError
from wan_sweep.units import MIB

HOPPER = (9, 0)
BLACKWELL_SERVER = (10, 0)
DEFAULT_CARD = "H100-80GB"
_SIZE_TOLERANCE = 0.1


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU.

    The ceilings are the vendor's dense peaks, which no program reaches: what is divided by them is a lower bound.

    Attributes:
        name: as `card=` takes it.
        capability: compute capability, major and minor; decides which kernels torch takes.
        device_bytes: what the driver says that it has.
        half_flops: operations a second on float16 and bfloat16, summed up in float32.
        tf32_flops: on float32 rounded to TF32, as torch lets convolutions do.
        fp32_flops: on float32, as torch computes products of matrices.
        memory_bandwidth: bytes a second from its own memory.
        link_bandwidth: bytes a second from the host.
    """

    name: str
    capability: tuple[int, int]
    device_bytes: int
    half_flops: float
    tf32_flops: float
    fp32_flops: float
    memory_bandwidth: float
    link_bandwidth: float

    @property
    def cublas_workspace_bytes(self) -> int:
        """What torch gives cuBLAS for each stream on which it is used (aten/src/ATen/cuda/CublasHandlePool.cpp)."""
        return 32 * MIB if self.capability == HOPPER else 8_519_680  # 8.125 MiB

    @property
    def prefers_cudnn_attention(self) -> bool:
        """Whether torch takes cuDNN's attention before all others."""
        return self.capability in {HOPPER, BLACKWELL_SERVER}


def _card(
    name: str,
    capability: tuple[int, int],
    device_mib: int,
    *,
    tflops: tuple[float, float, float],
    gb_per_s: tuple[float, float],
) -> Card:
    """A card from its data sheet: TFLOP/s in half precision, TF32 and float32; GB/s of memory and link."""
    half, tf32, fp32 = (1e12 * rate for rate in tflops)
    memory, link = (1e9 * rate for rate in gb_per_s)
    return Card(
        name=name,
        capability=capability,
        device_bytes=device_mib * MIB,
        half_flops=half,
        tf32_flops=tf32,
        fp32_flops=fp32,
        memory_bandwidth=memory,
        link_bandwidth=link,
    )


CARDS: Mapping[str, Card] = {
    card.name: card
    for card in (
        _card("H100-80GB", HOPPER, 81559, tflops=(989.4, 494.7, 66.9), gb_per_s=(3352, 63)),
        _card("H200-141GB", HOPPER, 143771, tflops=(989.4, 494.7, 66.9), gb_per_s=(4800, 63)),
        _card("A100-80GB", (8, 0), 81920, tflops=(312, 156, 19.5), gb_per_s=(2039, 31.5)),
        _card("A100-40GB", (8, 0), 40960, tflops=(312, 156, 19.5), gb_per_s=(1555, 31.5)),
        _card("L40S-48GB", (8, 9), 46068, tflops=(362.1, 183.2, 91.6), gb_per_s=(864, 31.5)),
        _card("RTX4090-24GB", (8, 9), 24564, tflops=(165.2, 82.6, 82.6), gb_per_s=(1008, 31.5)),
        _card("RTX3090-24GB", (8, 6), 24576, tflops=(71.2, 35.6, 35.6), gb_per_s=(936, 31.5)),
        _card("RTX4080-16GB", (8, 9), 16376, tflops=(97.5, 48.7, 48.7), gb_per_s=(717, 31.5)),
        _card("RTX3060-12GB", (8, 6), 12288, tflops=(25.5, 12.7, 12.7), gb_per_s=(360, 31.5)),
        _card("RTX4060-8GB", (8, 9), 8188, tflops=(30.2, 15.1, 15.1), gb_per_s=(272, 15.8)),
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


def card_like(gpu_name: str, total_bytes: int) -> Card | None:
    """The card that a GPU is, by its name and its memory as the driver tells them; None if it is not known."""
    plain = gpu_name.replace(" ", "").upper()
    for card in CARDS.values():
        is_its_size = abs(card.device_bytes - total_bytes) <= _SIZE_TOLERANCE * card.device_bytes
        if card.name.partition("-")[0].upper() in plain and is_its_size:
            return card
    return None
