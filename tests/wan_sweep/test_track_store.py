"""One real SQLite store for the whole module: to create one costs seconds."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.wan_sweep.made_up_records import KNOBS, SWEEP_ID, main_job, metrics_of, record, write_sweep
from wan_sweep.report import write_reports
from wan_sweep.track import Tracker, sync
from wan_sweep.track.ledger import pending_folders, read_entry
from wan_sweep.track.links import charts_url, compare_url
from wan_sweep.track.store import locate
from wan_sweep.track.ui import main as ui_main
from wan_sweep.track.ui import server_command

# Inside MLflow, where it sets up its tables with SQLAlchemy 2.1; not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")

EXPERIMENT = "wan-sweep"
NOWHERE = "http://127.0.0.1:9"
UNREACHABLE_SECONDS = 60  # left to itself, MLflow tries for minutes


class Sent:
    """A sweep that was sent, and what the store holds of it."""

    def __init__(self, root: Path) -> None:
        from mlflow import MlflowClient

        self.root = root
        self.folder = write_sweep(root / "main" / SWEEP_ID, *main_job())
        write_reports(self.folder)
        self.jobs = sorted(path.parent for path in self.folder.glob("*/record.json"))
        self.tracker = Tracker(root, EXPERIMENT)
        self.tracker.open()
        for job in self.jobs:
            self.tracker.log_job(job / "record.json")
        self.links = self.tracker.close_sweep(self.folder) or ""
        self.client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")

    def run(self, folder: Path) -> Any:
        entry = read_entry(folder)
        assert entry is not None
        assert entry.run_id is not None
        return self.client.get_run(entry.run_id)

    def count(self) -> int:
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        return len(self.client.search_runs([experiment.experiment_id]))


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sent]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield Sent(tmp_path_factory.mktemp("outputs"))


@pytest.fixture(autouse=True)
def default_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_every_job_and_the_sweep_are_runs_of_one_experiment(sent: Sent) -> None:
    runs = [sent.run(folder) for folder in [*sent.jobs, sent.folder]]
    assert sent.count() == 7
    assert {run.info.experiment_id for run in runs} == {sent.client.get_experiment_by_name(EXPERIMENT).experiment_id}
    assert [run.info.status for run in runs] == ["FINISHED"] * 4 + ["FAILED", "KILLED", "FINISHED"]
    assert not any("mlflow.parentRunId" in run.data.tags for run in runs)


def test_values_params_and_tags_arrive(sent: Sent) -> None:
    run = sent.run(sent.jobs[0])
    assert run.info.run_name == "fp16 offload=true"
    assert run.data.metrics["memory/peak/allocated_mib"] == pytest.approx(6144)
    assert run.data.metrics["time/step_s"] == pytest.approx(0.97)
    assert run.data.params["precision"] == "fp16"
    assert run.data.params["offload"] == "true"
    assert set(run.data.params) == set(KNOBS)
    assert run.data.tags["sweep"] == SWEEP_ID
    assert run.data.tags["folder"] == str(sent.jobs[0])


def test_a_run_lasts_as_long_as_its_job(sent: Sent) -> None:
    run = sent.run(sent.jobs[0])
    assert run.info.end_time - run.info.start_time == 30_000


def test_a_series_arrives_step_by_step(sent: Sent) -> None:
    run = sent.run(sent.jobs[0])
    history = sent.client.get_metric_history(run.info.run_id, "step/seconds")
    assert [(point.step, point.value) for point in history] == [(1, 1.07), (2, 0.95), (3, 0.95)]


def test_files_lie_at_the_same_place_in_each_run(sent: Sent) -> None:
    for folder in sent.jobs:
        names = {file.path for file in sent.client.list_artifacts(sent.run(folder).info.run_id)}
        assert names == {"config.yaml", "record.json", "log.txt"}
    report = {file.path for file in sent.client.list_artifacts(sent.run(sent.folder).info.run_id)}
    assert report == {"results.csv", "report.md", "report.html", "peak_memory.png", "memory_time.png", "steps.png"}
    assert (sent.root / "mlartifacts").is_dir()


def test_the_sweeps_run_shows_the_report_and_stays_out_of_the_charts(sent: Sent) -> None:
    tags = sent.run(sent.folder).data.tags
    assert tags["role"] == "sweep"
    assert tags["outcome"] == "4 ok, 1 oom, 1 refused"
    assert "| job | precision |" in tags["mlflow.note.content"]
    assert "![" not in tags["mlflow.note.content"]
    found = sent.client.search_runs(["1"], f"tags.sweep = '{SWEEP_ID}' and tags.role = 'job'")
    assert len(found) == 6


def test_the_links_lead_to_charts_and_comparison(sent: Sent) -> None:
    measured = [sent.run(folder).info.run_id for folder in sent.jobs[:4]]
    assert charts_url("http://127.0.0.1:5000", "1", SWEEP_ID) in sent.links
    assert compare_url("http://127.0.0.1:5000", "1", measured) in sent.links
    assert "-m wan_sweep.track.ui --output-root" in sent.links


def test_a_second_log_sends_nothing(sent: Sent) -> None:
    before = sent.count()
    sent.tracker.log_job(sent.jobs[0] / "record.json")
    Tracker(sent.root, EXPERIMENT).log_job(sent.jobs[0] / "record.json")
    assert sent.count() == before
    entry = read_entry(sent.jobs[0])
    assert entry is not None
    assert entry.is_sent


def test_an_interrupted_job_goes_on_in_the_same_run(sent: Sent) -> None:
    before = read_entry(sent.jobs[1])
    path = sent.jobs[1] / "tracking.json"
    path.write_text(path.read_text().replace('"sent"', '"pending"'))
    count = sent.count()
    sent.tracker.log_job(sent.jobs[1] / "record.json")
    assert read_entry(sent.jobs[1]) == before
    assert sent.count() == count
    assert before is not None
    assert len(sent.client.get_metric_history(before.run_id, "step/seconds")) == 3


def test_a_damaged_record_costs_its_run_and_no_other(
    sent: Sent, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "record.json").write_text("{")
    sent.tracker.log_job(tmp_path / "record.json")
    assert "not a record" in caplog.text
    assert sent.tracker.is_on


def test_many_values_are_sent_in_parts(sent: Sent) -> None:
    series = {"step/seconds": [0.1 + step / 1e6 for step in range(2500)]}
    knobs = {**KNOBS, **{f"knob_{index}": index for index in range(150)}}
    job = record(1, {}, metrics_of(base={"dit": 1.0}, activation=2), series=series, knobs=knobs)
    folder = write_sweep(sent.root / "big" / "sweep", job) / job["job"]["name"]
    sent.tracker.log_job(folder / "record.json")
    run = sent.run(folder)
    assert len(sent.client.get_metric_history(run.info.run_id, "step/seconds")) == 2500
    assert len(run.data.params) == len(knobs)


def test_an_absent_server_costs_seconds_and_loses_nothing(
    sent: Sent, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    folder = write_sweep(sent.root / "later" / "sweep", *main_job()[:2])
    tracker = Tracker(sent.root, EXPERIMENT)
    started = time.monotonic()
    tracker.open()
    for path in sorted(folder.glob("*/record.json")):
        tracker.log_job(path)
    assert tracker.close_sweep(folder) is None
    assert time.monotonic() - started < UNREACHABLE_SECONDS
    assert caplog.text.count("wan_sweep.track.sync") == 1
    entries = [read_entry(job) for job in (*sorted(folder.glob("[12]_*")), folder)]
    assert [(entry.state, entry.store) for entry in entries if entry] == [("pending", NOWHERE)] * 3
    assert sync.main([str(folder)]) == 1
    assert NOWHERE in capsys.readouterr().err

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{sent.root / 'mlflow.db'}")
    before = sent.count()
    assert sync.main([str(folder)]) == 0
    assert "3 of 3" in capsys.readouterr().out
    assert sent.count() == before + 3
    assert pending_folders(folder, unmarked=True) == []
    assert sync.main([str(folder)]) == 0
    assert sent.count() == before + 3


def test_the_next_sweep_sends_what_an_earlier_one_could_not(sent: Sent) -> None:
    folder = write_sweep(sent.root / "earlier" / "sweep", main_job()[0])
    (job,) = folder.glob("1_*")
    store = locate(sent.root).public_uri
    entry = {"state": "pending", "store": store, "experiment": EXPERIMENT}
    (job / "tracking.json").write_text(json.dumps(entry))
    sent.tracker.close_sweep(sent.folder)
    found = read_entry(job)
    assert found is not None
    assert found.is_sent


def test_copies_in_the_store_are_not_taken_for_jobs(sent: Sent) -> None:
    assert list((sent.root / "mlartifacts").rglob("record.json"))
    assert not [folder for folder in pending_folders(sent.root, unmarked=True) if "mlartifacts" in folder.parts]


def test_an_unusable_store_is_a_warning_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database, whatever its name says" * 50)
    started = time.monotonic()
    Tracker(tmp_path, EXPERIMENT).open()
    assert time.monotonic() - started < UNREACHABLE_SECONDS
    assert "cannot be used" in caplog.text


@pytest.mark.slow
def test_two_processes_may_open_a_new_store_at_once(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    code = (
        "import sys; from pathlib import Path; from wan_sweep.track import Tracker\n"
        "tracker = Tracker(Path(sys.argv[1]), 'wan-sweep'); tracker.open()\n"
        "tracker.log_job(Path(sys.argv[2])); print(tracker.is_on)"
    )
    folder = write_sweep(tmp_path / "race" / "sweep", *main_job()[:2])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(path)],
            env={"PYTHONPATH": ":".join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for path in sorted(folder.glob("*/record.json"))
    ]
    assert [process.communicate()[0].strip() for process in started] == ["True", "True"]
    entries = [read_entry(job) for job in sorted(folder.iterdir())]
    assert {entry.experiment_id for entry in entries if entry} == {"1"}
    assert all(entry and entry.is_sent for entry in entries)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert [one.name for one in client.search_experiments() if one.name != "Default"] == [EXPERIMENT]
    assert [len(client.search_runs([experiment])) for experiment in ("0", "1")] == [0, 2]


def test_a_password_stays_out_of_files() -> None:
    location = locate(Path("outputs"), {"MLFLOW_TRACKING_URI": "https://me:secret@example.org/mlflow/"})
    assert location.public_uri == "https://example.org/mlflow"
    assert location.is_remote


def test_the_ui_stays_on_this_machine(sent: Sent) -> None:
    command = server_command(locate(sent.root), 5001)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--workers") + 1] == "1"
    assert f"sqlite:///{sent.root / 'mlflow.db'}" in command


def test_the_ui_without_a_store_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ui_main(["--output-root", str(tmp_path)]) == 2
    assert "run a sweep first" in capsys.readouterr().err
