"""Sizes: how requests, blocks and segments are rounded. The numbers of the rules are those of the package's text."""

from dataclasses import dataclass

from wan_sweep.units import MIB

MIN_BLOCK_BYTES = 512
SMALL_REQUEST_BYTES = MIB
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
OWN_SEGMENT_BYTES = 10 * MIB
SEGMENT_MULTIPLE_BYTES = 2 * MIB
MAX_NON_SPLIT_ROUNDING_BYTES = 20 * MIB


def round_up(num_bytes: int, multiple: int) -> int:
    """The smallest multiple that is not below a number of bytes."""
    return -(-num_bytes // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What PYTORCH_CUDA_ALLOC_CONF can change, as far as it is modelled.

    Attributes:
        max_split_bytes: None where blocks of any size are split.
        roundup_divisions: `roundup_power2_divisions` for requests below 2 MiB, below 4 MiB, and so on; the last one
            holds for all larger requests.
    """

    expandable_segments: bool = False
    max_split_bytes: int | None = None
    roundup_divisions: tuple[int, ...] = ()

    def rounded(self, requested_bytes: int) -> int:
        """Rule 1."""
        if self.roundup_divisions:
            interval = max(0, requested_bytes.bit_length() - MIB.bit_length())
            divisions = self.roundup_divisions[min(interval, len(self.roundup_divisions) - 1)]
            if divisions > 1 and requested_bytes > MIN_BLOCK_BYTES * divisions:
                if requested_bytes & (requested_bytes - 1) == 0:
                    return requested_bytes
                return round_up(requested_bytes, (1 << (requested_bytes.bit_length() - 1)) // divisions)
        return max(MIN_BLOCK_BYTES, round_up(requested_bytes, MIN_BLOCK_BYTES))

    def splits(self, block_bytes: int, rounded_bytes: int) -> bool:
        """Rule 4: whether a block of which that many bytes are taken leaves another block behind."""
        rest = block_bytes - rounded_bytes
        if self.expandable_segments or rounded_bytes <= SMALL_REQUEST_BYTES:
            return rest >= MIN_BLOCK_BYTES
        return rest > SMALL_REQUEST_BYTES and not self.is_oversize(rounded_bytes)

    def is_oversize(self, num_bytes: int) -> bool:
        """Rule 5: whether blocks of this size are kept whole."""
        return self.max_split_bytes is not None and num_bytes >= self.max_split_bytes


def segment_bytes(rounded_bytes: int) -> int:
    """Rule 3: the size of a segment made for this request."""
    if rounded_bytes <= SMALL_REQUEST_BYTES:
        return SMALL_SEGMENT_BYTES
    if rounded_bytes < OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return round_up(rounded_bytes, SEGMENT_MULTIPLE_BYTES)


def page_bytes(*, is_small: bool) -> int:
    """Rule 8: the pages of which the range of a pool is made."""
    return SMALL_SEGMENT_BYTES if is_small else LARGE_SEGMENT_BYTES
