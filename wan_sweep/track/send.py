"""Put one job, or one sweep's report, into an opened store: a run, its values in batches, its files."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from wan_sweep.errors import RecordError
from wan_sweep.record import FAILURES, Record, load_record
from wan_sweep.track.ledger import LOCK_NAME, Entry, read_entry, write_entry
from wan_sweep.track.payload import Payload, payload_of
from wan_sweep.track.store import Store

_METRICS_PER_CALL = 1000
_ENTRIES_PER_CALL = 100
_NOTE_CHARACTERS = 7500  # MLflow cuts a tag at 8000
_LARGEST_FILE_BYTES = 64 * 2**20
_JOB_FILES = (
    "config.yaml",
    "record.json",
    "log*.txt",
    "*.png",
    "memory_events.json",
    "attribution.json",
    "trace*",
    "snapshot*",
    "video*.mp4",
    "rank*/log*.txt",
    "rank*/*.png",
    "rank*/memory_events.json",
    "rank*/attribution.json",
    "rank*/snapshot*",
)
_SWEEP_FILES = ("results.csv", "report.md", "report.html", "*.png")
_PICTURE = re.compile(r"^!\[.*\n?", re.MULTILINE)

_Item = TypeVar("_Item")


def send_job(store: Store, folder: Path) -> str:
    """Send the job in `folder` unless it was sent before; returns the run's id.

    A second call after an interruption goes on with the run that the first one began: same values at the same times
    are stored once.

    Raises:
        RecordError: the record is missing or is none.
    """
    payload = _job_payload(folder)
    with FileLock(folder / LOCK_NAME):
        entry = read_entry(folder)
        if entry is not None and entry.is_sent and entry.run_id:
            return entry.run_id
        return _send(store, folder, payload, _JOB_FILES)


def send_sweep(store: Store, folder: Path) -> str:
    """Send the report of the sweep in `folder` as a run of its own; a report that has changed is sent again."""
    payload = _sweep_payload(folder)
    with FileLock(folder / LOCK_NAME):
        return _send(store, folder, payload, _SWEEP_FILES)


def records_of(sweep_dir: Path) -> list[tuple[Path, Record]]:
    """Return the readable records of a sweep with their folders, by number."""
    found = []
    for path in sweep_dir.glob("*/record.json"):
        with contextlib.suppress(RecordError):
            found.append((path.parent, load_record(path)))
    return sorted(found, key=lambda pair: (pair[1].number, pair[1].repeat))


def _send(store: Store, folder: Path, payload: Payload, patterns: Sequence[str]) -> str:
    client = store.client
    begun = read_entry(folder)
    entry = Entry(
        state="pending",
        store=store.location.public_uri,
        experiment=store.experiment_name,
        experiment_id=store.experiment_id,
        run_id=begun.run_id if begun is not None and begun.store == store.location.public_uri else None,
    )
    run_id = entry.run_id
    if run_id is None:
        run = client.create_run(store.experiment_id, start_time=payload.start_ms, run_name=payload.name)
        run_id = str(run.info.run_id)
        entry = replace(entry, run_id=run_id)
        write_entry(folder, entry)
    _send_values(store, run_id, payload)
    for path in _files(folder, patterns):
        inside = path.parent.relative_to(folder).as_posix()
        client.log_artifact(run_id, str(path), None if inside == "." else inside)
    client.set_terminated(run_id, status=payload.status, end_time=payload.end_ms)
    write_entry(folder, replace(entry, state="sent"))
    return run_id


def _send_values(store: Store, run_id: str, payload: Payload) -> None:
    from mlflow.entities import Metric, Param, RunTag

    metrics = [Metric(point.key, point.value, payload.end_ms, point.step) for point in payload.points]
    params = [Param(name, value) for name, value in payload.params.items()]
    tags = [RunTag(name, value) for name, value in payload.tags.items()]
    for some_tags in _chunks(tags, _ENTRIES_PER_CALL):
        store.client.log_batch(run_id, tags=some_tags)
    for some_params in _chunks(params, _ENTRIES_PER_CALL):
        store.client.log_batch(run_id, params=some_params)
    for some_metrics in _chunks(metrics, _METRICS_PER_CALL):
        store.client.log_batch(run_id, metrics=some_metrics)


def _chunks(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the files that go with the run; large ones stay in the folder, which the tag `folder` names."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.stat().st_size <= _LARGEST_FILE_BYTES)


def _job_payload(folder: Path) -> Payload:
    try:
        payload = payload_of(load_record(folder))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{folder / 'record.json'} cannot become a run ({error!r})") from error
    return replace(payload, tags={**payload.tags, "folder": str(folder)})


def _sweep_payload(folder: Path) -> Payload:
    records = [record for _, record in records_of(folder)]
    jobs = [payload_of(record) for record in records]
    outcomes = Counter(str(record.outcome) for record in records)
    name = records[0].sweep_name if records else folder.name
    tags = {
        "sweep": records[0].sweep_id if records else folder.name,
        "sweep_name": name,
        "role": "sweep",
        "jobs": str(len(records)),
        "outcome": ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()),
        "mlflow.source.name": "wan_sweep",
        "mlflow.source.type": "LOCAL",
        "mlflow.note.content": _note(folder),
    }
    return Payload(
        name=f"sweep {name}",
        status="FAILED" if any(outcomes[outcome] for outcome in FAILURES) else "FINISHED",
        start_ms=min((job.start_ms for job in jobs), default=0),
        end_ms=max((job.end_ms for job in jobs), default=0),
        tags={key: value for key, value in tags.items() if value},
        params={},
        points=(),
    )


def _note(folder: Path) -> str:
    """Return the report as the run's description: whole paragraphs, and no pictures, which would not show."""
    path = folder / "report.md"
    if not path.is_file():
        return ""
    text = _PICTURE.sub("", path.read_text("utf-8"))
    return text if len(text) <= _NOTE_CHARACTERS else text[:_NOTE_CHARACTERS].rpartition("\n\n")[0]
