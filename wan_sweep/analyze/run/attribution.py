"""attribution.json: what was on the device at the peaks, by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_sweep.analyze.finding import Analysis, Column, Fact, Section, Table, Value, top_table
from wan_sweep.analyze.panels import Bars, Panel
from wan_sweep.analyze.source import UnreadableFileError
from wan_sweep.units import format_bytes

SCHEMA_VERSION = 1

Peak = Mapping[str, Any]

_COLUMNS = (
    Column(key="allocated_bytes", title="bytes", unit="bytes", rank=9),
    Column(key="count", title="count", unit="count", rank=4),
    Column(key="kind", title="kind", rank=7),
    Column(key="component", title="component", rank=7),
    Column(key="in", title="allocated in", rank=6),
    Column(key="module", title="module or parameter", rank=8),
    Column(key="operation", title="operation", rank=8),
    Column(key="shape", title="shape", rank=5),
    Column(key="dtype", title="dtype", rank=3),
)


def analyze_attribution(content: Mapping[str, Any], path: Path, top: int) -> Analysis:
    """What an attribution says.

    Raises:
        UnreadableFileError: a peak lacks something.
    """
    try:
        peaks: list[tuple[str, str, Peak]] = []
        for number, peak in enumerate(content["peaks"]):
            title = "Peak of the run" if peak["scope"] == "run" else f"Peak of {peak['phase']}"
            peaks.append((f"peak_{number}_{peak['scope']}_{peak['phase']}", title, peak))
        if content.get("oom"):
            peaks.insert(0, ("oom", "At the OOM", content["oom"]))
        return Analysis(
            kind="attribution",
            title="Attribution of a job's memory",
            path=str(path),
            headline=[_sentence(title, peak) for _, title, peak in peaks[:2]],
            sections=[_overview(content), *(_section(key, title, peak, top) for key, title, peak in peaks)],
            panels=_panels(peaks[0][1], peaks[0][2], top) if peaks else [],
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise UnreadableFileError(
            f"{path} is not a complete attribution.json: {error!r}; run the job again with profile_memory=true"
        ) from error


def _place(item: Mapping[str, Any]) -> str:
    step = "" if item.get("step") is None else f"step {item['step']}"
    block = "" if item.get("block") is None else f"block {item['block']}"
    return ", ".join(filter(None, (item.get("phase"), step, block)))


def _sentence(title: str, peak: Peak) -> str:
    parts = [f"{name} weights {format_bytes(size)}" for name, size in peak["weights"].items() if size]
    parts.append(f"all else {format_bytes(peak['activation_bytes'])}")
    doing = ", ".join(filter(None, (_place(peak), peak["module"], peak["operation"])))
    return f"{title}: {format_bytes(peak['allocated_bytes'])} allocated in {doing}; {', '.join(parts)}."


def _overview(content: Mapping[str, Any]) -> Section:
    facts = [
        Fact(key="device", label="device", value=content.get("device")),
        Fact(key="outcome", label="outcome", value=content.get("outcome")),
        Fact(key="reason", label="reason", value=content.get("reason") or None),
        Fact(key="num_steps", label="steps", value=content.get("num_steps"), unit="count"),
    ]
    return Section(key="overview", title="Recorded", facts=facts)


def _section(key: str, title: str, peak: Peak, top: int) -> Section:
    allocated = peak["allocated_bytes"]
    facts = [
        Fact(key="request_bytes", label="request that failed", value=peak.get("request_bytes"), unit="bytes"),
        Fact(key="allocated_bytes", label="allocated", value=allocated, unit="bytes"),
        Fact(key="in", label="in", value=_place(peak)),
        Fact(key="module", label="module", value=peak["module"] or None),
        Fact(key="operation", label="operation", value=peak["operation"] or None),
        *(
            Fact(key=f"weights_{name}_bytes", label=f"{name} weights", value=size, unit="bytes")
            for name, size in peak["weights"].items()
        ),
        Fact(key="activation_bytes", label="all else", value=peak["activation_bytes"], unit="bytes"),
        Fact(key="unattributed_bytes", label="without a name", value=peak["unattributed_bytes"], unit="bytes"),
        Fact(
            key="named_pct",
            label="named",
            value=100 * peak["named_bytes"] / allocated if allocated else None,
            unit="percent",
        ),
    ]
    return Section(key=key, title=title, facts=facts, tables=[_live(peak, top)])


def _live(peak: Peak, top: int) -> Table:
    rows: list[tuple[Value, ...]] = [
        (
            item["bytes"],
            item["count"],
            item["kind"],
            item["component"] or None,
            _place(item) or None,
            item["parameter"] or item["module"] or None,
            item["operation"] or None,
            None if item["shape"] is None else "x".join(map(str, item["shape"])),
            item["dtype"],
        )
        for item in peak["live"]
    ]
    return top_table("live", "Live then", _COLUMNS, rows, top=top)


def _panels(title: str, peak: Peak, top: int) -> list[Panel]:
    bars = [
        (
            "  ".join(filter(None, (item["component"], item["parameter"] or item["module"], item["operation"]))),
            item["bytes"],
        )
        for item in peak["live"][:top]
    ]
    return [Bars(title=f"{title}: the largest of what was live", unit="bytes", bars=bars)] if bars else []
