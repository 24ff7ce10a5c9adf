"""A live set in the form of attribution.json: equal allocations in one line, the largest first."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

from wan_sweep.measure.live_set import Allocation, Moment

MOST_ITEMS = 200
"""Lines listed of a live set; the bytes of all others are given as one number."""

BEFORE = "(before the recording)"
"""Stands for the operation of what was there when the recording began."""

Kind = Literal["weights", "activation", "workspace", "unattributed"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """What allocations have in common that share a line."""

    kind: Kind
    component: str = ""
    phase: str = ""
    step: int | None = None
    block: int | None = None
    module: str = ""
    operation: str = ""
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    parameter: str | None = None

    def to_json(self, num_bytes: int, count: int) -> dict[str, Any]:
        """The line, with the bytes and the number of all its allocations."""
        shape = None if self.shape is None else list(self.shape)
        return {"bytes": num_bytes, "count": count, **asdict(self), "shape": shape}


def kind(allocation: Allocation) -> Kind:
    """What an allocation is for."""
    if allocation.weights_of:
        return "weights"
    if not allocation.is_named:
        return "unattributed"
    return "workspace" if allocation.is_workspace else "activation"


def item(allocation: Allocation) -> Item:
    """The line that an allocation belongs to. Nameless ones share a line for each phase."""
    place = allocation.place
    if not allocation.is_named:
        return Item(kind="unattributed", phase=place.phase)
    return Item(
        kind=kind(allocation),
        component=allocation.weights_of or place.component,
        phase=place.phase,
        step=place.step,
        block=place.block,
        module=place.module,
        operation=allocation.operation,
        shape=allocation.shape,
        dtype=allocation.dtype,
        parameter=allocation.parameter,
    )


def describe(moment: Moment, scope: Literal["run", "phase", "oom"]) -> dict[str, Any]:
    """A moment as a peak of attribution.json; bytes of the lines and the rest add up to all that was allocated."""
    num_bytes: Counter[Item] = Counter()
    count: Counter[Item] = Counter()
    weights: Counter[str] = Counter()
    for allocation in moment.allocations:
        line = item(allocation)
        num_bytes[line] += allocation.num_bytes
        count[line] += 1
        if allocation.weights_of:
            weights[allocation.weights_of] += allocation.num_bytes
    if moment.before_bytes:
        before = Item(kind="unattributed", operation=BEFORE)
        num_bytes[before], count[before] = moment.before_bytes, 1
    nameless = [line for line in num_bytes if line.kind == "unattributed"]
    named = sorted((line for line in num_bytes if line.kind != "unattributed"), key=lambda line: -num_bytes[line])
    num_listed = MOST_ITEMS - len(nameless)
    listed = sorted([*nameless, *named[:num_listed]], key=lambda line: -num_bytes[line])
    unattributed = sum(num_bytes[line] for line in nameless)
    return {
        "scope": scope,
        "phase": moment.place.phase,
        "step": moment.place.step,
        "block": moment.place.block,
        "module": moment.place.module,
        "operation": moment.operation,
        "allocated_bytes": moment.allocated_bytes,
        "named_bytes": moment.allocated_bytes - unattributed,
        "unattributed_bytes": unattributed,
        "weights": dict(weights),
        "activation_bytes": moment.allocated_bytes - sum(weights.values()),
        "live": [line.to_json(num_bytes[line], count[line]) for line in listed],
        "num_live": sum(count.values()),
        "rest_bytes": sum(num_bytes[line] for line in named[num_listed:]),
    }
