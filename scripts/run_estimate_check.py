"""Measures the configurations that estimates are held against, on the GPUs of this machine, as many at a time as asked.

    python scripts/run_estimate_check.py --seed TEXT --list                                # which they are
    python scripts/run_estimate_check.py --seed TEXT --per-gpu 3 --seconds 270 --pack FILE.tar.gz
    python scripts/run_estimate_check.py --seed TEXT --done FILE.tar.gz --pack ALL.tar.gz  # what FILE lacks
    python scripts/compare_estimates.py ALL.tar.gz                                         # anywhere: the table

Each job is a command line of its own with two steps, so each has processes of its own, and a record on the disk the
moment it ends. Whatever ends this script loses no record: FILE is renewed after every job, and the same command goes on
with what is missing, on another machine with --done. What matters most comes first. Twelve jobs are drawn at random
from all combinations, by a seed that whoever runs this chooses, so that nobody has chosen what suits the estimator:
take what could not be known before. Jobs that share a GPU have exact memory all the same, and no times to speak of.
"""

import argparse
import io
import json
import os
import queue
import random
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from wan_sweep.errors import RecordError, UsageError
from wan_sweep.launch.outcome import log_tail
from wan_sweep.nvml import visible_gpus
from wan_sweep.record import RECORD_FILE, Record, load_record
from wan_sweep.schema import text
from wan_sweep.store import MEASURE, write_json

NUM_RANDOM = 12
SECONDS_TO_END = 6
"""What is left of the time when jobs under way are told to end."""
COMMON = "mode=measure save_video=false fidelity=false track=false resume=false share_gpu=true sample_steps=2"
EXPANDABLE = "expandable_segments:True"
SMALL, LARGE = "model=t2v-1.3B", "model=t2v-14B"
FIRST = (
    f"{LARGE} size=1280*720 frame_num=81 precision=bf16 optimization=lowest_memory",  # the longest
    f"{LARGE} size=1280*720 frame_num=33 precision=bf16 offload=true",
    f"{SMALL} precision=bf16 optimization=lowest_memory",
    f"{SMALL} precision=bf16 optimization=fastest",
    f"{SMALL} precision=bf16 optimization=balanced",
    f"{SMALL} precision=bf16 optimization=memory_opt",
    f"{SMALL} precision=fp32 optimization=memory_opt frame_num=33",
    f"{LARGE} size=832*480 frame_num=81 precision=fp16 offload=true attention_slicing=true",
    f"{EXPANDABLE} {SMALL} precision=bf16 offload=true",
    f"{EXPANDABLE} {SMALL} precision=bf16 optimization=lowest_memory",
    f"{SMALL} precision=bf16 offload=true t5_cpu=true frame_num=33",
    f"{SMALL} precision=fp16 offload=true attention_slicing=3 frame_num=33",
    f"{EXPANDABLE} {LARGE} size=1280*720 frame_num=5 precision=bf16 offload=true",
)
LAST = (
    f"{SMALL} precision=fp32 load_strategy=block offload=true frame_num=5",
    f"{LARGE} size=832*480 frame_num=5 precision=bf16 load_strategy=block offload=true",
)
AXES: Mapping[str, tuple[str, ...]] = {
    "model": ("t2v-1.3B", "t2v-1.3B", "t2v-1.3B", "t2v-14B"),
    "size": ("832*480",),
    "precision": ("fp16", "bf16"),
    "kernels": ("torch", "fused"),
    "load_strategy": ("full", "block", "part"),
    "offload": ("true", "false"),
    "t5_cpu": ("true", "false"),
    "attention_slicing": ("true", "false", "3"),
    "rows_at_once": ("1024", "4096"),
    "residual_on_host": ("0", "0.5", "1"),
    "vae_precision": ("fp32", "bf16"),
    "vae_budget_gib": ("null", "1.5", "3"),
    "frame_num": ("5", "33", "81"),
}
"""What is drawn for each, in this order: any change here is another draw from the same seed."""
NUM_FIRST = 5
"""So many of FIRST run before those drawn at random."""
SLOW = "t5_cpu=true"
"""Takes a minute where several jobs share the host, so it waits for the others of its group."""
GRID = ("precision=fp16,bf16", "load_strategy=full,block", "offload=true,false", "frame_num=81,33,5")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One job.

    Attributes:
        name: of its folder.
        knobs: as on a command line.
        allocator: settings of torch's allocator; empty: the default ones.
    """

    name: str
    knobs: tuple[str, ...]
    allocator: str = ""

    def command(self, output: Path) -> list[str]:
        """What is started."""
        return ["-m", "wan_sweep", *COMMON.split(), *self.knobs, f"output_root={output}", f"name={self.name}"]

    def is_in(self, record: Record) -> bool:
        """Whether a record is of this job, as far as it names knobs; what presets stand for is not looked at."""
        told = dict(word.split("=", 1) for word in self.knobs)
        same = all(text(record.knobs[name]) == value for name, value in told.items() if name in record.knobs)
        return same and record.environment.get("allocator", "default") == (self.allocator or "default")

    def records(self, output: Path) -> list[Record]:
        """What it has left so far."""
        found = []
        for path in sorted((output / self.name).glob(f"*/*/{RECORD_FILE}")):
            try:
                found.append(load_record(path))
            except RecordError as error:
                sys.stderr.write(f"{error}\n")
        return found


def jobs(seed: str) -> list[Asked]:
    """All of them, what matters most first."""
    draw = random.Random(seed)  # noqa: S311 # nothing secret
    drawn = [" ".join(f"{name}={draw.choice(values)}" for name, values in AXES.items()) for _ in range(NUM_RANDOM)]
    axes = [[f"{axis.partition('=')[0]}={value}" for value in axis.partition("=")[2].split(",")] for axis in GRID]
    grid = [" ".join((SMALL, *words)) for words in product(*axes)]
    first = _named("first", FIRST)
    groups = (first[:NUM_FIRST], _named("random", drawn), first[NUM_FIRST:], _named("grid", grid), _named("last", LAST))
    return [one for group in groups for one in sorted(group, key=lambda one: SLOW in one.knobs)]


def _named(kind: str, every: Sequence[str]) -> list[Asked]:
    asked = []
    for number, words in enumerate(every, start=1):
        has_setting = words.startswith(EXPANDABLE)
        knobs = tuple(words.removeprefix(EXPANDABLE).split())
        asked.append(Asked(name=f"{kind}{number:02d}", knobs=knobs, allocator=EXPANDABLE if has_setting else ""))
    return asked


def take_over(asked: Sequence[Asked], pack: Path, output: Path) -> list[Record]:
    """Good records of an earlier archive, which now lie in `output` as if the jobs had run there.

    Raises:
        UsageError: one of them is of another job than the one of its name, so the seed was another one.
        RecordError: one of them cannot be read.
    """
    taken = {}
    with tempfile.TemporaryDirectory() as folder, tarfile.open(pack) as archive:
        archive.extractall(folder, filter="data")
        for one in asked:
            path = Path(folder) / one.name / RECORD_FILE
            if not path.exists() or (record := load_record(path)).outcome != "ok":
                continue
            if not one.is_in(record):
                raise UsageError(
                    f"--done={pack}: its {one.name} is not {' '.join((one.allocator, *one.knobs)).strip()}; "
                    "give the --seed that it was made with, and the same version of this script"
                )
            taken[one.name] = record
    for name, record in taken.items():
        place = output / name / record.sweep_id / record.name / RECORD_FILE
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, record.to_json())
    return list(taken.values())


@dataclass
class Check:
    """The run: lanes that take one job after the other from a queue.

    Attributes:
        output: folder of all jobs.
        pack: archive of all records.
        seconds: after which nothing runs any more.
        python: what starts a job.
    """

    output: Path
    pack: Path
    seconds: float
    python: Sequence[str] = (sys.executable,)
    _started: float = field(default_factory=time.monotonic)
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_over: threading.Event = field(default_factory=threading.Event)

    def run(self, asked: Sequence[Asked], lanes: Sequence[str]) -> int:
        """Runs what has no good record yet; returns how many jobs have none afterwards.

        Args:
            asked: in this order.
            lanes: for each the GPU of its jobs, as CUDA_VISIBLE_DEVICES names it.
        """
        waiting: queue.SimpleQueue[Asked] = queue.SimpleQueue()
        for one in asked:
            if not self._is_done(one):
                waiting.put(one)
        threads = [threading.Thread(target=self._lane, args=(gpu, waiting, asked)) for gpu in lanes]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join(max(0.0, self._left() - SECONDS_TO_END))
        finally:
            self._is_over.set()
            with self._lock:
                for child in self._running:
                    child.terminate()  # ends its own, and writes a record
            for thread in threads:
                thread.join(SECONDS_TO_END)
            self._write_pack(asked)
        return sum(not self._is_done(one) for one in asked)

    def _left(self) -> float:
        return self._started + self.seconds - time.monotonic()

    def _is_done(self, one: Asked) -> bool:
        return any(record.outcome == "ok" for record in one.records(self.output))

    def _lane(self, gpu: str, waiting: "queue.SimpleQueue[Asked]", asked: Sequence[Asked]) -> None:
        while not self._is_over.is_set():
            try:
                one = waiting.get_nowait()
            except queue.Empty:
                return
            began = time.monotonic()
            outcome = self._start(one, gpu)
            sys.stdout.write(
                f"{time.monotonic() - self._started:6.1f} s  gpu {gpu}  {one.name}  {outcome}  "
                f"{time.monotonic() - began:.1f} s  {one.allocator} {' '.join(one.knobs)}\n"
            )
            sys.stdout.flush()
            self._write_pack(asked)

    def _start(self, one: Asked, gpu: str) -> str:
        self.output.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "PYTORCH_CUDA_ALLOC_CONF": one.allocator}
        environment.pop("PYTORCH_ALLOC_CONF", None)
        if not one.allocator:
            del environment["PYTORCH_CUDA_ALLOC_CONF"]
        with (self.output / f"{one.name}.txt").open("w") as log, self._lock:
            if self._is_over.is_set():
                return "not started"
            child = subprocess.Popen(
                [*self.python, *one.command(self.output)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            self._running.add(child)
        child.wait()
        with self._lock:
            self._running.discard(child)
        records = one.records(self.output)
        return records[-1].outcome if records else f"no record, exit code {child.returncode}"

    def _write_pack(self, asked: Sequence[Asked]) -> None:
        """An archive that is either the last one or this one, whatever happens in between."""
        with self._lock:
            self.pack.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.pack.with_name(f".{self.pack.name}")
            with tarfile.open(unfinished, "w:gz") as archive:
                for one in asked:
                    self._pack_job(archive, one)
            unfinished.replace(self.pack)

    def _pack_job(self, archive: tarfile.TarFile, one: Asked) -> None:
        records = one.records(self.output)
        log = self.output / f"{one.name}.txt"
        if records:
            _add(archive, f"{one.name}/{RECORD_FILE}", json.dumps(records[-1].to_json()))
        if log.exists() and not any(record.outcome == "ok" for record in records):
            logs = [log, *sorted((self.output / one.name).glob(f"*/*/{MEASURE.log}"))]
            _add(archive, f"{one.name}/log.txt", "\n".join(line for path in logs for line in log_tail(path)))


def _add(archive: tarfile.TarFile, name: str, content: str) -> None:
    entry = tarfile.TarInfo(name)
    data = content.encode()
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def main() -> int:
    """Lists the jobs, or runs them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", required=True, help="of what is drawn at random: any text")
    parser.add_argument("--list", action="store_true", help="print the command lines, and run nothing")
    parser.add_argument("--per-gpu", type=int, default=1, help="jobs at the same time on each GPU")
    parser.add_argument("--seconds", type=float, default=24 * 3600, help="end after so many")
    parser.add_argument("--output", type=Path, default=Path("outputs/estimate_check"), help="folder of all jobs")
    parser.add_argument("--pack", type=Path, default=Path("outputs/estimate_check.tar.gz"), help="where records go")
    parser.add_argument("--done", type=Path, help="archive of an earlier run: its good records are taken over")
    told = parser.parse_args()
    every = jobs(told.seed)
    if told.list:
        for one in every:
            setting = f"PYTORCH_CUDA_ALLOC_CONF={one.allocator} " if one.allocator else ""
            sys.stdout.write(f"{setting}python {shlex.join(one.command(told.output))}\n")
        return 0
    gpus = list(visible_gpus())
    if not gpus:
        sys.stderr.write("there is no GPU that this process may use; see CUDA_VISIBLE_DEVICES\n")
        return 2
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what is under way is ended properly
    if told.done:
        try:
            taken = take_over(every, told.done, told.output)
        except (UsageError, RecordError, OSError, tarfile.TarError) as error:
            sys.stderr.write(f"{error}\n")
            return 2
        versions = ", ".join(sorted({record.code_version for record in taken}))
        sys.stdout.write(f"{len(taken)} records taken over from {told.done}, of code {versions}\n")
    check = Check(output=told.output, pack=told.pack, seconds=told.seconds)
    missing = check.run(every, gpus * told.per_gpu)
    sys.stdout.write(f"{len(every) - missing} of {len(every)} jobs have a good record; {told.pack}\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
