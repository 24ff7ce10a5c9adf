"""The command line: checks what was typed, lets Hydra compose and sweep, and reports at the end."""

import contextlib
import difflib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override, ValueType
from omegaconf import DictConfig, OmegaConf

from wan_sweep import convert, sweep
from wan_sweep.errors import UsageError
from wan_sweep.launch import WORKER
from wan_sweep.schema import KNOBS, knobs_help

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

GROUPS = ("model", "optimization", "parallel", "logging", "experiment")


def config_folder() -> Path:
    """conf/: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def main() -> NoReturn:
    """Entry point of `wan-sweep` and `python -m wan_sweep`."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str], *, worker: Sequence[str] = WORKER) -> int:
    """Runs a command line and returns its exit code.

    Args:
        arguments: Without the program's name.
        worker: What does a job; the job's folder is appended.
    """
    OmegaConf.register_new_resolver("knobs_help", knobs_help, replace=True)
    # Hydra's parser wants all overrides side by side; people write -m anywhere.
    arguments = sorted(arguments, key=lambda argument: argument not in {"-m", "--multirun"})
    try:
        check(arguments)
    except UsageError as error:
        with contextlib.suppress(SystemExit):
            sweep.fail(str(error), error.exit_code)
        return error.exit_code
    with _terminable():
        try:
            code = _run_hydra(arguments, worker)
        except KeyboardInterrupt:
            sweep.make_console(stderr=True).print("interrupted")
            code = EXIT_INTERRUPTED
        finished = sweep.finish()
        code = code or finished
        sweep.dismiss(code)
    return code


def _run_hydra(arguments: Sequence[str], worker: Sequence[str]) -> int:
    @hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")
    def task(config: DictConfig) -> str:
        return sweep.run_task(config, worker)

    typed = sys.argv
    sys.argv = ["wan_sweep", *arguments]
    try:
        task()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = typed
    return 0


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM unwind the program as Ctrl-C does, so that no job outlives it."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 - the signature of a handler
        sys.exit(EXIT_TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check(arguments: Sequence[str]) -> None:
    """Refuses what Hydra would refuse later or less clearly.

    Raises:
        UsageError: an unknown knob or preset, several values without -m, or text that is no override.
    """
    options = get_args_parser().parse_args(list(arguments))
    if options.shell_completion:
        return
    overrides = convert.parse(options.overrides)
    folders = [config_folder(), *([Path(options.config_dir)] if options.config_dir else [])]
    for override in overrides:
        _check_key(override)
        _check_choices(override, folders)
    chooses_mode = any(one.key_or_group in {"experiment", "hydra.mode"} for one in overrides)
    if not (options.multirun or chooses_mode or options.help or options.cfg):
        for override in overrides:
            if override.is_sweep_override():
                raise UsageError(f"{override.input_line} lists several values; add -m to run a job for each")


def _check_key(override: Override) -> None:
    key = override.key_or_group
    if key.startswith(("hydra.", "hydra/")):
        return
    typed = override.input_line or ""
    plain = typed.lstrip("+~")
    prefix = typed.removesuffix(plain)
    if key == "experiment":
        if override.is_sweep_override():
            raise UsageError(f"{plain} lists several experiments; run them one after the other")
        if not prefix:
            raise UsageError(f"write +{plain}: an experiment is added to the configuration")
    elif key in KNOBS or key in GROUPS:
        if prefix == "+":
            raise UsageError(f"write {plain} without the +: {key} is there already")
    else:
        raise UsageError(_unknown(key))


def _unknown(key: str) -> str:
    close = difflib.get_close_matches(key, [*KNOBS, *GROUPS], n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else "."
    groups = ", ".join(group for group in GROUPS if group not in KNOBS)
    return f"there is no knob {key}{hint}\nKnobs: {', '.join(KNOBS)}\nPresets: {groups} (python -m wan_sweep --help)"


def _check_choices(override: Override, folders: Sequence[Path]) -> None:
    group = override.key_or_group
    if group not in GROUPS or override.is_delete():
        return
    there = sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})
    if override.value_type == ValueType.GLOB_CHOICE_SWEEP or override.is_range_sweep():
        return
    if override.is_choice_sweep():
        values = [str(one) for one in override.sweep_string_iterator()]
    else:
        values = [str(override.get_value_element_as_str())]
    for value in values:
        name = value.strip("'\"").removesuffix(".yaml")
        if name not in there:
            close = difflib.get_close_matches(name, there, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(f"{group}={value} is not known{hint}{os.linesep}Choose {', '.join(there)}")
