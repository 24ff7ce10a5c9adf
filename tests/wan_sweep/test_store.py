import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from wan_sweep.errors import FolderError, RecordError
from wan_sweep.record import Record
from wan_sweep.schema import Job, Scalar
from wan_sweep.store import (
    PLAN_FILE,
    create_sweep_folder,
    read_json,
    records_with,
    slug,
    write_atomically,
    write_config,
    write_record,
)

RECORD = Record(
    key="0123456789ab",
    number=1,
    name="1_x",
    sweep_name="s",
    sweep_id="i",
    sweep_folder="/s/i",
    knobs={},
    overrides={},
    outcome="ok",
    started_at="2026-11-23T10:00:00+00:00",
    ended_at="2026-11-23T10:00:09+00:00",
    code_version="c0de",
)


def test_a_full_disk_leaves_the_older_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [path] == list(tmp_path.iterdir())


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "old")
    write_atomically(tmp_path / "a", "neu")
    assert (tmp_path / "a").read_text() == "neu"


def test_the_config_is_yaml_of_the_same_values(tmp_path: Path) -> None:
    job = Job(prompt='a "red" kite: 赤い\nno', attention_slicing=4, timeout_s=1e-9)
    write_config(tmp_path / "config.yaml", job.to_dict())
    assert job.to_dict() == {
        name: float(value) if name == "timeout_s" else value
        for name, value in yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8")).items()
    }


def test_a_sweep_folder_is_made_once(tmp_path: Path) -> None:
    create_sweep_folder(tmp_path / "name" / "stamp")
    with pytest.raises(FolderError, match="is there already"):
        create_sweep_folder(tmp_path / "name" / "stamp")


def test_a_folder_that_cannot_be_made_is_told_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match=r"cannot be made: .*; choose a writable place with output_root=FOLDER"):
        create_sweep_folder(tmp_path / "file" / "name" / "stamp")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"precision": "fp16", "offload": True}, "precision=fp16,offload=true"),
        ({"size": "832*480"}, "size=832x480"),
        ({"prompt": "a/b *?\x00 ../c"}, "prompt=a-b-..-c"),
        ({"ckpt_dir": None}, "ckpt_dir=null"),
        ({}, "tiny"),
        ({"prompt": "赤"}, "prompt=-"),
    ],
)
def test_a_folder_name_is_safe(overrides: dict[str, Scalar], expected: str) -> None:
    assert expected.rstrip("-") == slug(overrides, otherwise="tiny")


def test_a_folder_name_is_short() -> None:
    assert len(slug({"prompt": "x" * 500}, otherwise="tiny")) == 90


def test_records_are_found_by_key_across_sweeps(tmp_path: Path) -> None:
    write_record(tmp_path / "a" / "1" / "1_x", RECORD)
    write_record(tmp_path / "b" / "2" / "1_x", replace(RECORD, key="ffffffffffff"))
    write_record(tmp_path / "b" / "3" / "1_x", replace(RECORD, reason="mentions ffffffffffff only"))
    write_record(tmp_path / "mlartifacts" / "run" / "artifacts", replace(RECORD, key="ffffffffffff"))  # a copy
    for sweep in ("a/1", "b/2", "b/3"):
        (tmp_path / sweep / PLAN_FILE).touch()
    (tmp_path / "b" / "4" / "1_x").mkdir(parents=True)
    (tmp_path / "b" / "4" / "1_x" / "record.json").write_text('{"key": "ffffffffffff"')
    assert [tmp_path / "b" / "2" / "1_x"] == [path for path, _ in records_with(tmp_path, {"ffffffffffff"})]


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_json_is_refused_by_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(RecordError, match=r"plan\.json is damaged"):
        read_json(tmp_path / "plan.json")
