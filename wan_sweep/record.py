"""What a job left: one JSON file, the truth from which tables, plots and MLflow runs are made."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from wan_sweep.errors import RecordError
from wan_sweep.schema import Scalar

SCHEMA_VERSION = 2
RECORD_FILE = "record.json"

Outcome = Literal["ok", "oom", "failed", "timeout", "refused", "skipped"]
OUTCOMES: tuple[str, ...] = get_args(Outcome)

# Outcomes that make the exit code of the sweep non-zero. An OOM and a refusal are answers.
FAILURES: frozenset[str] = frozenset({"failed", "timeout"})


@dataclass(frozen=True, kw_only=True)
class Record:
    """One job's record.

    Attributes:
        key: Identity of the job, `schema.job_key`.
        number: Place in its sweep, from 1.
        name: Folder of the job inside the sweep's folder.
        overrides: Only what differs between the jobs of this sweep.
        failure: Details of an outcome other than ok: `kind`, `where`, `exit_code`, `log_tail`, or what the worker told.
        sources: Files that the video is made from, or what stood in for them; empty where the prompt is all.
        metrics: Single numbers; bytes and seconds.
        series: Numbers by step.
        measured_in: Folder of the job from which the numbers were taken over, if they were.
        fidelity: Which job its output was compared with: `reference`, `reference_folder`, and `reason` if it was not.
        prompt_extension: `prompt` (what the video was made from), `original`, `method`, `model`, `target_lang`, and
            `problem` if the original was kept; None where no extension was asked for.
        passes: Extra runs of the job by name: `outcome`, `reason`, `seconds`, and what they left.
        checks: The environment checks before the sweep, as `checks.Check.to_dict` gives them.
        estimate: Of a job that was estimated: the card, how sure each peak is, and which tables it rests on; as
            `estimate.predict.estimate` gives them. Records from before there were estimates lack it.
        outputs: `latents_sha256` and `frames_sha256` of what a whole run generated; older records lack it.
    """

    key: str
    number: int
    name: str
    repeat: int = 0
    sweep_name: str
    sweep_id: str
    sweep_folder: str
    knobs: Mapping[str, Scalar]
    overrides: Mapping[str, Scalar]
    outcome: Outcome
    reason: str = ""
    failure: Mapping[str, Any] | None = None
    started_at: str
    ended_at: str
    wall_seconds: float = 0.0
    mode: str = "measure"
    code_version: str
    environment: Mapping[str, str] = field(default_factory=dict)
    weights: str = ""
    sources: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    series: Mapping[str, list[float]] = field(default_factory=dict)
    ranks: list[Any] = field(default_factory=list)
    warnings: list[Mapping[str, str]] = field(default_factory=list)
    idle_knobs: Mapping[str, str] = field(default_factory=dict)
    measured_in: str | None = None
    fidelity: Mapping[str, str] | None = None
    prompt_extension: Mapping[str, str] | None = None
    passes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    checks: list[Mapping[str, str]] = field(default_factory=list)
    estimate: Mapping[str, Any] | None = None
    outputs: Mapping[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """As it is written to the file."""
        return {
            "schema_version": SCHEMA_VERSION,
            "job": {"key": self.key, "number": self.number, "name": self.name, "repeat": self.repeat},
            "sweep": {"name": self.sweep_name, "id": self.sweep_id, "folder": self.sweep_folder},
            **{name: getattr(self, name) for name in (*_PLAIN, *_LATER)},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """From the content of a file.

        Raises:
            RecordError: another schema version, or something is missing.
        """
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise RecordError(
                f"schema_version={version} is not known; this version of wan_sweep reads {SCHEMA_VERSION}, "
                "so read the record with the version that wrote it"
            )
        try:
            job, sweep = values["job"], values["sweep"]
            return cls(
                key=job["key"],
                number=job["number"],
                name=job["name"],
                repeat=job["repeat"],
                sweep_name=sweep["name"],
                sweep_id=sweep["id"],
                sweep_folder=sweep["folder"],
                **{name: values[name] for name in _PLAIN},
                **{name: values[name] for name in _LATER if name in values},
            )
        except (KeyError, TypeError) as error:
            raise RecordError(f"the record is incomplete: {error} is missing or of another type") from error


_PLAIN = (
    "knobs",
    "overrides",
    "outcome",
    "reason",
    "failure",
    "started_at",
    "ended_at",
    "wall_seconds",
    "mode",
    "code_version",
    "environment",
    "weights",
    "metrics",
    "series",
    "ranks",
    "warnings",
    "idle_knobs",
    "measured_in",
    "fidelity",
    "passes",
    "checks",
)

# Came after the first records of this schema version, which are read without them.
_LATER = ("sources", "prompt_extension", "estimate", "outputs")


def load_record(path: Path) -> Record:
    """The record in this file, or in the file record.json of this folder.

    Raises:
        RecordError: it cannot be read; the message names the file.
    """
    if path.is_dir():
        path = path / RECORD_FILE
    try:
        return Record.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, AttributeError) as error:
        raise RecordError(f"{path} is not a record: {error}") from error
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from error


def load_records(sweep_dir: Path) -> list[Record]:
    """All records of a sweep, by job number.

    Raises:
        RecordError: one of them cannot be read.
    """
    return sorted((load_record(path) for path in sweep_dir.glob(f"*/{RECORD_FILE}")), key=lambda record: record.number)
