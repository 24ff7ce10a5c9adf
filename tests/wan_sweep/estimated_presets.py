"""The presets whose estimated peaks are kept: small workloads of the released sizes, so that each takes seconds."""

from pathlib import Path

import yaml

from wan_sweep.cards import DEFAULT_CARD, card_named
from wan_sweep.environment import Machine
from wan_sweep.rules import resolve
from wan_sweep.schema import Job

CONF = Path(__file__).resolve().parents[2] / "conf" / "optimization"
PRESETS = (("t2v-1.3B", "none"), ("t2v-1.3B", "lowest_memory"), ("t2v-14B", "memory_opt"))
SMALL = {"size": "832*480", "frame_num": 9, "sample_steps": 1, "sample_guide_scale": 1.0}


def preset(model: str, optimization: str) -> Job:
    """A small job with this preset, resolved."""
    knobs = yaml.safe_load((CONF / f"{optimization}.yaml").read_text())
    job = Job(model=model, mode="estimate", card=DEFAULT_CARD).replace(**{**SMALL, **knobs})
    return resolve(job, Machine()).job


def estimated_peaks() -> dict[str, dict[str, float]]:
    """The metrics of each preset's estimate."""
    from wan_sweep.estimate.predict import estimate

    return {
        f"{model} {optimization}": estimate(preset(model, optimization), card_named(DEFAULT_CARD))["metrics"]
        for model, optimization in PRESETS
    }
