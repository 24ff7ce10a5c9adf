"""How much one configuration differs from another, with the spread of their repeats, and whether that says anything."""

from dataclasses import dataclass

from wan_sweep.report.sheet import Row, Spread, difference_pct

# Times of single runs that are closer than this are never told apart; bytes repeat, seconds do not.
NOISE_PCT = 2.0


@dataclass(frozen=True, kw_only=True)
class Change:
    """By how many percent a metric is larger than in the other configuration.

    Args:
        pct: between the medians.
        low: the smallest between any two repeats.
        high: the largest.
        is_clear: whether the difference stands out from the spread of repeats; of single runs, from `noise_pct`.
        noise_pct: by how much single runs have to differ.
    """

    pct: float
    low: float
    high: float
    is_clear: bool
    noise_pct: float = NOISE_PCT

    @property
    def noise(self) -> str:
        """What it lies within if it is not clear."""
        return noise_words(self.noise_pct) if self.low == self.high else "the spread of repeats"


def change_of(metric: str, row: Row, other: Row) -> Change | None:
    """Return how a metric of a row differs from another row's; None where one of them lacks it or is zero."""
    new, old = row.spread(metric), other.spread(metric)
    if new is None or old is None:
        return None
    pct = difference_pct(new.middle, old.middle)
    low, high = difference_pct(new.low, old.high), difference_pct(new.high, old.low)
    if pct is None or low is None or high is None:
        return None
    return Change(pct=pct, low=low, high=high, is_clear=differ(new, old), noise_pct=noise_pct(new, old))


def noise_pct(*spreads: Spread) -> float:
    """Return by how much the times of single runs have to differ to be told apart: 2 %, or their steps' unrest."""
    return max(NOISE_PCT, *(spread.unrest_pct for spread in spreads))


def noise_words(pct: float) -> str:
    """Return what times of single runs lie within, if it is so much."""
    if pct == NOISE_PCT:
        return f"{pct:g} %"
    return f"the {pct:.0f} % by which the steps of one run differ"


def differ(new: Spread, old: Spread) -> bool:
    """Return whether two times differ: repeats do not overlap, and single runs are further apart than noise."""
    if new.low <= old.high and old.low <= new.high:
        return False
    both_repeat = new.num > 1 and old.num > 1
    return both_repeat or abs(new.middle - old.middle) > min(new.middle, old.middle) * noise_pct(new, old) / 100
