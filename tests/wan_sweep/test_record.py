import json
from dataclasses import replace
from pathlib import Path

import pytest

from wan_sweep.errors import RecordError
from wan_sweep.record import Record, load_record, load_records
from wan_sweep.store import write_record

RECORD = Record(
    key="0123456789ab",
    number=2,
    name="2_precision=bf16",
    repeat=1,
    sweep_name="sweep",
    sweep_id="now",
    sweep_folder="/outputs/sweep/now",
    knobs={"precision": "bf16", "sample_shift": 5.0, "prompt": None},
    overrides={"precision": "bf16"},
    outcome="oom",
    reason="out of memory",
    failure={"kind": "oom"},
    started_at="2026-11-23T10:00:00+00:00",
    ended_at="2026-11-23T10:00:09+00:00",
    wall_seconds=9.0,
    code_version="c0de",
    environment={"gpu": "H100"},
    weights="random",
    metrics={"memory/peak/allocated_bytes": 64},
    series={"step/allocated_bytes": [1, 2]},
    ranks=[{"rank": 0}],
    warnings=[{"code": "noise", "text": "t", "advice": "a"}],
    idle_knobs={"gradient_checkpointing": "no gradients"},
    fidelity={"reference": "1_precision=fp16", "reference_folder": "/outputs/sweep/now/1", "reason": ""},
    prompt_extension={"prompt": "A red kite.", "original": "kite", "method": "dashscope", "model": "qwen-plus"},
    passes={"trace": {"outcome": "ok", "reason": "", "seconds": 3.0, "files": ["trace_rank0.pt.trace.json.gz"]}},
    checks=[{"name": "driver", "state": "ok", "text": "driver 580", "advice": ""}],
)


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    write_record(tmp_path / "2_x", RECORD)
    assert load_record(tmp_path / "2_x") == RECORD
    assert load_record(tmp_path / "2_x" / "record.json") == RECORD


def test_a_record_from_before_sources_and_prompt_extension_is_read(tmp_path: Path) -> None:
    write_record(tmp_path / "2_x", RECORD)
    path = tmp_path / "2_x" / "record.json"
    values = json.loads(path.read_text())
    del values["prompt_extension"], values["sources"]
    path.write_text(json.dumps(values))
    assert load_record(path) == replace(RECORD, prompt_extension=None)


def test_the_file_has_the_documented_shape() -> None:
    values = RECORD.to_json()
    assert values["schema_version"] == 2
    assert values["job"] == {"key": "0123456789ab", "number": 2, "name": "2_precision=bf16", "repeat": 1}
    assert values["sweep"] == {"name": "sweep", "id": "now", "folder": "/outputs/sweep/now"}
    assert {
        "schema_version",
        "job",
        "sweep",
        "knobs",
        "overrides",
        "outcome",
        "reason",
        "failure",
        "started_at",
        "ended_at",
        "wall_seconds",
        "mode",
        "code_version",
        "environment",
        "weights",
        "sources",
        "metrics",
        "series",
        "ranks",
        "warnings",
        "idle_knobs",
        "measured_in",
        "fidelity",
        "passes",
        "checks",
        "prompt_extension",
        "estimate",
        "outputs",
    } == set(values)


def test_records_come_by_number(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        write_record(tmp_path / f"{number}_x", replace(RECORD, number=number))
    assert [record.number for record in load_records(tmp_path)] == [1, 2, 10]


def test_a_record_from_before_there_were_estimates_is_read() -> None:
    values = RECORD.to_json()
    del values["estimate"]
    assert Record.from_json(values) == RECORD


def test_another_schema_version_is_refused_by_file(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps({**RECORD.to_json(), "schema_version": 9}))
    with pytest.raises(RecordError, match=r"record\.json: schema_version=9 is not known"):
        load_record(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not a record"), ("[1]", "is not a record"), ('{"schema_version": 2}', "the record is incomplete")],
)
def test_a_damaged_record_is_refused_by_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(RecordError, match=rf"record\.json.*{message}"):
        load_record(path)


def test_a_missing_record_is_refused_by_file(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"record\.json cannot be read: No such file"):
        load_record(tmp_path / "record.json")
