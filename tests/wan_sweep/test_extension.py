"""Prompt extension in a job: measured as a phase, told in the record, and never a reason to fail."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.wan21.fake_dashscope import ANSWER, GOOD_KEY, FakeDashScope, serving
from tests.wan21.tiny_qwen import write_text_model
from wan21.events import SILENT
from wan21.parallel.world import ALONE
from wan21.runtime import CpuRuntime
from wan_sweep.build import build_request
from wan_sweep.environment import Machine
from wan_sweep.extension import NOT_EXTENDED, extend, extension_warnings
from wan_sweep.record import Record, load_records
from wan_sweep.rules import resolve
from wan_sweep.schema import Job, job_key

QUICK = ("model=tiny", "device=cpu", "size=96*64", "frame_num=1", "sample_steps=1", "prompt=a kite")
BAD_KEY = "sk-bad-fedcba9876543210"
NO_GPU = Machine(torch_version="2.13.0+cpu")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDashScope]:
    with serving() as server:
        monkeypatch.setenv("DASH_API_URL", server.url)
        monkeypatch.setenv("DASH_API_KEY", GOOD_KEY)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield server


def records(folder: Path) -> list[Record]:
    (sweep,) = (folder / "outputs" / "sweep").iterdir()
    return load_records(sweep)


@pytest.mark.slow
def test_a_local_model_is_measured_in_its_own_phase_and_gone_before_the_pipeline_loads(
    tmp_path: Path, wan_sweep: Command
) -> None:
    model = write_text_model(tmp_path / "qwen")
    asked = ("use_prompt_extend=true", f"prompt_extend_model={model}", "prompt_extend_target_lang=en")
    done = wan_sweep(*asked, *QUICK, "track=false", "profile_memory=true")
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = records(tmp_path)
    told = record.prompt_extension
    assert told is not None
    assert told["original"] == record.knobs["prompt"] == "a kite"
    assert told["prompt"] not in {"", "a kite"}
    assert (told["method"], told["model"], told["target_lang"]) == ("local_qwen", str(model), "en")
    assert record.warnings == []
    metrics = record.metrics
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert metrics["memory/base/qwen_bytes"] == pytest.approx(weights, rel=0.05)
    assert metrics["memory/resident/extend_prompt/qwen_bytes"] == metrics["memory/base/qwen_bytes"]
    peak = metrics["memory/peak/extend_prompt/allocated_bytes"]
    assert peak == metrics["memory/base/qwen_bytes"] + metrics["memory/activation/extend_prompt_bytes"]
    assert metrics["time/extend_prompt_s"] > 0
    (document,) = tmp_path.glob("outputs/sweep/*/1_*/memory_events.json")
    events = json.loads(document.read_text())["events"]
    (load,) = (event for event in events if (event["name"], event["event"]) == ("load", "begin"))
    assert load["allocated_bytes"] == events[0]["allocated_bytes"]
    (attribution,) = tmp_path.glob("outputs/sweep/*/1_*/attribution.json")
    peaks = {one["phase"]: one["allocated_bytes"] for one in json.loads(attribution.read_text())["peaks"]}
    assert peaks["extend_prompt"] == peak
    (report,) = tmp_path.glob("outputs/sweep/*/report.html")
    assert "extended by" in report.read_text()


@pytest.mark.slow
def test_a_refused_key_leaves_the_original_prompt_a_warning_and_no_trace_of_itself(
    fake: FakeDashScope, tmp_path: Path, wan_sweep: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASH_API_KEY", BAD_KEY)
    asked = ("use_prompt_extend=true", "prompt_extend_method=dashscope", "profile_memory=true")
    done = wan_sweep(*asked, *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = records(tmp_path)
    assert record.outcome == record.passes["attribution"]["outcome"] == "ok"
    assert record.prompt_extension is not None
    assert record.prompt_extension["prompt"] == "a kite"
    assert "HTTP status 401" in record.prompt_extension["problem"]
    (warning,) = record.warnings
    assert warning["code"] == NOT_EXTENDED
    assert "DASH_API_KEY" in warning["advice"]
    assert [request["key"] for request in fake.requests] == [BAD_KEY]  # and not again by the extra pass
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in kept)
    assert not [path for path in kept if BAD_KEY.encode() in path.read_bytes()]
    assert BAD_KEY not in done.stdout + done.stderr


def test_an_extended_prompt_is_what_the_request_holds(fake: FakeDashScope) -> None:
    job = Job(model="tiny", device="cpu", prompt="a kite", use_prompt_extend=True, prompt_extend_method="dashscope")
    request, told = extend(job, build_request(job), CpuRuntime(), SILENT, ALONE)
    assert request.prompt == ANSWER
    assert told is not None
    assert (told["prompt"], told["original"], told["model"]) == (ANSWER, "a kite", "qwen-plus")
    assert extension_warnings(told) == []
    assert GOOD_KEY not in repr((request, told))


def test_the_pictures_of_a_task_go_with_its_prompt(fake: FakeDashScope) -> None:
    for model, num_pictures in (("tiny-i2v", 1), ("tiny-flf2v", 2)):
        job = Job(model=model, device="cpu", use_prompt_extend=True, prompt_extend_method="dashscope")
        extend(job, build_request(job), CpuRuntime(), SILENT, ALONE)
        content = fake.requests[-1]["body"]["input"]["messages"][1]["content"]
        assert len([part for part in content if "image" in part]) == num_pictures
        assert len({part["image"] for part in content if "image" in part}) == num_pictures


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"prompt_extend_method": "dashscope"}, "needs a key: set the environment variable DASH_API_KEY"),
        ({"prompt_extend_model": "./nowhere"}, "prompt_extend_model=./nowhere is not a folder"),
        ({"model": "tiny-i2v", "prompt_extend_model": "Qwen2.5_3B"}, "sees no pictures"),
    ],
)
def test_what_cannot_be_is_refused_in_the_plan(
    knobs: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DASH_API_KEY", raising=False)
    job = Job.from_dict({"use_prompt_extend": True, "device": "cpu", **knobs})
    assert reason in resolve(job, NO_GPU).refusal


def test_a_job_without_extension_does_not_depend_on_its_knobs() -> None:
    plain, idle = (
        resolve(job, NO_GPU).job
        for job in (Job(device="cpu"), Job(device="cpu", prompt_extend_model="x", prompt_extend_target_lang="en"))
    )
    assert job_key(plain, 0) == job_key(idle, 0)
    extended = resolve(Job(device="cpu", use_prompt_extend=True), NO_GPU).job
    assert extended.prompt_extend_model == "Qwen2.5_14B"
    assert job_key(extended, 0) != job_key(plain, 0)
    with_pictures = resolve(Job(device="cpu", model="tiny-i2v", use_prompt_extend=True), NO_GPU).job
    assert with_pictures.prompt_extend_model == "QwenVL2.5_7B"
