"""The numbers of several ranks as those of one job: the largest of all, never a sum, and which rank it was."""

from collections.abc import Mapping, Sequence
from typing import Any

PEAK_RANK = "ranks/peak_rank"
SLOWEST_RANK = "ranks/slowest_rank"
NUM_RANKS = "ranks/num"

_PEAK = "memory/peak/allocated_bytes"
_TOTAL = "time/total_s"
_RESIDENT = "memory/resident/"


def told_together(by_rank: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """What all ranks that left a result told, as a single worker would have told it.

    Facts are those of the first rank; numbers are `headline`'s; what makes a number doubtful is said with its rank.
    """
    if not by_rank:
        return {}
    first = by_rank[min(by_rank)]
    ranks = [
        {
            "rank": rank,
            "outcome": told["outcome"],
            "metrics": told.get("metrics", {}),
            "series": told.get("series", {}),
        }
        for rank, told in sorted(by_rank.items())
    ]
    return {
        **first,
        "metrics": headline(ranks),
        "series": _largest_series([rank["series"] for rank in ranks]),
        "warnings": [
            {**warning, "text": f"rank {rank}: {warning['text']}"}
            for rank, told in sorted(by_rank.items())
            for warning in told.get("warnings", [])
        ],
        "ranks": ranks,
    }


def headline(ranks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of a job from those of its ranks: the largest of each metric.

    A sum would hide the rank that is about to run out of memory, and a step takes as long as its slowest rank. Only
    what stands on the device in a phase is that of one rank, the one with the phase's peak: parts go with their whole.
    """
    metrics = [rank["metrics"] for rank in ranks]
    names = dict.fromkeys(name for one in metrics for name in one)
    found = {name: max(one[name] for one in metrics if name in one) for name in names if not name.startswith(_RESIDENT)}
    for phase in dict.fromkeys(_phase(name) for name in names if name.startswith(_RESIDENT)):
        peak = f"memory/peak/{phase}/allocated_bytes"
        fullest = max(metrics, key=lambda one, peak=peak: one.get(peak, -1))  # type: ignore[misc]
        prefix = f"{_RESIDENT}{phase}/"
        found |= {name: value for name, value in fullest.items() if name.startswith(prefix)}
    for name, metric in ((PEAK_RANK, _PEAK), (SLOWEST_RANK, _TOTAL)):
        having = [rank for rank in ranks if metric in rank["metrics"]]
        if having:
            found[name] = max(having, key=lambda rank, metric=metric: rank["metrics"][metric])["rank"]  # type: ignore[misc]
    return {**found, NUM_RANKS: len(ranks)} if found else {}


def with_metrics(ranks: Sequence[Mapping[str, Any]], more: Mapping[int, Mapping[str, float]]) -> list[dict[str, Any]]:
    """The ranks of a record with more metrics, by rank, such as those that another pass found."""
    return [{**rank, "metrics": {**rank["metrics"], **more.get(rank["rank"], {})}} for rank in ranks]


def _phase(resident: str) -> str:
    return resident.removeprefix(_RESIDENT).partition("/")[0]


def _largest_series(series: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Step by step the largest of all ranks, as far as all of them came."""
    names = dict.fromkeys(name for one in series for name in one)
    return {
        name: [max(values) for values in zip(*(one[name] for one in series if name in one), strict=False)]
        for name in names
    }
