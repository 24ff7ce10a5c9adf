"""The main job as a user runs it: the real command, the real worker, a tiny model on the CPU."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from filelock import FileLock
from PIL import Image

from tests.conftest import environment, fits_one_screen
from wan_sweep.record import Record, load_records
from wan_sweep.schema import text
from wan_sweep.track.ledger import read_entry

pytestmark = [
    pytest.mark.slow,
    # Inside MLflow, where it sets up its tables with SQLAlchemy 2.1; not ours to mend.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]

QUICK = ("model=tiny", "device=cpu", "size=96*64", "frame_num=1")
MAIN_JOB = ("-m", "precision=fp16,bf16", "offload=true,false", *QUICK, "sample_steps=2")
OFFLOADED, RESIDENT = (0, 2), (1, 3)  # positions of the jobs

PHASES = ("load", "encode_text", "denoise", "decode", "save")
METRICS = {
    *(f"memory/base/{name}_bytes" for name in ("t5", "dit", "vae")),
    *(f"memory/activation/{phase}_bytes" for phase in PHASES),
    *(f"memory/peak/{phase}/{kind}_bytes" for phase in PHASES for kind in ("allocated", "reserved")),
    *(f"memory/peak/{kind}_bytes" for kind in ("requested", "allocated", "reserved", "device_used")),
    *(f"memory/peak/{kind}_bytes" for kind in ("host_rss", "host_pinned")),
    "memory/fragmentation_pct",
    *(f"time/{phase}_s" for phase in PHASES),
    *("time/first_step_s", "time/step_s", "time/total_s"),
}


@dataclass(frozen=True, kw_only=True)
class Done:
    """A command that has ended."""

    code: int
    stdout: str
    stderr: str


def run(folder: Path, *arguments: str, options: tuple[str, ...] = ()) -> Done:
    """`python -m wan_sweep` in this folder. One thread: two jobs at once on two cores would fight for them."""
    done = subprocess.run(
        [sys.executable, *options, "-m", "wan_sweep", *arguments],
        cwd=folder,
        env={**environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return Done(code=done.returncode, stdout=done.stdout, stderr=done.stderr)


def sweeps(folder: Path) -> list[Path]:
    return sorted((folder / "outputs" / "sweep").iterdir())


def outcomes(sweep: Path) -> list[str]:
    return [record.outcome for record in load_records(sweep)]


class Story:
    """The main job, the same again, and once more with a record missing."""

    def __init__(self, folder: Path, first: Done, again: Done, one_missing: Done) -> None:
        self.folder, self.first, self.again, self.one_missing = folder, first, again, one_missing
        self.sweep, self.sweep_again, self.sweep_one_missing = sweeps(folder)

    @property
    def records(self) -> list[Record]:
        return load_records(self.sweep)

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=f"sqlite:///{self.folder / 'outputs' / 'mlflow.db'}")

    def run_of(self, folder: Path) -> Any:
        """What MLflow holds of a job or a sweep."""
        entry = read_entry(folder)
        assert entry is not None
        assert entry.state == "sent"
        return self.client.get_run(entry.run_id)


def live(folder: Path) -> dict[str, Done]:
    first = run(folder, *MAIN_JOB)
    again = run(folder, *MAIN_JOB)
    (removed,) = sweeps(folder)[0].glob("2_*/record.json")
    removed.rename(folder / "removed.json")
    one_missing = run(folder, *MAIN_JOB, options=("-X", "importtime"))
    (folder / "removed.json").rename(removed)
    return {"first": first, "again": again, "one_missing": one_missing}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Lived once, also where several processes share the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "main_job"
    told = folder / "told.json"
    with FileLock(f"{folder}.lock"):
        if not told.exists():
            folder.mkdir()
            told.write_text(json.dumps({name: asdict(done) for name, done in live(folder).items()}))
    return Story(folder, **{name: Done(**done) for name, done in json.loads(told.read_text()).items()})


def test_four_jobs_are_ok_in_records_and_table(story: Story) -> None:
    assert story.first.code == 0, story.first.stderr
    assert "Traceback" not in story.first.stdout + story.first.stderr
    expected = [("fp16", True), ("fp16", False), ("bf16", True), ("bf16", False)]
    assert expected == [(record.overrides["precision"], record.overrides["offload"]) for record in story.records]
    with (story.sweep / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["outcome"], row["precision"], row["offload"]) for row in rows] == [
        ("ok", precision, text(offload)) for precision, offload in expected
    ]
    for row, record in zip(rows, story.records, strict=True):
        shown = float(row["memory/peak/allocated_mib"])
        assert record.metrics["memory/peak/allocated_bytes"] / 2**20 == pytest.approx(shown, abs=1e-4)
        assert f"job {record.number} {record.name.partition('_')[2]}: ok in " in story.first.stdout


def test_a_record_has_the_metrics_of_the_contract(story: Story) -> None:
    for record in story.records:
        assert set() == METRICS - set(record.metrics)
        assert {name: len(values) for name, values in record.series.items()} == {
            "step/allocated_bytes": 2,
            "step/reserved_bytes": 2,
            "step/seconds": 2,
        }
        peaks = [record.metrics[f"memory/peak/{phase}/allocated_bytes"] for phase in PHASES]
        assert max(peaks) == record.metrics["memory/peak/allocated_bytes"]
        assert sum(record.metrics[f"time/{phase}_s"] for phase in PHASES) == pytest.approx(
            record.metrics["time/total_s"]
        )
        assert record.metrics["time/total_s"] < record.wall_seconds
        assert record.warnings == []
        assert record.weights == "random (seed 0)"
        assert list((story.sweep / record.name).glob("video.mp4")) != []


def test_offload_lowers_the_peak_by_the_bytes_of_the_idle_components(story: Story) -> None:
    for lower, upper in zip(OFFLOADED, RESIDENT, strict=True):
        offloaded, resident = story.records[lower].metrics, story.records[upper].metrics
        for phase, at_work in (("encode_text", "t5"), ("denoise", "dit"), ("decode", "vae")):
            idle = sum(resident[f"memory/base/{part}_bytes"] for part in ("t5", "dit", "vae") if part != at_work)
            peak = f"memory/peak/{phase}/allocated_bytes"
            assert idle > 0
            assert resident[peak] - offloaded[peak] == idle
        assert resident["memory/base/t5_bytes"] == offloaded["memory/base/t5_bytes"]


def test_records_tell_bits_of_outputs_which_offload_leaves_and_another_format_changes(story: Story) -> None:
    told = [record.outputs for record in story.records]
    assert all(one is not None and set(one) == {"latents_sha256", "frames_sha256"} for one in told)
    assert [told[number] for number in OFFLOADED] == [told[number] for number in RESIDENT]
    assert told[OFFLOADED[0]] != told[OFFLOADED[1]]


def test_report_and_pictures_are_there(story: Story) -> None:
    report = (story.sweep / "report.md").read_text()
    shown = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert {"peak_memory.png", "memory_time.png"} <= set(shown)
    assert {path.name for path in story.sweep.glob("*.png")} >= set(shown)
    for name in shown:
        with Image.open(story.sweep / name) as picture:
            picture.load()
            assert picture.width > 400
    for record in story.records:
        assert all(text(value) in report for value in record.overrides.values())


def test_mlflow_has_a_flat_run_for_each_job_and_one_for_the_sweep(story: Story) -> None:
    found = story.client.search_runs(["1"], f"tags.sweep = '{story.sweep.name}'")
    assert sorted(run.data.tags["role"] for run in found) == ["job"] * 4 + ["sweep"]
    assert {run.info.status for run in found} == {"FINISHED"}
    assert not any("mlflow.parentRunId" in run.data.tags for run in found)
    for record in story.records:
        run = story.run_of(story.sweep / record.name)
        assert run.data.params["precision"] == record.knobs["precision"]
        assert run.data.params["offload"] == text(record.knobs["offload"])
        peak = record.metrics["memory/peak/allocated_bytes"] / 2**20
        assert run.data.metrics["memory/peak/allocated_mib"] == pytest.approx(peak)
        history = story.client.get_metric_history(run.info.run_id, "step/allocated_mib")
        assert [point.value for point in history] == [n / 2**20 for n in record.series["step/allocated_bytes"]]
        artifacts = {artifact.path for artifact in story.client.list_artifacts(run.info.run_id)}
        assert {"record.json", "config.yaml", "log.txt", "video.mp4"} <= artifacts
    of_the_sweep = story.client.list_artifacts(story.run_of(story.sweep).info.run_id)
    assert {"results.csv", "report.md", "peak_memory.png"} <= {artifact.path for artifact in of_the_sweep}


def test_the_printed_links_lead_to_this_sweep(story: Story) -> None:
    experiment = story.client.get_experiment_by_name("wan-sweep").experiment_id
    lines = [line.split() for line in story.first.stdout.splitlines()]
    (charts,) = (unquote(words[1]) for words in lines if words[:1] == ["charts"])
    assert f"/#/experiments/{experiment}/runs?" in charts
    assert f"tags.sweep = '{story.sweep.name}' and tags.role = 'job'" in charts
    (compare,) = (unquote(words[1]) for words in lines if words[:1] == ["compare"])
    assert all(story.run_of(story.sweep / record.name).info.run_id in compare for record in story.records)


def test_the_same_command_again_takes_everything_over(story: Story) -> None:
    assert story.again.code == 0, story.again.stderr
    taken = load_records(story.sweep_again)
    assert [record.outcome for record in taken] == ["skipped"] * 4
    assert [record.metrics for record in taken] == [record.metrics for record in story.records]
    assert [record.measured_in for record in taken] == [str(story.sweep / record.name) for record in story.records]
    assert list(story.sweep_again.glob("*/events.jsonl")) == []
    runs = [story.run_of(story.sweep_again / record.name) for record in taken]
    assert {(run.info.status, run.data.tags["outcome"]) for run in runs} == {("FINISHED", "skipped")}


def test_only_the_job_whose_record_is_missing_runs_again(story: Story) -> None:
    assert story.one_missing.code == 0
    assert outcomes(story.sweep_one_missing) == ["skipped", "ok", "skipped", "skipped"]
    assert len(list(story.sweep_one_missing.glob("*/events.jsonl"))) == 1


def test_the_parent_never_imports_torch(story: Story) -> None:
    # -X holds for the parent only; its worker, which did run, is started without.
    imported = {line.rpartition("|")[2].strip() for line in story.one_missing.stderr.splitlines() if "|" in line}
    assert {"wan_sweep.runner", "mlflow", "matplotlib"} <= imported
    assert [name for name in imported if name.partition(".")[0] == "torch"] == []


def assert_refused(done: Done, folder: Path, *words: str) -> None:
    """A refusal says value, rule and way out on one screen; nothing was started."""
    shown = done.stdout + done.stderr
    assert done.code == 2, shown
    assert [word for word in words if word not in done.stderr] == [], shown
    assert "Traceback" not in shown
    assert fits_one_screen(shown)
    assert list(folder.glob("outputs*")) == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint folder in the official layout."""
    from wan21.models import model_spec
    from wan21.runtime import CpuRuntime
    from wan21.weights.random import RandomWeights
    from wan21.weights.write import write_folder

    folder = tmp_path_factory.mktemp("weights") / "Wan2.1-tiny"
    spec = model_spec("tiny")
    write_folder(folder, spec, RandomWeights(spec, 7, CpuRuntime().generator))
    return folder


class Harmful:
    """Pickles to a call that makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.trace}",)


def test_a_truncated_checkpoint_is_refused_before_anything_starts(tmp_path: Path, checkpoint: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "cut")
    (file,) = folder.glob("*.safetensors")
    num_bytes = file.stat().st_size
    os.truncate(file, num_bytes - 1000)
    done = run(tmp_path, *QUICK, f"ckpt_dir={folder}")
    assert_refused(done, tmp_path, str(file), f"of its {num_bytes} bytes 1000 are missing", "fetch this file again")


def test_code_in_a_checkpoint_is_refused_and_never_runs(tmp_path: Path, checkpoint: Path) -> None:
    import torch

    folder = shutil.copytree(checkpoint, tmp_path / "harmful")
    file, trace = folder / "Wan2.1_VAE.pth", tmp_path / "it_ran"
    assert file.exists()
    torch.save({"conv1.weight": Harmful(trace)}, file)
    done = run(tmp_path, *QUICK, f"ckpt_dir={folder}")
    assert_refused(done, tmp_path, str(file), "looks up posix.system", "use a file from a source that you trust")
    assert not trace.exists()


def test_a_checkpoint_folder_is_known_again_wherever_it_lies(tmp_path: Path, checkpoint: Path) -> None:
    settings = ("-m", *QUICK, "sample_steps=1", "save_video=false", "track=false")
    done = run(tmp_path, *settings, f"ckpt_dir={checkpoint}")
    assert done.code == 0, done.stderr
    (record,) = load_records(sweeps(tmp_path)[0])
    assert record.outcome == "ok"
    assert record.weights.startswith("checkpoint")
    assert record.weights in (sweeps(tmp_path)[0] / "report.md").read_text()
    elsewhere = shutil.copytree(checkpoint, tmp_path / "elsewhere")
    assert run(tmp_path, *settings, f"ckpt_dir={elsewhere}").code == 0
    (known,) = load_records(sweeps(tmp_path)[1])
    assert (known.outcome, known.key, known.metrics) == ("skipped", record.key, record.metrics)
