"""The record on several GPUs at once, within a given time: what matters most first, and what is there is kept.

Why: scripts/run_record.sh takes half an hour on one GPU, and a borrowed machine may be gone before that.

How: python scripts/record_on_gpus.py FOLDER [--seconds 480] [--gpus 0,1] [--archive FILE] [OVERRIDE ...]
Each GPU takes the next of the sweeps below as soon as it is free. When the time is over, the running sweeps are
stopped; the table (scripts/record_table.py) is printed last. FOLDER holds the sweeps and record.md. The archive has the
records, logs and table alone and is written anew after each sweep: it is there also if this script is killed.
Jobs of two GPUs share the host's cores, and the table says so. OVERRIDEs go to all sweeps. Exit code: 1 if a sweep
failed, or the time was over.
"""

import argparse
import os
import queue
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GRACE_S = 15

SMALL, MIDDLE, LARGE = (
    ["model=t2v-1.3B", "size=832*480"],
    ["model=t2v-14B", "size=832*480"],
    ["model=t2v-14B", "size=1280*720"],
)
SEGMENTS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
HOSTED = ["residual_on_host=0.5", "vae_budget_gib=1.5"]
# Two birds with one job: the attention that torch chooses, and the decoder in float32.
SDPA = ["attention_kernel=sdpa", "vae_precision=fp32"]


def one(preset: str) -> list[str]:
    """A sweep of one preset; its name tells which, as the record of a job holds only what differs in its sweep."""
    return [f"optimization={preset}", f"name={preset}"]


# Folder, overrides, environment; the first ones matter most. Where the plain run comes first, the others' latents and
# videos are compared with its.
SWEEPS: list[tuple[str, list[str], dict[str, str]]] = [
    ("small", [*SMALL, "optimization=none,fastest,lowest_memory,balanced"], {}),
    ("large-fastest", [*LARGE, *one("fastest"), "sample_steps=2"], {}),
    ("large-lowest", [*LARGE, *one("lowest_memory"), "sample_steps=2"], {}),
    ("large-hosted", [*LARGE, *one("lowest_memory"), *HOSTED, "sample_steps=2"], {}),
    ("large-sdpa", [*LARGE, *one("fastest"), *SDPA, "sample_steps=2"], {}),
    ("small-sdpa", [*SMALL, *one("fastest"), *SDPA], {}),
    ("large-fp8", [*LARGE, *one("fastest_fp8"), "sample_steps=2"], {}),
    ("middle", [*MIDDLE, "optimization=none,fastest,lowest_memory"], {}),
    ("small-segments", [*SMALL, *one("lowest_memory")], SEGMENTS),
    ("large-segments", [*LARGE, *one("lowest_memory"), "sample_steps=2"], SEGMENTS),
    ("middle-segments", [*MIDDLE, *one("lowest_memory")], SEGMENTS),
    ("large-balanced", [*LARGE, *one("balanced"), "sample_steps=2"], {}),
]


class Record:
    """The sweeps in a folder.

    Args:
        folder: of all of them; has to be new.
        archive: the file to pack into.
        end: when the time is over, by time.monotonic.
        overrides: for all sweeps.
        sweeps: which of SWEEPS.
    """

    def __init__(self, folder: Path, archive: Path, *, end: float, overrides: list[str], sweeps: list[str]) -> None:
        self.folder = folder
        self._archive = archive
        self.has_failed = False
        self._end = end
        self._overrides = overrides
        self._left: queue.SimpleQueue[tuple[str, list[str], dict[str, str]]] = queue.SimpleQueue()
        for sweep in SWEEPS:
            if sweep[0] in sweeps:
                self._left.put(sweep)
        self._packing = threading.Lock()
        paths = [str(ROOT), str(ROOT / "Wan2.1"), os.environ.get("PYTHONPATH", "")]
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def run(self, gpu: str) -> None:
        """Runs sweeps on a GPU until none is left, or the time is over."""
        while time.monotonic() < self._end:
            try:
                name, overrides, environment = self._left.get_nowait()
            except queue.Empty:
                return
            self._sweep(gpu, name, overrides, environment)
            with self._packing:
                self.pack()
        self.has_failed = self.has_failed or not self._left.empty()

    def _sweep(self, gpu: str, name: str, overrides: list[str], environment: dict[str, str]) -> None:
        print(f"GPU {gpu}: {name} begins, {self._end - time.monotonic():.0f} s are left", flush=True)
        # Flat, as the table names a sweep of one preset by its name and the experiment's grid is another.
        common = ["precision=bf16", "sample_steps=3", "save_video=false", "track=false", "resume=false"]
        command = [sys.executable, "-m", "wan_sweep", "-m", f"hydra.run.dir={self.folder / name}"]
        with (self.folder / f"{name}.txt").open("w") as log:
            process = subprocess.Popen(
                # A list has each key once; the last one of a key counts.
                [*command, *_last_of_each([*common, *overrides, *self._overrides])],
                env={**self._environment, **environment, "CUDA_VISIBLE_DEVICES": gpu},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                code = process.wait(timeout=max(1.0, self._end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)  # the sweep ends its job, and reports
                try:
                    code = process.wait(timeout=GRACE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    code = process.wait()
        self.has_failed = self.has_failed or code != 0
        print(f"GPU {gpu}: {name} ended with {code}", flush=True)

    def table(self) -> None:
        """Prints the table of all sweeps with records, and leaves it in the folder."""
        sweeps = [str(self.folder / name) for name, _, _ in SWEEPS if list((self.folder / name).glob("*/record.json"))]
        if sweeps:
            script = str(ROOT / "scripts/record_table.py")
            command = [sys.executable, script, *sweeps, "--output", str(self.folder / "record.md")]
            self.has_failed = (
                bool(subprocess.run(command, env=self._environment, check=False).returncode) or self.has_failed
            )

    def pack(self) -> None:
        """Writes the archive: complete, or as it was before."""
        wanted = ("*/*/record.json", "*/*/log.txt", "*/results.csv", "*.txt", "record.md")
        unfinished = self._archive.with_name(f".{self._archive.name}")
        with tarfile.open(unfinished, "w:gz") as archive:
            for path in sorted(path for pattern in wanted for path in self.folder.glob(pattern)):
                archive.add(path, arcname=str(path.relative_to(self.folder)))
        unfinished.replace(self._archive)


def _last_of_each(overrides: list[str]) -> list[str]:
    return list({override.partition("=")[0]: override for override in overrides}.values())


def main() -> int:
    """Runs what fits into the time, then shows it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where sweeps and table go; a new one")
    parser.add_argument("--seconds", type=float, default=480, help="after these, running sweeps are stopped")
    parser.add_argument("--gpus", default="0,1", help="as CUDA_VISIBLE_DEVICES names them")
    parser.add_argument("--archive", type=Path, help="file to pack into; FOLDER/record.tar.gz if not given")
    names = [name for name, _, _ in SWEEPS]
    parser.add_argument("--sweeps", default=",".join(names), help=f"which: {', '.join(names)}")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="key=value for all sweeps")
    flags = parser.parse_intermixed_args()
    sweeps = flags.sweeps.split(",")
    if unknown := [name for name in sweeps if name not in names]:
        parser.error(f"--sweeps={unknown[0]} is not one of {', '.join(names)}")
    folder: Path = flags.folder.absolute()
    archive: Path = (flags.archive or folder / "record.tar.gz").absolute()
    folder.mkdir(parents=True)
    archive.parent.mkdir(parents=True, exist_ok=True)
    record = Record(folder, archive, end=time.monotonic() + flags.seconds, overrides=flags.overrides, sweeps=sweeps)
    threads = [threading.Thread(target=record.run, args=(gpu,)) for gpu in flags.gpus.split(",")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record.table()
    record.pack()
    print(f"Packed: {archive}")
    return int(record.has_failed)


if __name__ == "__main__":
    sys.exit(main())
