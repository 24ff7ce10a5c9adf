"""Where Hydra and the runner meet: a callback that plans before the first job, and the task that runs one."""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.text import Text

from wan21.errors import WanError
from wan_sweep import convert
from wan_sweep.checks import run_checks
from wan_sweep.convert import Candidate
from wan_sweep.elsewhere import WHERE, environment_elsewhere, launcher_of, machine_elsewhere
from wan_sweep.environment import Machine, code_version, describe, read_machine
from wan_sweep.errors import FolderError, SweepError, UsageError
from wan_sweep.foresight import print_estimates
from wan_sweep.launch import WORKER
from wan_sweep.launch.world import Leader, follow, world_folder
from wan_sweep.place import ALONE, read_place
from wan_sweep.plan import Plan, PlannedJob, make_plan, single_entry
from wan_sweep.preview import print_plan
from wan_sweep.progress import PlainDisplay, make_display
from wan_sweep.rules import mode_of
from wan_sweep.runner import JobTracker, Sweep
from wan_sweep.schema import Job, asked_key
from wan_sweep.store import PLAN_FILE, create_sweep_folder, read_json, write_json

logger = logging.getLogger(__name__)

EXIT_INTERNAL = 1
EXIT_USAGE = 2

_WIDTH_WITHOUT_TERMINAL = 160

# Hydra makes the callback and calls the task; neither can be handed the other. Sweeps of this process, by folder.
_OPEN: dict[Path, Sweep] = {}

# The other processes, where torchrun has started several; likewise.
_WORLD: list[Leader] = []


def make_console(*, stderr: bool = False) -> Console:
    """Standard output or error; wide where no terminal cuts the lines."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=_WIDTH_WITHOUT_TERMINAL)


def fail(message: str, exit_code: int) -> NoReturn:
    """Says what is wrong and ends the program, without a traceback.

    Raises:
        SystemExit: always.
    """
    sys.stdout.flush()
    if (read_place() or ALONE).rank == 0:  # the others would say the same
        make_console(stderr=True).print(Text(f"wan_sweep: {message}"), soft_wrap=True)
    sys.exit(exit_code)


class SweepCallback(Callback):
    """Plans the whole sweep before its first job. Hydra swallows a callback's errors, so this one ends the program."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ANN401, ARG002 - Hydra's signature
        self._open(config, is_multirun=False)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ANN401, ARG002 - Hydra's signature
        self._open(config, is_multirun=True)

    def _open(self, config: DictConfig, *, is_multirun: bool) -> None:
        try:
            open_sweep(config, is_multirun=is_multirun)
        except (WanError, SweepError) as error:
            fail(str(error), error.exit_code)
        except OmegaConfBaseException as error:
            fail(f"the configuration does not resolve: {str(error).splitlines()[0]}", EXIT_USAGE)
        except Exception:
            # A mistake of ours. Hydra would make a warning of it and start jobs without a plan.
            logger.exception("the sweep could not be planned")
            sys.exit(EXIT_INTERNAL)


def open_sweep(config: DictConfig, *, is_multirun: bool) -> None:
    """Plans a sweep, shows the plan, makes the folder, and gets everything ready for its jobs.

    Raises:
        UsageError: a value that cannot be; a sweep without jobs, or without one that can run.
        FolderError: its folder is there already or cannot be made.
        SystemExit: with plan=true, there is nothing more to do.
    """
    _join_world(config, is_multirun=is_multirun)
    folder = Path(config.hydra.sweep.dir if is_multirun else config.hydra.run.dir).absolute()
    if is_multirun and not convert.is_grid(config):
        sample, candidates = _one_of_many(config), []
    else:
        candidates = _candidates(config, is_multirun=is_multirun)
        if not candidates:
            raise UsageError("the sweep is empty: some axis has no values (glob finds only presets of a group)")
        sample = candidates[0].job
    elsewhere = machine_elsewhere(config)
    machine = elsewhere or read_machine()
    environment = describe(machine)
    if elsewhere:
        environment = environment_elsewhere(environment, launcher_of(config))
    plan = make_plan(
        candidates,
        folder=folder,
        sample=sample,
        machine=machine,
        environment=environment,
        code_version=code_version(),
    )
    console = make_console()
    is_hopeless = bool(plan.jobs) and plan.count("refused") == len(plan.own_jobs)
    if not (is_hopeless and len(plan.jobs) == 1):
        print_plan(plan, console)
    if is_hopeless:
        raise UsageError(_all_refused(plan))
    if not elsewhere:
        plan = replace(plan, checks=_checked(plan, candidates, sample, machine, console))
    create_sweep_folder(folder)
    try:
        write_json(folder / PLAN_FILE, plan.to_json())
    except OSError as error:
        raise FolderError(f"{folder / PLAN_FILE} cannot be written: {error.strerror or error}") from error
    if sample.plan:
        print_estimates(plan, machine, console)
        console.print(Text(f"Only planned (plan=true): {folder / PLAN_FILE}"), soft_wrap=True)
        sys.exit(0)
    tracker = _open_tracker(sample) if sample.track else None
    display = make_display(len(plan.own_jobs), plan.count("run"), console)
    sweep = Sweep(plan, console, display=display, tracker=tracker, world=next(iter(_WORLD), None))
    _OPEN[folder] = sweep
    sweep.settle()


def _join_world(config: DictConfig, *, is_multirun: bool) -> None:
    """Where torchrun has started several processes of this program, the first leads, and the others follow it.

    Raises:
        UsageError: a launcher that would start jobs elsewhere.
        SystemExit: this process has followed to the end.
    """
    place = read_place()
    if place is None or place.size == 1:
        return
    launcher = launcher_of(config)
    if launcher != "basic":
        raise UsageError(
            f"hydra/launcher={launcher} starts jobs by itself, and torchrun has started {place.size} processes for all "
            "of them; leave out one of the two"
        )
    job = _one_of_many(config) if is_multirun else convert.job_of(config)
    folder = world_folder(Path(job.output_root))
    if place.rank:
        sys.exit(follow(folder, place))
    _WORLD.append(Leader(folder, place))


def _checked(
    plan: Plan, candidates: Sequence[Candidate], sample: Job, machine: Machine, console: Console
) -> tuple[Mapping[str, str], ...]:
    """The environment checks, for the records; what is not in order is shown.

    Raises:
        UsageError: one of them refuses. Planning alone is never refused, and never waits.
    """
    checks = run_checks(
        machine,
        "warn" if sample.plan else sample.foreign_processes,
        devices={_asked_device(job, machine) for job in [one.job for one in candidates] or [sample]},
        output_root=Path(sample.output_root).absolute(),
        say=lambda words: console.print(Text(words), soft_wrap=True),
        num_jobs=plan.count("run"),
    )
    for check in checks:
        if check.state == "warning":
            console.print(Text(f"{check.name}: {check.text}; {check.advice}"), soft_wrap=True)
    refused = [f"{check.name}: {check.text}; {check.advice}" for check in checks if check.state == "refused"]
    if refused and not sample.plan:
        raise UsageError("; ".join(refused))
    return tuple(check.to_dict() for check in checks)


def _asked_device(job: Job, machine: Machine) -> str:
    """Where a job is asked to run; an estimate takes no GPU, wherever there is one."""
    return "cpu" if mode_of(job, machine) == "estimate" else job.device


def _all_refused(plan: Plan) -> str:
    reasons = list(dict.fromkeys(job.reason for job in plan.own_jobs))
    return reasons[0] if len(reasons) == 1 else f"all {len(plan.own_jobs)} jobs are refused, for the reasons above"


def _one_of_many(config: DictConfig) -> Job:
    """The knobs that all jobs share, where a sweeper chooses the jobs as it goes."""
    loader = GlobalHydra.instance().config_loader()
    task = list(config.hydra.overrides.task)
    fixed = [text for text, one in zip(task, convert.parse(task), strict=True) if not one.is_sweep_override()]
    return convert.job_of(loader.load_sweep_config(config, fixed))


def _candidates(config: DictConfig, *, is_multirun: bool) -> list[Candidate]:
    if not is_multirun:
        job = convert.job_of(config)
        return [Candidate(job=job, repeat=repeat) for repeat in range(job.repeats)]
    loader = GlobalHydra.instance().config_loader()
    candidates = convert.candidates_of(config, loader)
    repeats = candidates[0].job.repeats if candidates else 1
    if repeats == 1:
        return candidates
    convert.add_repeats(config, repeats)
    return convert.candidates_of(config, loader)


def _open_tracker(job: Job) -> JobTracker | None:
    try:
        from wan_sweep.track import Tracker

        tracker: JobTracker = Tracker(Path(job.output_root), job.experiment_name)
        tracker.open()
    except Exception as error:  # noqa: BLE001 - a tracker's trouble never costs a measurement
        make_console(stderr=True).print(
            Text(f"MLflow is off for this sweep: {type(error).__name__}: {error}"), soft_wrap=True
        )
        return None
    return tracker


def run_task(config: DictConfig, command: Sequence[str] = WORKER) -> str:
    """Runs the job that Hydra composed, in whatever process Hydra's launcher put it.

    Returns:
        The outcome; of a single run with repeats, that of the last one.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    sweep = _OPEN.get(folder) or _reopen(folder)
    if hydra.mode is not None and hydra.mode.name == "RUN":
        return [sweep.run(entry, command) for entry in sweep.plan.own_jobs][-1]
    job, repeat = convert.job_of(config), convert.repeat_of(config)
    entry = sweep.plan.find(asked_key(job, repeat))
    if entry is None:
        number = int(hydra.job.num or 0) + 1
        entry = single_entry(sweep.plan, Candidate(job=job, repeat=repeat, axes=_axes(job)), read_machine(), number)
    return sweep.run(_original(sweep.plan, entry), command)


def _original(plan: Plan, entry: PlannedJob) -> PlannedJob:
    """The entry itself, or the one that it duplicates."""
    return next((job for job in plan.own_jobs if job.number == entry.number), entry)


def _axes(job: Job) -> dict[str, Any]:
    """What a sweeper has set: the knobs among the overrides of the job."""
    keys = [one.partition("=")[0].lstrip("+") for one in HydraConfig.get().overrides.task]
    knobs = job.to_dict()
    return {key: knobs[key] for key in keys if key in knobs}


def _reopen(folder: Path) -> Sweep:
    plan = Plan.from_json(read_json(folder / PLAN_FILE))
    if WHERE in plan.environment:  # only now is it known which machine this is
        plan = replace(plan, environment={**describe(read_machine()), WHERE: plan.environment[WHERE]})
    console = make_console()
    sweep = Sweep(plan, console, display=PlainDisplay(len(plan.own_jobs), 0, console), is_part=True)
    _OPEN[folder] = sweep
    return sweep


def dismiss(exit_code: int) -> None:
    """Lets the other processes of this one's world go, if there are any."""
    while _WORLD:
        _WORLD.pop().dismiss(exit_code)


def finish() -> int:
    """Reports on the sweeps of this process and forgets them; returns the exit code."""
    codes = [0]
    while _OPEN:
        _, sweep = _OPEN.popitem()
        codes.append(sweep.finish())
    return max(codes)
