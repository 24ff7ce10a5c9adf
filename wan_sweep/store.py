"""Folders and files of a sweep: made exclusively, written atomically, found again when resuming."""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_sweep.errors import FolderError, RecordError
from wan_sweep.record import RECORD_FILE, Record, load_record
from wan_sweep.schema import Scalar, text

PLAN_FILE = "plan.json"
JOB_FILE = "job.json"
CONFIG_FILE = "config.yaml"
MEMORY_EVENTS_FILE = "memory_events.json"
LATENTS_FILE = "latents.npy"
FRAMES_FILE = "frames.npy"
FIDELITY_FILE = "fidelity.json"
TIMELINE_FILE = "memory_timeline.png"
SNAPSHOT_FILE = "snapshot.pickle"
FAILED_RANKS_FILE = "failed_ranks.json"

_LONGEST_SLUG = 90


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A run of a job's pipeline in processes of its own, and the files that it leaves in the job's folder.

    Attributes:
        name: What the worker is asked for.
        result: Its outcome, and what it found.
        events: A line per boundary, as it happens.
        log: All that it printed.
    """

    name: str
    result: str
    events: str
    log: str


MEASURE = Pass(name="measure", result="measurement.json", events="events.jsonl", log="log.txt")
ATTRIBUTION = Pass(
    name="attribution", result="attribution.json", events="events_attribution.jsonl", log="log_attribution.txt"
)
ESTIMATE = Pass(name="estimate", result=MEASURE.result, events=MEASURE.events, log=MEASURE.log)
"""Stands in for the pass that measures, and leaves the same files."""
TRACE = Pass(name="trace", result="trace_summary.json", events="events_trace.jsonl", log="log_trace.txt")
PASSES: Mapping[str, Pass] = {one.name: one for one in (MEASURE, ESTIMATE, ATTRIBUTION, TRACE)}


def rank_folder(folder: Path, rank: int) -> Path:
    """Where a rank of a job leaves its files: the first in the job's folder itself, the others in one of their own."""
    return folder / f"rank{rank}" if rank else folder


def write_atomically(path: Path, content: str) -> None:
    """Writes a file that is either complete or not there, whatever happens in between.

    Raises:
        OSError: the disk is full, or the folder is not writable; an older file stays as it was.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def write_json(path: Path, values: object) -> None:
    """Writes JSON atomically.

    Raises:
        OSError: as `write_atomically`.
    """
    write_atomically(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def write_config(path: Path, knobs: Mapping[str, Scalar]) -> None:
    """Writes the resolved knobs as YAML, one a line, in the order of the table.

    Raises:
        OSError: as `write_atomically`.
    """
    # A JSON scalar is a YAML scalar.
    write_atomically(
        path, "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in knobs.items())
    )


def write_record(folder: Path, record: Record) -> None:
    """Writes a job's record into its folder, which it makes if need be.

    Raises:
        OSError: as `write_atomically`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD_FILE, record.to_json())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        RecordError: the file is missing, damaged or no object; the message names it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise RecordError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise RecordError(f"{path} is damaged: it holds no object")
    return values


def create_sweep_folder(folder: Path) -> None:
    """Makes the folder of a sweep, for this sweep alone.

    Raises:
        FolderError: it exists, or cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except FileExistsError as error:
        if folder.exists():
            raise FolderError(
                f"{folder} is there already, and a sweep never writes into another one's folder; "
                "leave the folder out, or name a new one"
            ) from error
        raise _cannot_make(folder, error) from error
    except OSError as error:
        raise _cannot_make(folder, error) from error


def _cannot_make(folder: Path, error: OSError) -> FolderError:
    return FolderError(
        f"{folder} cannot be made: {error.strerror or error}; choose a writable place with output_root=FOLDER"
    )


def slug(overrides: Mapping[str, Scalar], *, otherwise: str) -> str:
    """What differs, as part of a folder name: short and safe in every file system and shell."""
    words = ",".join(f"{name}={text(value)}" for name, value in overrides.items()) or otherwise
    words = re.sub(r"(?<=\d)\*(?=\d)", "x", words)
    words = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", words)
    return words[:_LONGEST_SLUG].strip(".-,") or "job"


def records_with(output_root: Path, keys: Collection[str]) -> Iterator[tuple[Path, Record]]:
    """Every readable record under the output folder whose job has one of these keys, with its folder."""
    wanted = [key.encode("ascii") for key in keys]
    for path in sorted(output_root.glob(f"*/*/*/{RECORD_FILE}")):
        if not (path.parent.parent / PLAN_FILE).exists():
            continue  # not in a sweep's folder: MLflow keeps copies beside them
        try:
            content = path.read_bytes()
            if not any(key in content for key in wanted):
                continue
            record = load_record(path)
        except (OSError, RecordError):
            continue  # a damaged or foreign file cannot be resumed from; its own sweep reports it
        if record.key in keys:
            yield path.parent, record
