"""`tracking.json` beside each record: whether its run was sent, and where to; also the guard against sending twice."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from wan_sweep.store import write_json

FILE_NAME = "tracking.json"
LOCK_NAME = ".tracking.lock"
ARTIFACT_FOLDER = "mlartifacts"
_SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known about sending one folder.

    Args:
        state: "sent", or "pending" while something is missing in the store.
        store: tracking URI without password.
        experiment: name of the experiment that the run belongs to.
        experiment_id: its id in that store; None before the store was reached.
        run_id: the run, as soon as it exists, complete or not.
        reason: why it is pending.
    """

    state: str
    store: str
    experiment: str
    experiment_id: str | None = None
    run_id: str | None = None
    reason: str | None = None

    @property
    def is_sent(self) -> bool:
        """Whether nothing is left to do."""
        return self.state == "sent"


def read_entry(folder: Path) -> Entry | None:
    """Return the folder's entry, or None where there is none that can be read."""
    try:
        stored = json.loads((folder / FILE_NAME).read_text("utf-8"))
        return Entry(**{name: stored.get(name) for name in Entry.__dataclass_fields__})
    except (OSError, ValueError, AttributeError):
        return None


def write_entry(folder: Path, entry: Entry) -> None:
    """Replace the folder's entry in one step."""
    write_json(folder / FILE_NAME, {"schema_version": _SCHEMA_VERSION, **asdict(entry)})


def pending_folders(root: Path, *, unmarked: bool) -> list[Path]:
    """Return the job folders, then the sweep folders, at or below `root` that still have to be sent.

    Args:
        root: an outputs folder, one sweep or one job.
        unmarked: whether folders without an entry count too; they may belong to a sweep that is running now.
    """
    paths = (path for depth in ("", "*/", "*/*/", "*/*/*/") for path in root.glob(depth + "record.json"))
    # The store's own copies of records are no jobs.
    jobs = sorted({path.parent for path in paths if ARTIFACT_FOLDER not in path.parts})
    sweeps = sorted({job.parent for job in jobs if job != root})
    return [folder for folder in [*jobs, *sweeps] if _is_pending(read_entry(folder), unmarked=unmarked)]


def _is_pending(entry: Entry | None, *, unmarked: bool) -> bool:
    return unmarked if entry is None else not entry.is_sent
