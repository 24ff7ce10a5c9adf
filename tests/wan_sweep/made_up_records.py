"""Records as the runner writes them, made up: the tests of report and track work on these files, not on a pipeline."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_sweep.record import SCHEMA_VERSION
from wan_sweep.store import slug

MIB = 2**20
GIB = 2**30
SWEEP_ID = "2026-11-23_21-04-05"

KNOBS: dict[str, Any] = {
    "model": "t2v-1.3B",
    "ckpt_dir": None,
    "mode": "measure",
    "device": "cuda",
    "precision": "fp16",
    "load_strategy": "full",
    "offload": False,
    "t5_cpu": False,
    "attention_slicing": False,
    "size": "832*480",
    "frame_num": 81,
    "prompt": "Two anthropomorphic cats in comfy boxing gear fight intensely on a spotlighted stage.",
    "sample_steps": 3,
    "sample_guide_scale": 5.0,
    "repeats": 1,
}
ENVIRONMENT = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "driver": "575.57.08",
    "torch": "2.11.0+cu130",
    "cuda": "13.0",
    "cudnn": "91002",
    "python": "3.12.3",
    "git_commit": "1f0c2d3",
    "allocator": "expandable_segments:True",
}


def metrics_of(
    *, base: Mapping[str, float], activation: float, scale: float = 1, overhead: float = 1.1, step_s: float = 0.95
) -> dict[str, float]:
    """Metrics of a job whose peak lies in denoise; base and activation in MiB.

    Args:
        base: weights by component.
        activation: what denoise needs besides.
        scale: factor on what the other phases need.
        overhead: reserved over allocated.
        step_s: median seconds of a step.
    """
    on_device = sum(base.values())
    activations = {
        "load": 0.0,
        "encode_text": 120 * scale,
        "denoise": activation,
        "decode": activation * 0.6,
    }
    peaks = {phase: on_device + more for phase, more in activations.items()}
    peaks["encode_text"] = base.get("t5", 0) + activations["encode_text"]
    peak = max(peaks.values())
    metrics: dict[str, float] = {f"memory/base/{part}_bytes": int(value * MIB) for part, value in base.items()}
    for phase in ("denoise", "decode"):
        metrics |= {f"memory/resident/{phase}/{part}_bytes": int(value * MIB) for part, value in base.items()}
    for phase, value in activations.items():
        metrics[f"memory/activation/{phase}_bytes"] = int(value * MIB)
    for phase, value in peaks.items():
        metrics[f"memory/peak/{phase}/allocated_bytes"] = int(value * MIB)
        metrics[f"memory/peak/{phase}/reserved_bytes"] = int(value * overhead * MIB)
    metrics |= {
        "memory/peak/requested_bytes": int(peak * 0.99 * MIB),
        "memory/peak/allocated_bytes": int(peak * MIB),
        "memory/peak/reserved_bytes": int(peak * overhead * MIB),
        "memory/peak/device_used_bytes": int((peak * overhead + 520) * MIB),
        "memory/peak/host_rss_bytes": int(2900 * MIB),
        "memory/peak/host_pinned_bytes": 0,
        "memory/fragmentation_pct": round(100 * (overhead - 1) / overhead, 2),
        "time/load_s": 4.2,
        "time/encode_text_s": 0.31,
        "time/denoise_s": round(step_s * 3 + 0.12, 3),
        "time/decode_s": 3.4,
        "time/save_s": 0.4,
        "time/step_s": step_s,
        "time/first_step_s": round(step_s + 0.12, 3),
        "time/total_s": round(4.2 + 0.31 + step_s * 3 + 0.12 + 3.4 + 0.4, 3),
    }
    return metrics


def record(
    number: int, overrides: Mapping[str, Any], metrics: Mapping[str, float] | None = None, **changes: Any
) -> dict[str, Any]:
    """One record with everything that the schema names; `changes` replace whole top-level entries."""
    peak = (metrics or {}).get("memory/peak/denoise/allocated_bytes", 0)
    name = f"{number}_{slug(overrides, otherwise='t2v-1.3B')}"
    repeat = changes.pop("repeat", 0)
    made: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "job": {"key": f"{number:02d}ab34cd56ef", "number": number, "name": name, "repeat": repeat},
        "sweep": {"name": "main", "id": SWEEP_ID, "folder": "outputs/main/2026-11-23_21-04-05"},
        "knobs": {**KNOBS, **overrides},
        "overrides": dict(overrides),
        "outcome": "ok",
        "reason": "",
        "failure": None,
        "started_at": f"2026-11-23T21:{number:02d}:05+00:00",
        "ended_at": f"2026-11-23T21:{number:02d}:35+00:00",
        "wall_seconds": 30.0,
        "mode": "measure",
        "code_version": "0.1.0+1f0c2d3",
        "environment": ENVIRONMENT,
        "weights": "random (seed 0)",
        "metrics": dict(metrics or {}),
        "series": {
            "step/allocated_bytes": [int(peak * part) for part in (0.98, 1.0, 1.0)],
            "step/reserved_bytes": [int(peak * part * 1.1) for part in (0.98, 1.0, 1.0)],
            "step/seconds": [1.07, 0.95, 0.95],
        }
        if metrics
        else {},
        "ranks": [{"rank": 0, "metrics": dict(metrics or {}), "series": {}}],
        "warnings": [],
        "idle_knobs": {},
        "measured_in": None,
        "fidelity": None,
        "passes": {},
        "checks": [],
    }
    made.update(changes)
    return made


def write_sweep(sweep_dir: Path, *records: Mapping[str, Any]) -> Path:
    """Write each record to a job folder with the files that a job leaves; returns the sweep's folder."""
    for made in records:
        folder = sweep_dir / made["job"]["name"]
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(made, indent=2), "utf-8")
        (folder / "config.yaml").write_text(f"model: {made['knobs']['model']}\n", "utf-8")
        (folder / "log.txt").write_text("phase load\nphase denoise\n", "utf-8")
    return sweep_dir


def main_job() -> list[dict[str, Any]]:
    """The main job with five more corners: fp16 and bf16, offload on and off, an OOM, a refusal, one taken over."""
    whole = {"t5": 10835.0, "dit": 2706.0, "vae": 484.0}
    leaving = {"t5": 0.0, "dit": 2706.0, "vae": 484.0}
    return [
        record(1, {"precision": "fp16", "offload": True}, metrics_of(base=leaving, activation=2954, step_s=0.97)),
        record(2, {"precision": "fp16", "offload": False}, metrics_of(base=whole, activation=2954, step_s=0.94)),
        record(3, {"precision": "bf16", "offload": True}, metrics_of(base=leaving, activation=2960, step_s=0.955)),
        record(4, {"precision": "bf16", "offload": False}, metrics_of(base=whole, activation=2960, step_s=0.93)),
        record(
            5,
            {"precision": "fp32", "offload": False},
            outcome="oom",
            reason="out of memory in denoise, step 1: 17.2 GiB in use of 18.0 GiB, 1.9 GiB asked for",
            failure={"phase": "denoise", "step": 1, "resident_components_bytes": {"dit": 5412 * MIB, "vae": 484 * MIB}},
        ),
        record(
            6,
            {"precision": "fp32", "offload": True},
            outcome="refused",
            reason="ulysses_size=5 does not divide num_heads=12; choose 1, 2, 3, 4, 6 or 12",
            started_at="2026-11-23T21:05:59+00:00",
            ended_at="2026-11-23T21:05:59+00:00",
        ),
    ]
