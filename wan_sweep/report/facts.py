"""What the numbers of a sweep hold for: when, model, machine, software, weights."""

from collections.abc import Iterable, Sequence

from wan_sweep.record import Record
from wan_sweep.report.sheet import Sheet

_MACHINE = ("gpu", "driver", "cpu", "cpu_cores", "allocator")
_SOFTWARE = ("torch", "cuda", "cudnn", "python")


def title(sheets: Sequence[Sheet]) -> str:
    """Return the title of the report on the parts of one sweep."""
    records = _records(sheets)
    name = records[0].sweep_name if records else sheets[0].folder.name
    number = sum(len(sheet.rows) for sheet in sheets)
    return f"Sweep {name}: {number} configuration{'s' if number != 1 else ''}"


def facts(sheets: Sequence[Sheet]) -> list[tuple[str, str]]:
    """Return name and value of each fact, none where there are no records."""
    records = _records(sheets)
    if not records:
        return []
    first = records[0]
    moments = sorted(record.started_at for record in records if record.started_at)
    found = [
        ("Sweep", first.sweep_id),
        ("Started", f"{moments[0][:19].replace('T', ' ')} UTC" if moments else ""),
        ("What for", str(first.knobs.get("description") or "")),
        ("Model", ", ".join([_each(str(one.knobs.get("model", "")) for one in records), *_workload(records)])),
        ("Weights", _each(record.weights for record in records)),
        ("Made from", _each(record.sources for record in records)),
        ("Machine", _environment(records, _MACHINE)),
        ("Software", ", ".join([_environment(records, _SOFTWARE), *_code(records)])),
        ("Mode", _each(record.mode for record in records)),
    ]
    return [(name, words) for name, words in found if words]


def _records(sheets: Sequence[Sheet]) -> list[Record]:
    return [record for sheet in sheets for record in sheet.records]


def _workload(records: Sequence[Record]) -> list[str]:
    """Return what all jobs have in common of what they were asked for."""
    knobs = records[0].knobs
    return [
        f"{name} {knobs[name]}"
        for name in ("size", "frame_num", "sample_steps")
        if knobs.get(name) and all(record.knobs.get(name) == knobs[name] for record in records)
    ]


def _code(records: Sequence[Record]) -> list[str]:
    environment = records[0].environment
    commit = environment.get("git_commit", "")
    changes = " with changes" if environment.get("git_dirty") == "true" else ""
    return [
        f"wan-sweep code {_each(one.code_version for one in records)}",
        *([f"commit {commit[:12]}{changes}"] if commit else []),
    ]


def _environment(records: Sequence[Record], names: Sequence[str]) -> str:
    values = ((name, _each(record.environment.get(name, "") for record in records)) for name in names)
    return ", ".join(f"{name} {value}" for name, value in values if value) or "unknown"


def _each(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(value for value in values if value))
