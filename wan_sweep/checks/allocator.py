"""The settings of torch's CUDA allocator: what they say, and whether its counters can be believed with them."""

import difflib
import re
from collections.abc import Iterator, Mapping

from wan_sweep.checks.check import Check
from wan_sweep.environment import version_numbers

# Every version reads the older name. Of the newer one, 2.9.1 takes no notice on CUDA, and 2.11 does.
OLD_NAME, NEW_NAME = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
_TAKES_NEW_NAME = (2, 11)

_NO_CACHING = "PYTORCH_NO_CUDA_MEMORY_CACHING"

_SWITCHES = {
    "expandable_segments",
    "graph_capture_record_stream_reuse",
    "pinned_free_catch_all",
    "pinned_use_background_threads",
    "pinned_use_cuda_host_register",
    "release_lock_on_cudamalloc",
    "throw_on_cudamalloc_oom",
}
_OPTIONS = _SWITCHES | {
    "backend",
    "garbage_collection_threshold",
    "large_segment_size_mb",
    "max_non_split_rounding_mb",
    "max_split_size_mb",
    "per_process_memory_fraction",
    "pinned_max_cached_size_mb",
    "pinned_max_round_threshold_mb",
    "pinned_num_register_threads",
    "pinned_reserve_segment_size_mb",
    "roundup_power2_divisions",
}
_IDLE_BESIDE_EXPANDABLE_SEGMENTS = ("max_split_size_mb", "garbage_collection_threshold")


def check_allocator(environ: Mapping[str, str], torch_version: str) -> list[Check]:
    """Says which settings are on; or, one by one, what is wrong with them."""
    found = list(_variables(environ, torch_version))
    text = environ.get(OLD_NAME) or environ.get(NEW_NAME) or ""
    if not any(check.state == "refused" for check in found):
        found += _options(text)
    return found or [Check(name="allocator", text=text or "torch's defaults")]


def _refused(text: str, advice: str) -> Check:
    return Check(name="allocator", state="refused", text=text, advice=advice)


def _warning(text: str, advice: str) -> Check:
    return Check(name="allocator", state="warning", text=text, advice=advice)


def _variables(environ: Mapping[str, str], torch_version: str) -> Iterator[Check]:
    """What is wrong with the variables, whatever the settings are."""
    if _NO_CACHING in environ:
        yield _refused(
            f"with {_NO_CACHING} torch asks the driver for each tensor and counts none: all peaks would read 0",
            f"unset {_NO_CACHING}",
        )
    old, new = environ.get(OLD_NAME), environ.get(NEW_NAME)
    if old and new and _pairs(old) != _pairs(new):
        yield _refused(
            f"{OLD_NAME}={old} and {NEW_NAME}={new} differ, and which of them counts depends on torch's version",
            "unset one of them",
        )
    if new and not old and version_numbers(torch_version)[:2] < _TAKES_NEW_NAME:
        yield _warning(
            f"torch {torch_version} may take no notice of {NEW_NAME}={new} on CUDA",
            f"set {OLD_NAME} instead, which every version reads",
        )


def _pairs(text: str) -> list[tuple[str, str]]:
    """Options and values in their order; commas inside brackets belong to a value."""
    entries = [entry for entry in re.split(r",(?![^\[]*\])", re.sub(r"\s", "", text)) if entry]
    return [(name, value) for name, _, value in (entry.partition(":") for entry in entries)]


def _options(text: str) -> Iterator[Check]:
    """What is wrong with the settings."""
    pairs = _pairs(text)
    settings = dict(pairs)
    for name, value in pairs:
        yield from _option(name, value)
        if settings[name] != value:
            yield _warning(f"{name} is set to {value} and to {settings[name]}", "say it once")
    if settings.get("expandable_segments") == "True":
        for name in _IDLE_BESIDE_EXPANDABLE_SEGMENTS:
            if name in settings:
                yield _warning(f"{name} does nothing with expandable_segments:True", "leave out one of them")


def _option(name: str, value: str) -> Iterator[Check]:
    if name not in _OPTIONS:
        close = difflib.get_close_matches(name, _OPTIONS, n=1)
        hint = f"did you mean {close[0]}?" if close else "leave it out"
        yield _warning(f"torch knows no option {name} and passes over it", hint)
    elif not value:
        yield _refused(f"{name} has no value, and torch would stop at it", f"write {name}:VALUE")
    elif name in _SWITCHES and value not in {"True", "False"}:
        yield _refused(f"{name}:{value} cannot be: torch would stop at it", f"write {name}:True or {name}:False")
    elif name == "backend" and value != "native":
        # cudaMallocAsync knows no requested bytes, no splits and no snapshot, and its pool keeps what the driver likes.
        yield _refused(
            f"backend:{value} does not keep the counters that peaks come from, so its numbers compare with no others",
            "leave backend out, or choose backend:native",
        )
    elif name == "per_process_memory_fraction":
        yield _warning(
            f"{name}:{value} limits what a job may allocate, and no knob says so", "set memory_limit_gib instead"
        )
