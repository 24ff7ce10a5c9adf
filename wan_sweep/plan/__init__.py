"""What a sweep will do, decided before anything starts: which jobs run, and why the others do not."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from wan_sweep.cards import DEFAULT_CARD, card_like, card_named
from wan_sweep.convert import Candidate
from wan_sweep.environment import Machine
from wan_sweep.errors import RecordError, UsageError
from wan_sweep.planner.client import chosen_for
from wan_sweep.record import Record
from wan_sweep.rules import Resolved, card_of, resolve
from wan_sweep.schema import AUTO, Job, Scalar, asked_key, job_key
from wan_sweep.store import records_with, slug

SCHEMA_VERSION = 2

Expected = Literal["run", "duplicate", "refused", "done"]


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """One combination of the grid and what will become of it.

    Attributes:
        number: Place in the sweep, from 1; a duplicate has that of the job it repeats.
        asked: Identity before resolving, by which a task finds its entry, on whatever machine it runs.
        reason: Why it does not run; or, for one that does, why an older result was not taken.
        source: Folder of the job from which the result is taken over.
    """

    number: int
    key: str
    asked: str
    repeat: int
    name: str
    job: Job
    overrides: Mapping[str, Scalar] = field(default_factory=dict)
    expected: Expected = "run"
    reason: str = ""
    source: str | None = None

    @property
    def title(self) -> str:
        """What differs, without the number."""
        return self.name.partition("_")[2]

    def to_json(self) -> dict[str, Any]:
        """As it stands in plan.json."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "job"}
        return {**values, "knobs": self.job.to_dict()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """From an entry of plan.json."""
        rest = {name: value for name, value in values.items() if name != "knobs"}
        return cls(**rest, job=Job.from_dict(values["knobs"]))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A sweep before it starts.

    Attributes:
        notes: What the reader should know about the whole: defaults that were chosen, foreign processes.
        jobs: In the order of running, duplicates and refused ones included.
    """

    name: str
    id: str
    folder: Path
    description: str = ""
    code_version: str
    environment: Mapping[str, str]
    notes: tuple[str, ...] = ()
    checks: tuple[Mapping[str, str], ...] = ()
    jobs: tuple[PlannedJob, ...] = ()

    @property
    def own_jobs(self) -> tuple[PlannedJob, ...]:
        """The jobs without the duplicates: each will have a record."""
        return tuple(job for job in self.jobs if job.expected != "duplicate")

    def count(self, expected: Expected) -> int:
        """Jobs of this expectation."""
        return sum(job.expected == expected for job in self.jobs)

    def find(self, asked: str) -> PlannedJob | None:
        """The entry of a job, by what was asked for."""
        return next((job for job in self.jobs if job.asked == asked), None)

    def to_json(self) -> dict[str, Any]:
        """As it is written to plan.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "sweep": {"name": self.name, "id": self.id, "folder": str(self.folder), "description": self.description},
            "code_version": self.code_version,
            "environment": dict(self.environment),
            "notes": list(self.notes),
            "checks": [dict(check) for check in self.checks],
            "jobs": [job.to_json() for job in self.jobs],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """From the content of plan.json.

        Raises:
            RecordError: another schema version.
        """
        if values.get("schema_version") != SCHEMA_VERSION:
            raise RecordError(f"plan.json: schema_version={values.get('schema_version')} is not {SCHEMA_VERSION}")
        sweep = values["sweep"]
        return cls(
            name=sweep["name"],
            id=sweep["id"],
            folder=Path(sweep["folder"]),
            description=sweep["description"],
            code_version=values["code_version"],
            environment=values["environment"],
            notes=tuple(values["notes"]),
            checks=tuple(values["checks"]),
            jobs=tuple(PlannedJob.from_json(job) for job in values["jobs"]),
        )


def make_plan(
    candidates: Sequence[Candidate],
    *,
    folder: Path,
    sample: Job,
    machine: Machine,
    environment: Mapping[str, str],
    code_version: str,
) -> Plan:
    """Resolves, checks, de-duplicates and looks up what is done.

    Args:
        candidates: The grid in the order of running; empty for a sweeper that chooses as it goes.
        folder: The sweep's folder, which need not exist yet.
        sample: Any job of the sweep, for the knobs that all jobs share.
        machine: Where the jobs will run.
        environment: `environment.describe` of it.
        code_version: `environment.code_version`.
    """
    plan = Plan(
        name=sample.name,
        id=folder.name,
        folder=folder,
        description=sample.description or "",
        code_version=code_version,
        environment=environment,
        notes=_notes(candidates, machine),
    )
    resolved = [_resolved(candidate.job, machine) for candidate in candidates]
    keys = [
        job_key(one.job, candidate.repeat, weights=one.weights, sources=one.sources)
        for one, candidate in zip(resolved, candidates, strict=True)
    ]
    older = dict[str, list[tuple[Path, Record]]]()
    if sample.resume:
        for path, record in records_with(Path(sample.output_root), set(keys)):
            older.setdefault(record.key, []).append((path, record))
    jobs: list[PlannedJob] = []
    width = len(str(len(set(keys))))
    for candidate, one, key in zip(candidates, resolved, keys, strict=True):
        first = next((job for job in jobs if job.key == key), None)
        if first:
            jobs.append(_duplicate(first, candidate))
            continue
        number = len({job.number for job in jobs}) + 1
        entry = _entry(candidate, one, key, number=number, width=width)
        jobs.append(_look_up(entry, older.get(key, []), plan))
    return dataclasses.replace(plan, jobs=tuple(jobs))


def single_entry(plan: Plan, candidate: Candidate, machine: Machine, number: int) -> PlannedJob:
    """The entry of a job that a sweeper chose just now."""
    one = _resolved(candidate.job, machine)
    key = job_key(one.job, candidate.repeat, weights=one.weights, sources=one.sources)
    entry = _entry(candidate, one, key, number=number, width=1)
    older = list(records_with(Path(candidate.job.output_root), {key})) if candidate.job.resume else []
    return _look_up(entry, older, plan)


def _resolved(job: Job, machine: Machine) -> Resolved:
    """The job with everything decided, also which knobs make it fit into `vram_gib`."""
    one = resolve(job, machine)
    if one.refusal or one.job.vram_gib is None:
        return one
    try:
        knobs, _ = chosen_for(one.job, card_named(card_of(one.job, machine)))
    except UsageError as error:
        return dataclasses.replace(one, refusal=str(error))
    return resolve(one.job.replace(**knobs), machine)  # what was chosen has rules, too


def _entry(candidate: Candidate, one: Resolved, key: str, *, number: int, width: int) -> PlannedJob:
    # What "auto" and null became is what a reader wants to see beside the number.
    overrides = {name: getattr(one.job, name, value) for name, value in candidate.axes.items()}
    named = {**overrides, "repeat": candidate.repeat + 1} if candidate.job.repeats > 1 else overrides
    return PlannedJob(
        number=number,
        key=key,
        asked=asked_key(candidate.job, candidate.repeat),
        repeat=candidate.repeat,
        name=f"{number:0{width}d}_{slug(named, otherwise=one.job.model)}",
        job=one.job,
        overrides=overrides,
        expected="refused" if one.refusal else "run",
        reason=one.refusal,
    )


def _duplicate(first: PlannedJob, candidate: Candidate) -> PlannedJob:
    return dataclasses.replace(
        first,
        asked=asked_key(candidate.job, candidate.repeat),
        overrides=dict(candidate.axes),
        expected="duplicate",
        reason=f"the same as job {first.number}",
        source=None,
    )


def _look_up(entry: PlannedJob, older: Sequence[tuple[Path, Record]], plan: Plan) -> PlannedJob:
    """The entry, marked as done if one of the older records settles it.

    For jobs that will run elsewhere nobody knows on which machine, so an older one is as good as the next.
    """
    if entry.expected != "run":
        return entry
    print_now = plan.environment.get("fingerprint", "")
    stale = ""
    for path, record in sorted(older, key=lambda item: item[1].ended_at, reverse=True):
        if not _settles(record, retry_failed=entry.job.retry_failed):
            continue
        if record.code_version != plan.code_version:
            stale = stale or f"run again: the code has changed since {path}"
        elif print_now and record.environment.get("fingerprint", "") != print_now:
            stale = stale or f"run again: the machine or its software has changed since {path}"
        else:
            told = "" if record.outcome == "ok" else f" ({record.outcome})"
            reason = f"done before in {path}{told}"
            return dataclasses.replace(entry, expected="done", reason=reason, source=str(path))
    return dataclasses.replace(entry, reason=stale)


def _settles(record: Record, *, retry_failed: bool) -> bool:
    if record.outcome == "ok":
        return True
    interrupted = (record.failure or {}).get("kind") == "interrupted"
    return not retry_failed and record.outcome in {"oom", "failed", "timeout"} and not interrupted


def _notes(candidates: Sequence[Candidate], machine: Machine) -> tuple[str, ...]:
    resolved = [(candidate.job, resolve(candidate.job, machine).job) for candidate in candidates]
    fitted = [_fitted_note(job, machine) for _, job in resolved if job.vram_gib is not None]
    chosen = {(job.model, job.mode, job.device): job for asked, job in resolved if asked.model == AUTO}
    notes = [f"model=auto is {job.model}: {_why(job, machine)}." for job in chosen.values()]
    estimated = {job.card: (asked, job) for asked, job in resolved if job.mode == "estimate"}
    return (
        *notes,
        *dict.fromkeys(filter(None, fitted)),
        *(_card_note(asked, job, machine) for asked, job in estimated.values()),
    )


def _fitted_note(job: Job, machine: Machine) -> str:
    """What was chosen for `vram_gib`; empty where nothing fits, which is a refusal."""
    try:
        return chosen_for(job, card_named(card_of(job, machine)))[1]
    except UsageError:
        return ""


def _card_note(asked: Job, job: Job, machine: Machine) -> str:
    """For which card, and why for this one."""
    how = f"Estimated for the {job.card}, not measured"
    if asked.card is not None:
        return f"{how}."
    if job.card == DEFAULT_CARD and not any(card_like(gpu.name, gpu.total_bytes) for gpu in machine.gpus):
        return f"{how}; another card: card=NAME; a real run on this machine's CPU: model=tiny device=cpu."
    if not machine.num_gpus:
        return f"{how}, since torch {machine.torch_version} cannot use the {machine.gpus[0].name} that is here."
    return f"{how}; that is the GPU here, and card=NAME names another."


def _why(job: Job, machine: Machine) -> str:
    if job.mode == "estimate":
        return "the jobs are estimated"
    if job.device == "cuda":
        return f"the job runs on the {machine.gpus[0].name}" if machine.num_gpus else "device=cuda was asked for"
    return "the job runs on the CPU"
