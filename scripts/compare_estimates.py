"""Holds estimates against the records that scripts/run_estimate_check.py left on a GPU: tables as Markdown.

    python scripts/compare_estimates.py outputs/estimate_check.tar.gz --at-once 2

Takes its archive, or any folders of records. Each measured job is estimated in a process of its own, for its card and
with its allocator's settings. The first table has requested, allocated and reserved by phase, measured and estimated,
the worst job named; the second one has every job.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from wan_sweep.cards import DEFAULT_CARD, card_like
from wan_sweep.record import RECORD_FILE, Record, load_record
from wan_sweep.schema import KNOBS, text
from wan_sweep.store import JOB_FILE, read_json, write_json
from wan_sweep.units import format_bytes

PHASES = ("load", "encode_text", "denoise", "decode", "save")
COUNTERS = ("requested", "allocated", "reserved")
PEAKS = tuple((phase, counter) for phase in PHASES for counter in COUNTERS)
RANDOM = "random"
"""How the names of jobs begin that run_estimate_check.py has drawn."""
SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
UNTOLD = frozenset(
    (
        "mode",
        "device",
        "prompt",
        "fidelity",
        "save_video",
        "track",
        "resume",
        "share_gpu",
        "name",
        "description",
        "output_root",
        "sample_steps",
        "sample_shift",
        "sample_guide_scale",
        "memory_limit_gib",
        "profile_memory",
        "trace",
    )
)
"""Knobs that say nothing about memory, or are the same in all jobs."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A measured job with its estimate: bytes at the peaks of phases, by phase and counter."""

    label: str
    measured: Mapping[tuple[str, str], int]
    estimated: Mapping[tuple[str, str], int]
    seconds: float

    def error(self, peak: tuple[str, str]) -> float:
        """Of the estimate in percent."""
        return 100 * (self.estimated.get(peak, 0) - self.measured[peak]) / self.measured[peak]


def records_in(path: Path) -> list[Record]:
    """All records of an archive, or of a folder."""
    if path.is_dir():
        return [load_record(one) for one in sorted(path.rglob(RECORD_FILE))]
    with tempfile.TemporaryDirectory() as folder, tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
        return records_in(Path(folder))


def pair(record: Record) -> Pair:
    """A measured job and its estimate."""
    with tempfile.TemporaryDirectory() as folder:
        told = estimated(record, Path(folder))
    return Pair(
        label=label(record),
        measured=_peaks(record.metrics),
        estimated=_peaks(told["metrics"]),
        seconds=told["estimate"]["seconds"],
    )


def _peaks(metrics: Mapping[str, float]) -> dict[tuple[str, str], int]:
    found = {peak: metrics.get("memory/peak/{}/{}_bytes".format(*peak)) for peak in PEAKS}
    return {peak: int(value) for peak, value in found.items() if value}


def estimated(record: Record, folder: Path) -> dict[str, Any]:
    """The estimate of a measured job, made in a process of its own with the same allocator settings."""
    gpu, num_bytes = record.environment.get("gpu", ""), int(record.environment.get("gpu_memory_bytes", 0))
    card = card_like(gpu, num_bytes)
    write_json(folder / JOB_FILE, {"knobs": {**record.knobs}})
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    subprocess.run(
        [sys.executable, "-m", "wan_sweep.estimate.run", str(folder), card.name if card else DEFAULT_CARD],
        env=environment | {"PYTORCH_ALLOC_CONF": _allocator(record)},
        check=False,
    )
    return read_json(folder / "estimate.json")


def _allocator(record: Record) -> str:
    settings = record.environment.get("allocator", "")
    return "" if settings == "default" else settings


def label(record: Record) -> str:
    """What makes the job another one than the default."""
    words = [
        f"{name}={text(value)}"
        for name, value in record.knobs.items()
        if name in KNOBS and name not in UNTOLD and value != KNOBS[name].default
    ]
    return " ".join([*words, _allocator(record)]).strip()


def by_phase(pairs: Sequence[Pair]) -> list[str]:
    """A row for each phase and counter."""
    lines = [
        "| phase | counter | equal to the byte | median of abs. % | worst % | measured | estimated | worst job |",
        "| --- | --- | --: | --: | --: | --: | --: | --- |",
    ]
    for peak in PEAKS:
        those = [one for one in pairs if peak in one.measured]
        if not those:
            continue
        worst = max(those, key=lambda one: abs(one.error(peak)))
        equal = sum(one.error(peak) == 0 for one in those)
        middle = median(abs(one.error(peak)) for one in those)
        beside = "0 | | |"
        if worst.error(peak):
            sizes = format_bytes(worst.measured[peak]), format_bytes(worst.estimated.get(peak, 0))
            beside = f"{worst.error(peak):+.3f} | {' | '.join(sizes)} | {worst.label}"
        lines.append(f"| {peak[0]} | {peak[1]} | {equal} of {len(those)} | {middle:.3f} | {beside} |")
    return lines


def by_job(pairs: Iterable[Pair]) -> list[str]:
    """A row for each job: the errors of its phases, in percent."""
    told = [(phase, counter) for phase in ("encode_text", "denoise", "decode") for counter in COUNTERS]
    lines = [
        f"| job | {' | '.join(f'{phase} {counter}' for phase, counter in told)} | s |",
        f"| --- |{' --: |' * (len(told) + 1)}",
    ]
    for one in pairs:
        cells = [_cell(one.error(peak)) if peak in one.measured else "" for peak in told]
        lines.append(f"| {one.label} | {' | '.join(cells)} | {one.seconds:.1f} |")
    return lines


def _cell(error: float) -> str:
    return f"{error:+.3f}" if error else "0"


def tables(paths: Sequence[Path], at_once: int) -> str:
    """The comparison as Markdown."""
    every = [record for path in paths for record in records_in(path)]
    good = [record for record in every if record.outcome == "ok" and record.mode == "measure"]
    different: dict[str, Record] = {}
    for record in good:
        different.setdefault(label(record), record)
    with ThreadPoolExecutor(at_once) as pool:  # each waits for a process
        pairs = list(pool.map(pair, different.values()))
    drawn = sum(str(record.knobs.get("name")).startswith(RANDOM) for record in different.values())
    head = (
        f"{len(different)} configurations, {drawn} of them drawn at random, from {len(good)} measured jobs of "
        f"{len(every)} records. Errors are those of the estimate, in percent."
    )
    return "\n".join([head, "", *by_phase(pairs), "", *by_job(pairs)])


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="archives, or folders of records")
    parser.add_argument("--at-once", type=int, default=1, help="estimates at the same time")
    asked = parser.parse_args()
    print(tables(asked.paths, asked.at_once))
    return 0


if __name__ == "__main__":
    sys.exit(main())
