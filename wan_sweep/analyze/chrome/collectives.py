"""What ranks exchanged: bytes and seconds of collectives, by step and by name.

With NCCL a collective is a kernel, whose details tell what was exchanged; its time includes waiting for the peers. With
gloo it is a range named "gloo:..." on a thread of its own, with shape and type of the tensor. The bytes are those that
this rank gives away; what it receives is what others give.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wan_sweep.analyze.chrome.collect import KERNEL, UNKNOWN
from wan_sweep.analyze.chrome.forest import NONE, Bools, Floats, Indices, Ints
from wan_sweep.analyze.chrome.messages import GLOO
from wan_sweep.analyze.chrome.stalls import busy_intervals
from wan_sweep.analyze.chrome.trace import Trace
from wan_sweep.analyze.finding import Column, Fact, Section, Value, top_table

NO_COLLECTIVES = "this trace has no collectives: they come with several ranks (ulysses_size, ring_size, cfg_parallel)"

_NCCL = re.compile(r"nccl(Dev)?Kernel_(?P<name>\w+?)(_|\(|$)")


@dataclass(frozen=True, kw_only=True)
class Exchanges:
    """All collectives of a trace; seconds, bytes (UNKNOWN where the trace does not say), and the step of each."""

    start: Floats
    end: Floats
    name: Sequence[str]
    num_bytes: Ints
    step: Indices

    def __len__(self) -> int:
        return len(self.name)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What some collectives came to.

    Attributes:
        num_bytes: None where the trace does not say it of all of them.
        seconds: In which at least one of them ran.
        exposed_seconds: Those of them in which the device did nothing else; None without a device.
    """

    num: int
    num_bytes: int | None
    seconds: float
    exposed_seconds: float | None


def find_exchanges(trace: Trace) -> Exchanges:
    """The collectives of a trace, on its devices and on its CPU."""
    names = [_NCCL.match(name) for name in trace.names]
    activities, on_cpu = trace.activities, trace.exchanges
    chosen = np.flatnonzero((activities.kind == KERNEL) & _is_nccl(trace))
    labels = [match["name"] for index in chosen if (match := names[int(activities.name[index])])]
    return Exchanges(
        start=np.concatenate([activities.start[chosen], on_cpu.start]),
        end=np.concatenate([activities.end[chosen], on_cpu.end]),
        name=[*labels, *(trace.names[int(name)].removeprefix(GLOO) for name in on_cpu.name)],
        num_bytes=np.concatenate([activities.num_bytes[chosen], on_cpu.num_bytes]),
        step=trace.steps.at(np.concatenate([activities.asked_at[chosen], on_cpu.start])),
    )


def share(trace: Trace, exchanges: Exchanges, chosen: Bools) -> Share:
    """What the chosen ones came to."""
    sizes = exchanges.num_bytes[chosen]
    start, end = exchanges.start[chosen], exchanges.end[chosen]
    seconds = _covered(start, end)
    exposed = None
    if len(trace.activities) and len(start):
        others = _others(trace, float(start.min()), float(end.max()))
        both = tuple(np.concatenate(pair) for pair in zip((start, end), others, strict=True))
        exposed = _covered(*both) - _covered(*others)
    return Share(
        num=int(chosen.sum()),
        num_bytes=int(sizes.sum()) if (sizes != UNKNOWN).all() else None,
        seconds=seconds,
        exposed_seconds=exposed,
    )


def _others(trace: Trace, start: float, end: float) -> tuple[Floats, Floats]:
    """Times of all other activities of devices within a stretch of time."""
    activities = trace.activities
    within = ~_is_nccl(trace) & (activities.end > start) & (activities.start < end)
    return activities.start[within], activities.end[within]


def _is_nccl(trace: Trace) -> Bools:
    """Which activities of devices are collectives."""
    is_nccl = np.array([_NCCL.match(name) is not None for name in trace.names], dtype=np.bool_)
    return is_nccl[trace.activities.name] if len(trace.activities) else np.zeros(0, dtype=np.bool_)


def _covered(start: Floats, end: Floats) -> float:
    starts, ends = busy_intervals(start, end)
    return float((ends - starts).sum())


def per_step(trace: Trace) -> Share | None:
    """What one step exchanges, on the average of the recorded ones; None without collectives in steps."""
    exchanges = find_exchanges(trace)
    all_steps = (share(trace, exchanges, exchanges.step == number) for number in range(len(trace.steps)))
    shares = [found for found in all_steps if found.num]
    if not shares:
        return None
    sizes = [found.num_bytes for found in shares if found.num_bytes is not None]
    exposed = [found.exposed_seconds for found in shares if found.exposed_seconds is not None]
    return Share(
        num=round(sum(found.num for found in shares) / len(shares)),
        num_bytes=round(sum(sizes) / len(sizes)) if len(sizes) == len(shares) else None,
        seconds=sum(found.seconds for found in shares) / len(shares),
        exposed_seconds=sum(exposed) / len(exposed) if exposed else None,
    )


_COLUMNS = (
    Column(key="calls", title="calls", unit="count", rank=6),
    Column(key="given_bytes", title="given", unit="bytes", rank=9),
    Column(key="seconds", title="time", unit="seconds", rank=9),
    Column(key="exposed_seconds", title="nothing else ran", unit="seconds", rank=8),
)


def collectives_section(trace: Trace, top: int) -> Section:
    """Collectives by step and by name."""
    exchanges = find_exchanges(trace)
    if not len(exchanges):
        return Section(key="collectives", title="Collectives", missing=NO_COLLECTIVES)
    steps = [
        (*_row(share(trace, exchanges, exchanges.step == number)), label)
        for number, label in enumerate(trace.steps.labels)
        if (exchanges.step == number).any()
    ]
    outside = exchanges.step == NONE
    if outside.any():
        steps.append((*_row(share(trace, exchanges, outside)), "outside steps"))
    names = np.array(exchanges.name)
    kinds: list[tuple[Value, ...]] = [
        (*_row(share(trace, exchanges, names == name)), str(name)) for name in np.unique(names)
    ]
    kinds.sort(key=lambda row: -float(row[2] or 0))
    whole = share(trace, exchanges, np.ones(len(exchanges), dtype=np.bool_))
    return Section(
        key="collectives",
        title="Collectives",
        facts=[
            Fact(key="num_collectives", label="collectives", value=whole.num, unit="count"),
            Fact(key="given_bytes", label="given to other ranks", value=whole.num_bytes, unit="bytes"),
            Fact(key="seconds", label="time in which one ran", value=whole.seconds, unit="seconds"),
        ],
        tables=[
            top_table("steps", "By step", [*_COLUMNS, Column(key="step", title="step", rank=9)], steps, top=top),
            top_table("names", "By name", [*_COLUMNS, Column(key="name", title="name", rank=9)], kinds, top=top),
        ],
        notes=["The time of a collective includes waiting for the other ranks."],
    )


def _row(found: Share) -> tuple[Value, ...]:
    return (found.num, found.num_bytes, found.seconds, found.exposed_seconds)
