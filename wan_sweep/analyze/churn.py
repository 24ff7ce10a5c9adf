"""How much is allocated only to be freed again."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from wan_sweep.analyze.finding import Fact

SHORT_LIVED_SECONDS = 1e-3


def churn_facts(
    num_bytes: npt.NDArray[Any],
    lifetime: npt.NDArray[np.float64],
    span: float,
    per_step: tuple[float, float] | None = None,
) -> Sequence[Fact]:
    """The facts about these allocations.

    Args:
        num_bytes: Of each allocation.
        lifetime: Seconds until it was freed; infinite where it was not.
        span: Seconds that were recorded.
        per_step: Number and bytes of those of a step, on average, where steps are known.
    """
    count, total = len(num_bytes), int(num_bytes.sum())
    is_short = lifetime < SHORT_LIVED_SECONDS
    freed = lifetime[np.isfinite(lifetime)]
    facts = [
        Fact(key="num_allocations", label="allocations", value=count, unit="count"),
        Fact(key="allocated_in_all_bytes", label="allocated in all", value=total, unit="bytes"),
    ]
    if span > 0:
        facts += [
            Fact(key="allocations_per_second", label="allocations per second", value=count / span, unit="count"),
            Fact(key="bytes_per_second", label="allocated per second", value=total / span, unit="bytes_per_second"),
        ]
    if per_step is not None:
        facts += [
            Fact(key="allocations_per_step", label="allocations per step", value=per_step[0], unit="count"),
            Fact(key="bytes_per_step", label="allocated per step", value=per_step[1], unit="bytes"),
        ]
    if count:
        limit = "shorter than 1 ms"
        facts += [
            Fact(
                key="short_lived_pct",
                label=f"allocations that lived {limit}",
                value=100 * float(is_short.mean()),
                unit="percent",
            ),
            Fact(
                key="short_lived_bytes_pct",
                label="their share of the bytes",
                value=100 * float(num_bytes[is_short].sum()) / total if total else 0.0,
                unit="percent",
            ),
        ]
    if len(freed):
        facts.append(
            Fact(
                key="median_lifetime_seconds",
                label="median lifetime of those that were freed",
                value=float(np.median(freed)),
                unit="seconds",
            )
        )
    return facts
