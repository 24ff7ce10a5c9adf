"""One table of what every further GPU brings: seconds, speed-up, memory of each rank, collectives, fidelity.

Why: a split is chosen by what it saves in time and in memory on every single GPU, and by what it changes in the video.

How: python scripts/scaling_table.py SWEEP_FOLDER ... [--output FILE] [--pack FILE.tar.gz]
(scripts/run_scaling.sh does it after each of its sweeps). Nothing is measured here: all figures come from the records
that are there, also of a sweep that was stopped. A job that one sweep took over from another counts once. Estimates of
the same splits, if a folder holds any, stand beside the measured peaks. --pack keeps records, logs, plans and the table
in one file.
"""

import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import table_command

from wan21.errors import WanError
from wan_sweep.build import build_layout
from wan_sweep.errors import RecordError
from wan_sweep.headline import PEAK_RANK
from wan_sweep.record import Record
from wan_sweep.report.cells import Column
from wan_sweep.report.facts import facts
from wan_sweep.report.fidelity import IS_EQUAL, PSNR, are_repeats_equal
from wan_sweep.report.markdown import table
from wan_sweep.report.sheet import (
    PEAK_ALLOCATED,
    PEAK_RESERVED,
    PROCESS_USED,
    STEP_SECONDS,
    Sheet,
    group,
    read_records,
)
from wan_sweep.schema import KNOBS, Job
from wan_sweep.units import format_gib

NOTHING = "-"
PEAK_COLUMN = 9
BASE_DIT = "memory/base/dit_bytes"
ACTIVATION = "memory/activation/denoise_bytes"
HOST_PINNED = "memory/peak/host_pinned_bytes"
IN_COLLECTIVES = "collectives/per_step_s"
EXPOSED = "collectives/exposed_per_step_s"
LATENTS_L2 = "fidelity/latents_relative_l2"
PASSES_OF_GUIDANCE = 2
NOT_OF_A_SPLIT = ("mode", "card")
"""Beside what is in no job key: knobs in which an estimate differs from the measured job that it is of."""

PACKED = ("*.json", "*.csv", "*.md", "*/record.json", "*/config.yaml", "*/log*.txt", "*/rank*/log*.txt")

NOTES = """\
- U ranks share heads (Ulysses), R pass keys and values around (Ring), cfg2 is one group for each pass of guidance.
  FSDP shards DiT and T5 over the devices; streamed is load_strategy=part, sharded over the hosts; with tiles
  it is optimization=lowest_memory, where components also leave the device when their phase ends.
- A step is the median, the first left out; of several runs the middle one. A forward is half a step, since guidance
  takes two; with cfg2 both run at the same time, and half a step is what a forward costs all the same.
- Speed-up: seconds of a step on one GPU, everything resident, over those of the split.
- Memory in GiB, of each rank, never summed: of ranks that differ the largest, with its rank, and the smallest. DiT: its
  weights; activation: what denoising takes besides what stands there; peaks: of the whole run, text encoder included.
  Process: all of its part of the device, context and messages' buffers included. Pinned: on the host, of each process.
- Collectives: share of a step in which one ran, waiting for others included, and in which nothing else ran; from an
  extra run with trace=true.
- Latents: norm of the difference to the run on one GPU over its norm; video: PSNR in dB. Same bits: whether all runs of
  a split with one seed gave equal latents and frames.
"""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One way to run a video, and the records of all its runs; `runs` are those with numbers."""

    job: Job
    runs: tuple[Record, ...]
    last: Record
    estimate: Record | None

    @property
    def workload(self) -> str:
        """Model and size."""
        return f"{self.job.model} {self.job.size} {self.job.frame_num}"

    @property
    def num_ranks(self) -> int | None:
        """How many processes; None where the sizes cannot be."""
        try:
            return build_layout(self.job).world_size
        except WanError:
            return None

    @property
    def is_streamed(self) -> bool:
        """Whether weights come from the host."""
        return self.job.load_strategy != "full"

    @property
    def words(self) -> str:
        """What is split."""
        job = self.job
        sizes = [f"{letter}{size}" for letter, size in (("U", job.ulysses_size), ("R", job.ring_size)) if size > 1]
        words = ["cfg2"] * job.cfg_parallel + sizes
        sharded = [name for name, is_on in (("DiT", job.dit_fsdp), ("T5", job.t5_fsdp)) if is_on]
        more = [f"FSDP of {' and '.join(sharded)}"] if sharded else []
        more += ["streamed"] if self.is_streamed else []
        more += ["tiles"] if job.vae_budget_gib is not None else []
        more += ["residual on host"] if job.residual_on_host else []
        return " + ".join([" x ".join(words) or "one GPU", *more])

    @property
    def outcome(self) -> str:
        """How its runs ended."""
        return "ok" if self.runs else self.last.outcome

    def value(self, metric: str) -> float | None:
        """The middle of a metric over its runs."""
        values = [run.metrics[metric] for run in self.runs if metric in run.metrics]
        return median(values) if values else None

    def by_rank(self, metric: str) -> list[float]:
        """A metric of each rank, of the first run."""
        ranks = self.runs[0].ranks if self.runs else []
        return [rank["metrics"][metric] for rank in ranks if metric in rank["metrics"]]


def read_splits(folders: Sequence[Path]) -> tuple[list[Split], list[Record], list[str]]:
    """The splits in the order of the sweeps, those of one workload together; all records; what cannot be read.

    Raises:
        RecordError: there is not one record.
    """
    records: list[Record] = []
    damaged: list[str] = []
    homes: set[Path] = set()
    for folder in folders:
        found, problems = read_records(folder)
        records += found
        damaged += problems
        homes |= {(folder / record.name).resolve() for record in found}
    if not records:
        raise RecordError(f"{', '.join(map(str, folders))}: no records; name folders of sweeps")
    kept = [one for one in records if not (one.measured_in and Path(one.measured_in).resolve() in homes)]
    estimates = {_identity(one): one for one in kept if one.mode == "estimate" and PEAK_ALLOCATED in one.metrics}
    by_identity: dict[str, list[Record]] = {}
    for one in kept:
        if one.mode != "estimate":
            by_identity.setdefault(_identity(one), []).append(one)
    splits = [
        Split(
            job=Job.from_dict(members[0].knobs),
            runs=tuple(one for one in members if one.outcome in {"ok", "skipped"} and STEP_SECONDS in one.metrics),
            last=members[-1],
            estimate=estimates.get(identity),
        )
        for identity, members in by_identity.items()
    ]
    workloads = list(dict.fromkeys(split.workload for split in splits))
    return sorted(splits, key=lambda split: workloads.index(split.workload)), records, damaged


def _identity(record: Record) -> str:
    """What tells a split from another one, as text."""
    names = [name for name, knob in KNOBS.items() if knob.rule.in_key and name not in NOT_OF_A_SPLIT]
    return json.dumps({name: record.knobs.get(name) for name in names}, sort_keys=True)


def alone(split: Split, splits: Iterable[Split]) -> Split | None:
    """The run of the same workload on one GPU with everything resident."""
    same = (one for one in splits if one.workload == split.workload and one.num_ranks == 1 and not one.is_streamed)
    return next(same, None)


def speed_up(split: Split, splits: Sequence[Split]) -> float | None:
    """Seconds of a step on one GPU over those of the split."""
    one, step = alone(split, splits), split.value(STEP_SECONDS)
    reference = one.value(STEP_SECONDS) if one else None
    return reference / step if reference and step else None


def _forward(split: Split) -> float | None:
    step = split.value(STEP_SECONDS)
    return None if step is None else step / (1 if split.job.sample_guide_scale == 1 else PASSES_OF_GUIDANCE)


def _ranks_cell(split: Split, metric: str) -> str:
    values = split.by_rank(metric)
    if not values:
        return NOTHING
    shown = [format_gib(value) for value in values]
    if len(set(shown)) == 1:
        return shown[0]
    return f"{max(shown, key=float)} (rank {values.index(max(values))}; least {min(shown, key=float)})"


def _fullest(split: Split) -> str:
    rank = split.value(PEAK_RANK)
    return NOTHING if rank is None else f"{rank:.0f}"


def _collectives(split: Split) -> str:
    step, most, exposed = (split.value(name) for name in (STEP_SECONDS, IN_COLLECTIVES, EXPOSED))
    if not step or most is None:
        return NOTHING
    alone_pct = "" if exposed is None else f" ({100 * exposed / step:.1f} % alone)"
    return f"{100 * most / step:.1f} %{alone_pct}"


def _video(split: Split) -> str:
    psnr = split.value(PSNR)
    if psnr is not None:
        return f"{psnr:.1f}"
    return "equal" if split.value(IS_EQUAL) == 1 else NOTHING


def _bits(split: Split) -> str:
    is_equal = are_repeats_equal(split.runs)
    return NOTHING if is_equal is None else f"{'yes' if is_equal else 'no'}, {len(split.runs)} runs"


def columns(splits: Sequence[Split]) -> list[Column]:
    """The table, a row for each split."""

    def words(title: str, read: Callable[[Split], str], *, is_number: bool = False) -> Column:
        return Column(title=(title,), cells=tuple(map(read, splits)), is_number=is_number)

    def numbers(title: str, read: Callable[[Split], float | None], show: Callable[[float], str]) -> Column:
        values = [read(split) for split in splits]
        return Column(title=(title,), cells=tuple(NOTHING if value is None else show(value) for value in values))

    found = [
        words("workload", lambda split: split.workload),
        words("split", lambda split: split.words),
        words("ranks", lambda split: str(split.num_ranks or NOTHING), is_number=True),
        words("outcome", lambda split: split.outcome),
        numbers("step s", lambda split: split.value(STEP_SECONDS), "{:.3f}".format),
        numbers("forward s", _forward, "{:.3f}".format),
        numbers("speed-up", lambda split: speed_up(split, splits), "{:.2f}".format),
        words("DiT GiB", lambda split: _ranks_cell(split, BASE_DIT), is_number=True),
        words("activation GiB", lambda split: _ranks_cell(split, ACTIVATION), is_number=True),
        words("peak GiB", lambda split: _ranks_cell(split, PEAK_ALLOCATED), is_number=True),
        words("reserved GiB", lambda split: _ranks_cell(split, PEAK_RESERVED), is_number=True),
        words("process GiB", lambda split: _ranks_cell(split, PROCESS_USED), is_number=True),
        words("fullest rank", _fullest, is_number=True),
        words("pinned GiB", lambda split: _ranks_cell(split, HOST_PINNED), is_number=True),
        words("in collectives", _collectives, is_number=True),
        numbers("latents relative L2", lambda split: split.value(LATENTS_L2), "{:.2e}".format),
        words("video dB", _video, is_number=True),
        words("same bits", _bits),
    ]
    if any(split.estimate for split in splits):
        found.insert(PEAK_COLUMN + 1, numbers("estimated peak GiB", _estimated, format_gib))
    return found


def _estimated(split: Split) -> float | None:
    return split.estimate.metrics[PEAK_ALLOCATED] if split.estimate else None


def page(folders: Sequence[Path]) -> str:
    """The whole table as Markdown.

    Raises:
        RecordError: there is not one record.
    """
    splits, records, damaged = read_splits(folders)
    told = facts([Sheet(folder=folders[0], rows=tuple(group(records, folders[0])))])
    blocks = ["# The scaling table", "\n".join(f"- {name}: {words}" for name, words in told), table(columns(splits))]
    blocks.append(NOTES.rstrip())
    reasons = [f"- {one.workload}, {one.words}: {one.outcome}: {one.last.reason}" for one in splits if not one.runs]
    if reasons or damaged:
        blocks += ["## Not measured", "\n".join([*reasons, *(f"- {problem}" for problem in damaged)])]
    return "\n\n".join(blocks) + "\n"


def pack(path: Path, folders: Sequence[Path], words: str) -> None:
    """Puts records, logs and plans of the sweeps, and the table, into one compressed file."""
    with tarfile.open(path, "w:gz") as archive:
        for folder in folders:
            found = {file for pattern in PACKED for file in folder.glob(pattern)}
            for file in sorted(found):
                archive.add(file, arcname=str(Path(folder.name) / file.relative_to(folder)))
        _add_text(archive, "table.md", words)


def _add_text(archive: tarfile.TarFile, name: str, words: str) -> None:
    content = words.encode()
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    sys.exit(table_command.main(__doc__, page, pack))
