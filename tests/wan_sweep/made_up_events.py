"""memory_events.json and attribution.json as the runner leaves them, made up beside the records."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.wan_sweep.made_up_records import MIB, main_job, write_sweep


class Events:
    """Writes the events of a made-up run, one boundary after the other; levels in MiB.

    Args:
        libraries: what stands before the first phase.
        overhead: reserved over the highest allocated so far.
    """

    def __init__(self, *, libraries: float = 0.0, overhead: float = 1.0) -> None:
        self.events: list[dict[str, Any]] = []
        self.residents: dict[str, float] = {}
        self.libraries, self.overhead = libraries, overhead
        self.kept = self.clock = self.reserved = 0.0
        self._phase: str | None = None

    @property
    def level(self) -> float:
        return self.libraries + sum(self.residents.values()) + self.kept

    def boundary(self, event: str, kind: str, name: str, *, after: float = 0.0, peak: float = 0.0, **more: Any) -> None:
        """Note a boundary `after` seconds, in which as much as `peak` was allocated beyond what stands now."""
        before = self.events[-1]["allocated_bytes"] / MIB if self.events else 0.0
        self.clock += after
        highest = max(before, self.level + peak, self.level)
        self.reserved = max(self.reserved, highest * self.overhead)
        if kind == "phase" and event == "begin":
            self._phase = name
        level, at_most = int(self.level * MIB), int(highest * MIB)
        self.events.append(
            {
                "name": name,
                "kind": kind,
                "event": event,
                "index": more.pop("index", None),
                "total": more.pop("total", None),
                "phase": self._phase,
                "time": 1795477298.0 + self.clock,
                "elapsed_s": self.clock,
                "requested_bytes": level,
                "allocated_bytes": level,
                "active_bytes": level,
                "reserved_bytes": int(self.reserved * MIB),
                "inactive_split_bytes": 0,
                "num_alloc_retries": 0,
                "num_ooms": 0,
                "interval": {
                    "requested_peak_bytes": at_most,
                    "allocated_peak_bytes": at_most,
                    "active_peak_bytes": at_most,
                    "reserved_peak_bytes": int(self.reserved * MIB),
                },
                "residents": {part: int(value * MIB) for part, value in self.residents.items()},
                **more,
            }
        )
        if kind == "phase" and event == "end":
            self._phase = None

    def load(self, seconds: Mapping[str, float], sizes: Mapping[str, float]) -> None:
        """Bring components, one after the other, in a phase of their own."""
        self.boundary("begin", "phase", "load")
        for name, duration in seconds.items():
            self.boundary("begin", "component", name)
            self.residents[name] = sizes[name]
            moved = int(sizes[name] * MIB)
            self.boundary("end", "component", name, after=duration, peak=3, seconds=duration, moved_bytes=moved)
        self.boundary("end", "phase", "load", after=0.001, seconds=sum(seconds.values()))

    def work(self, phase: str, seconds: float, peak: float, *, steps: int = 0, blocks: int = 0) -> None:
        """Compute, in steps and blocks if asked for; the highest block is number 1 of each step."""
        self.boundary("begin", "phase", phase)
        for step in range(steps):
            self.boundary("begin", "step", "step", index=step, total=steps)
            for block in range(blocks):
                share = 1.0 if block == 1 else 0.9
                self.boundary("begin", "block", "block", index=block)
                self.kept = peak * 0.2
                after = seconds / steps / blocks
                self.boundary(
                    "end", "block", "block", index=block, after=after, peak=peak * (share - 0.2), seconds=None
                )
            self.kept = 0.0
            after = 0.0 if blocks else seconds / steps
            self.boundary("end", "step", "step", index=step, total=steps, after=after, peak=peak, seconds=after)
        after = 0.0 if steps else seconds
        self.boundary("end", "phase", phase, after=after, peak=0.0 if steps else peak, seconds=seconds)

    def release(self, name: str) -> None:
        """Let a component go."""
        self.boundary("begin", "release", name)
        moved = int(self.residents.pop(name) * MIB)
        self.boundary("end", "release", name, after=0.004, seconds=0.004, moved_bytes=moved)


def memory_events(made: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The document that goes with a made-up record."""
    return {
        "schema_version": 1,
        "job": {name: made["job"][name] for name in ("key", "number", "name")},
        "sweep": made["sweep"],
        "device": "NVIDIA H100 80GB HBM3",
        "rank": 0,
        "started_at": "2026-11-23T21:01:05.000+00:00",
        "events": list(events),
    }


def run_events(
    *, offload: bool, sizes: Mapping[str, float], peaks: Mapping[str, float], seconds: Mapping[str, float], **more: int
) -> list[dict[str, Any]]:
    """Events of a whole run; sizes of components and peaks of phases in MiB."""
    run = Events(libraries=32, overhead=1.12)
    loading = {part: seconds.get(part, 0.4) for part in sizes}
    if not offload:
        run.load(loading, sizes)
    for part, phase in (("t5", "encode_text"), ("dit", "denoise"), ("vae", "decode")):
        if offload:
            run.load({part: loading[part]}, sizes)
        steps = more if phase == "denoise" else {}
        run.work(phase, seconds[phase], peaks[phase], **steps)
        if offload:
            run.release(part)
    run.work("save", seconds["save"], 0)
    return run.events


def item(size: float, **more: Any) -> dict[str, Any]:
    """One group of equal live tensors; size in MiB."""
    made = {
        "bytes": int(size * MIB),
        "count": 1,
        "kind": "activation",
        "component": "dit",
        "phase": "denoise",
        "step": 1,
        "block": 1,
        "module": "blocks.1.self_attn",
        "operation": "aten::_to_copy",
        "shape": [1, 32760, 12, 64],
        "dtype": "float64",
        "parameter": None,
    }
    return {**made, **more}


def peak(phase: str, weights: Mapping[str, float], live: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """A peak of an attribution; weights by component in MiB, live items as `item` makes them."""
    held = {part: int(size * MIB) for part, size in weights.items()}
    activations = sum(one["bytes"] for one in live if one["kind"] != "weights")
    lost = sum(one["bytes"] for one in live if one["kind"] == "unattributed")
    allocated = sum(held.values()) + activations
    made = {
        "scope": "phase",
        "phase": phase,
        "step": 1 if phase == "denoise" else None,
        "block": 1 if phase == "denoise" else None,
        "module": "blocks.1.self_attn" if phase == "denoise" else "",
        "operation": "aten::_to_copy",
        "allocated_bytes": allocated,
        "named_bytes": allocated - lost,
        "unattributed_bytes": lost,
        "weights": held,
        "activation_bytes": activations,
        "live": list(live),
        "num_live": sum(one["count"] for one in live) + 12,
        "rest_bytes": 0,
    }
    return {**made, **more}


def attribution(*peaks: Mapping[str, Any], oom: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The document that an attribution pass leaves; the first peak is the run's."""
    return {
        "schema_version": 1,
        "device": "NVIDIA H100 80GB HBM3",
        "outcome": "oom" if oom else "ok",
        "reason": "",
        "num_steps": 2,
        "peaks": [{**one, "scope": "phase" if index else "run"} for index, one in enumerate(peaks)],
        "oom": oom,
    }


def leave(sweep_dir: Path, made: Mapping[str, Any], name: str, document: Mapping[str, Any]) -> Path:
    """Write a document into the folder of a made-up job; returns that folder."""
    folder = sweep_dir / made["job"]["name"]
    (folder / name).write_text(json.dumps(document), "utf-8")
    return folder


def whole_main_job() -> list[dict[str, Any]]:
    """The jobs of `main_job` with all that a run on a GPU leaves in its record."""
    jobs = main_job()
    checks = [
        {"name": "driver", "state": "ok", "text": "575.57.08", "advice": ""},
        {"name": "processes", "state": "warning", "text": "1 other process uses the GPU", "advice": "stop it"},
    ]
    distance = {"fidelity/psnr_db": 41.27, "fidelity/ssim": 0.98712, "fidelity/max_abs_diff": 23}
    for made in jobs:
        made["checks"] = checks
        told = {"reference": jobs[0]["job"]["name"], "reference_folder": "out/1", "reason": ""}
        metrics = made["metrics"]
        if not metrics:
            continue
        made["fidelity"] = told
        metrics["memory/base/libraries_bytes"] = 32 * MIB
        metrics["memory/peak/process_used_bytes"] = metrics["memory/peak/reserved_bytes"] + 640 * MIB
        if made["knobs"]["precision"] == "bf16":
            metrics |= {**distance, "fidelity/latents_max_abs_diff": 0.071, "fidelity/is_bit_equal": 0}
    jobs[0]["fidelity"]["reason"] = "is the reference itself"
    jobs[1]["metrics"] |= {"fidelity/is_bit_equal": 1, "fidelity/max_abs_diff": 0, "fidelity/ssim": 1.0}
    jobs[1]["passes"] = {"attribution": {"outcome": "ok", "reason": "", "seconds": 9.2}}
    jobs[4]["passes"] = {"attribution": {"outcome": "oom", "reason": "out of memory", "seconds": 6.1}}
    return jobs


def denoise_peak(**more: Any) -> dict[str, Any]:
    """The peak of job 2 of `whole_main_job`: its parts add up to what the record says."""
    weights = {"t5": 10835.0, "dit": 2706.0, "vae": 484.0}
    live = [
        *(item(size, kind="weights", component=part, block=None, parameter="all") for part, size in weights.items()),
        item(2100),
        item(622, module="blocks.1.ffn.0", operation="aten::mm", shape=[32760, 8960], dtype="bfloat16"),
        item(200, component="dit", block=None, module="head", shape=None, dtype=None),
        item(32, kind="workspace", component="", phase="", step=None, block=None, module="", shape=None, dtype=None),
    ]
    return peak("denoise", weights, live, **more)


def write_main_sweep(sweep_dir: Path) -> Path:
    """Write the whole main job with events for jobs 1 and 2, and attributions for jobs 2 and 5."""
    jobs = whole_main_job()
    write_sweep(sweep_dir, *jobs)
    sizes = {"t5": 10835.0, "dit": 2706.0, "vae": 484.0}
    peaks = {"encode_text": 120.0, "denoise": 2954.0, "decode": 1772.0}
    seconds = {"t5": 2.9, "dit": 1.1, "vae": 0.2, "encode_text": 0.31, "denoise": 2.95, "decode": 3.4, "save": 0.4}
    for made in jobs[:2]:
        offload = made["knobs"]["offload"]
        held = sizes | ({"t5": 5000.0} if offload else {})
        events = run_events(offload=offload, sizes=held, peaks=peaks, seconds=seconds, steps=3)
        leave(sweep_dir, made, "memory_events.json", memory_events(made, events))
    leave(sweep_dir, jobs[1], "attribution.json", attribution(denoise_peak(), denoise_peak()))
    weights = {"dit": 5412.0, "vae": 484.0}
    failed = peak("denoise", weights, [item(4200)], scope="oom", request_bytes=1900 * MIB, step=0)
    leave(sweep_dir, jobs[4], "attribution.json", attribution(oom=failed))
    return sweep_dir
