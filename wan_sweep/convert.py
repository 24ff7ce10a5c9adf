"""From Hydra's config to jobs: the only module besides `cli` and `sweep` that knows Hydra and OmegaConf."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from wan_sweep.errors import UsageError
from wan_sweep.schema import KNOBS, Job, Knob, Scalar

# Root keys that are no knobs: which round of `repeats` a job belongs to, set by the sweep itself.
REPEAT = "repeat"

_FOLDER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]*")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A job as it was asked for.

    Attributes:
        axes: What differs between the jobs of the sweep: knobs, and presets by their group.
    """

    job: Job
    repeat: int = 0
    axes: Mapping[str, Scalar] = field(default_factory=dict)


def _refuse(knob: Knob, value: object) -> UsageError:
    shown = str(value).lower() if value is None or isinstance(value, bool) else value
    return UsageError(f"{knob.name}={shown} cannot be: choose {knob.allowed}")


def value_of(knob: Knob, value: object) -> Scalar:
    """A knob's value, checked against its type and its own limits.

    Raises:
        UsageError: names knob, value and what is allowed.
    """
    if value is None:
        if knob.optional:
            return None
        raise _refuse(knob, "null")
    if isinstance(value, bool) and bool in knob.kinds:
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number(knob, value)
    if str in knob.kinds and isinstance(value, str) and value:
        if knob.choices and value not in knob.choices:
            raise _refuse(knob, value)
        return value
    raise _refuse(knob, value)


def _number(knob: Knob, value: float) -> Scalar:
    if str in knob.kinds and not knob.choices:
        return str(value)
    if int in knob.kinds and isinstance(value, int):
        number: int | float = value
    elif float in knob.kinds and math.isfinite(value):
        number = float(value)
    else:
        raise _refuse(knob, value)
    rule = knob.rule
    if (rule.at_least is not None and number < rule.at_least) or (rule.above is not None and number <= rule.above):
        raise _refuse(knob, value)
    return number


def job_of(config: DictConfig) -> Job:
    """The job that a composed config describes.

    Raises:
        UsageError: a missing knob, or a value that cannot be.
    """
    try:
        values = {str(key): config[key] for key in config if key != "hydra"}
    except OmegaConfBaseException as error:
        raise UsageError(f"the configuration does not resolve: {str(error).splitlines()[0]}") from error
    checked: dict[str, Any] = {}
    for name, knob in KNOBS.items():
        if name not in values:
            raise UsageError(f"{name} is missing from the configuration; give {name}={knob.allowed}")
        checked[name] = value_of(knob, values[name])
    unknown = sorted(set(values) - set(KNOBS) - {REPEAT})
    if unknown:
        raise UsageError(f"there is no knob {unknown[0]}; the knobs are {', '.join(KNOBS)}")
    return _with_paths(Job(**checked))


PATHS = ("output_root", "ckpt_dir", "image", "first_frame", "last_frame", "src_video", "src_mask")
"""Knobs that are paths, from the folder of the start."""


def _with_paths(job: Job) -> Job:
    if not _FOLDER_NAME.fullmatch(job.name):
        raise UsageError(f"name={job.name} is not a folder's name; use letters, digits and . _ + = - without a path")
    if job.output_root.startswith("~"):
        raise UsageError(f"output_root={job.output_root} was not expanded by the shell; write output_root=$HOME/...")
    # A worker runs in a folder of its own.
    given = {name: getattr(job, name) for name in PATHS if getattr(job, name) is not None}
    model = job.prompt_extend_model
    if model and (model.startswith(".") or Path(model).is_dir()) and job.prompt_extend_method == "local_qwen":
        given["prompt_extend_model"] = model
    absolute = {name: str(Path(path).absolute()) for name, path in given.items()}
    if job.src_ref_images is not None:
        absolute["src_ref_images"] = ",".join(str(Path(path).absolute()) for path in job.src_ref_images.split(","))
    return job.replace(**absolute)


def repeat_of(config: DictConfig) -> int:
    """Which round of the repeats a composed config belongs to."""
    return int(config.get(REPEAT, 0))


def is_grid(config: DictConfig) -> bool:
    """Whether the sweep's jobs are known beforehand: Hydra's own sweeper; others choose as they go."""
    return str(config.hydra.sweeper.get("_target_", "")).endswith("BasicSweeper")


def add_repeats(config: DictConfig, repeats: int) -> None:
    """Makes the repeats an axis of the sweep: the outermost, so that the jobs run round by round."""
    params = {REPEAT: f"range(0,{repeats})", **_sweeper_params(config)}
    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.sweeper.params = params


def _sweeper_params(config: DictConfig) -> dict[str, Any]:
    params = OmegaConf.to_container(OmegaConf.create({"params": config.hydra.sweeper.get("params")}), resolve=True)
    return dict((params["params"] if isinstance(params, dict) else None) or {})


def parse(overrides: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    """Overrides as Hydra reads them.

    Raises:
        UsageError: one is not of Hydra's grammar.
    """
    parsed = []
    for override in overrides:
        try:
            parsed += OverridesParser.create(config_loader=loader).parse_overrides([override])
        except HydraException as error:
            raise UsageError(
                f"{override} cannot be read: write key=value, and quote a value with commas, brackets or colons twice, "
                "such as 'prompt=\"a, b\"'"
            ) from error
    return parsed


def _values_of(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.get_value_element_as_str())]
    if not override.is_discrete_sweep():
        raise UsageError(f"{override.input_line} has no list of values; only hydra/sweeper plugins can sweep it")
    return [str(value) for value in override.sweep_string_iterator()]


def grid_of(config: DictConfig, loader: ConfigLoader) -> tuple[list[list[str]], list[str]]:
    """The combinations of the sweep in the order in which Hydra will run them, and the keys that vary.

    Raises:
        UsageError: an axis without values, or an override that cannot be read.
    """
    params = [f"{name}={value}" for name, value in _sweeper_params(config).items()]
    axes: dict[str, list[str]] = {}
    for override in parse([*params, *config.hydra.overrides.task], loader):
        key = override.get_key_element()
        values = _values_of(override)
        if not values:
            raise UsageError(f"{override.input_line} gives no value at all, so there is no job; list the values")
        axes[key] = [f"{key}={value}" for value in values]
    varying = [key for key, values in axes.items() if len(set(values)) > 1]
    return [list(combination) for combination in itertools.product(*axes.values())], varying


def candidates_of(config: DictConfig, loader: ConfigLoader) -> list[Candidate]:
    """Every job of the sweep, composed and checked.

    Raises:
        UsageError: a knob or value that cannot be, anywhere in the grid; or a knob swept that holds for a whole sweep.
    """
    combinations, varying = grid_of(config, loader)
    candidates = []
    for combination in combinations:
        try:
            composed = loader.load_sweep_config(config, combination)
        except (HydraException, OmegaConfBaseException) as error:
            raise UsageError(f"{' '.join(combination)} cannot be composed: {error}") from error
        job = job_of(composed)
        choices = composed.hydra.runtime.choices
        axes = {name: _axis(name, job, choices) for key in varying if (name := key.lstrip("+~")) != REPEAT}
        candidates.append(Candidate(job=job, repeat=repeat_of(composed), axes=axes))
    for name, knob in KNOBS.items():
        if knob.rule.per_sweep and len({getattr(candidate.job, name) for candidate in candidates}) > 1:
            raise UsageError(f"{name} holds for a whole sweep and cannot be swept; give it one value")
    return candidates


def _axis(name: str, job: Job, choices: DictConfig) -> Scalar:
    if name in KNOBS:
        return getattr(job, name)  # type: ignore[no-any-return]
    choice = choices.get(name)
    return None if choice is None else str(choice)
