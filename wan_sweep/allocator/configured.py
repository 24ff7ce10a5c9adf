"""The allocator's settings as PYTORCH_CUDA_ALLOC_CONF says them."""

import re
from collections.abc import Mapping

from wan_sweep.allocator.rules import Settings
from wan_sweep.units import MIB

VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_WITHOUT_EFFECT_ON_SIZES = ("backend", "pinned_", "release_lock_on_cudamalloc", "throw_on_cudamalloc_oom")


def settings_of(environ: Mapping[str, str]) -> tuple[Settings, tuple[str, ...]]:
    """The settings of a process with this environment, and the options among them that the model does not know."""
    conf = next((environ[name] for name in VARIABLES if environ.get(name)), "")
    entries = re.split(r",(?![^\[]*\])", re.sub(r"\s", "", conf))
    expandable = False
    max_split: int | None = None
    divisions: tuple[int, ...] = ()
    unknown = []
    for name, _, value in (entry.partition(":") for entry in entries if entry):
        if name == "expandable_segments":
            expandable = value == "True"
        elif name == "max_split_size_mb" and value.isdigit():
            max_split = int(value) * MIB
        elif name == "roundup_power2_divisions" and value.isdigit():
            divisions = (int(value),)
        elif not name.startswith(_WITHOUT_EFFECT_ON_SIZES):
            unknown.append(f"{name}:{value}")
    settings = Settings(expandable_segments=expandable, max_split_bytes=max_split, roundup_divisions=divisions)
    return settings, tuple(unknown)
