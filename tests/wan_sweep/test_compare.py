"""Which job another one is compared with, and what of its output stays on disk."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wan_sweep.compare import References, is_alone
from wan_sweep.measure.fidelity import write_outputs
from wan_sweep.record import Record
from wan_sweep.schema import Job

KNOBS = Job(model="tiny", device="cpu", size="96*64", frame_num=5, prompt="a cat", sample_steps=2).to_dict()


def record(number: int, **changes: Any) -> Record:
    return Record(
        key=f"{number}",
        number=number,
        name=f"{number}_job",
        sweep_name="sweep",
        sweep_id="now",
        sweep_folder="",
        knobs={**KNOBS, **changes},
        overrides={},
        outcome="ok",
        started_at="2026-11-23T10:00:00+00:00",
        ended_at="2026-11-23T10:00:09+00:00",
        code_version="c0de",
        metrics={"time/total_s": 1.0},
    )


def left_output(folder: Path, *, level: int = 7) -> Path:
    """A job's folder with latents and one video of two frames, all of one level."""
    folder.mkdir()
    latents = np.full((1, 16, 1, 8, 12), level, dtype=np.float32)
    write_outputs(folder, latents, [np.full((2, 64, 96, 3), level, dtype=np.uint8)])
    return folder


def test_the_first_job_that_left_its_output_is_the_reference_and_keeps_it(tmp_path: Path) -> None:
    folder = left_output(tmp_path / "1")
    compared = References().compare(record(1), folder)
    assert compared.fidelity == {
        "reference": "1_job",
        "reference_folder": str(folder),
        "reason": "is the reference itself",
    }
    assert not any(name.startswith("fidelity/") for name in compared.metrics)
    assert (folder / "frames.npy").exists()


def test_later_jobs_are_compared_with_it_and_give_their_frames_up(tmp_path: Path) -> None:
    references = References()
    references.compare(record(1), left_output(tmp_path / "1"))
    equal = references.compare(record(2), left_output(tmp_path / "2"))
    other = references.compare(record(3), left_output(tmp_path / "3", level=9))
    assert equal.metrics["fidelity/is_bit_equal"] == 1
    assert other.metrics["fidelity/is_bit_equal"] == 0
    assert other.metrics["fidelity/max_abs_diff"] == 2
    assert other.fidelity is not None
    assert other.fidelity["reference"] == "1_job"
    assert other.metrics["time/total_s"] == 1.0
    assert not (tmp_path / "2" / "frames.npy").exists()
    assert (tmp_path / "2" / "latents.npy").exists()


def test_a_job_that_generates_something_else_has_a_reference_of_its_own(tmp_path: Path) -> None:
    references = References()
    references.compare(record(1), left_output(tmp_path / "1"))
    other = references.compare(record(2, frame_num=9), left_output(tmp_path / "2"))
    assert other.fidelity is not None
    assert other.fidelity["reference"] == "2_job"


def test_a_job_without_output_says_so(tmp_path: Path) -> None:
    references = References()
    tmp_path.joinpath("0").mkdir()
    alone = references.compare(record(1), tmp_path / "0")
    assert alone.fidelity is not None
    assert "not kept" in alone.fidelity["reason"]
    references.compare(record(2), left_output(tmp_path / "2"))
    without = references.compare(record(3), tmp_path / "0")
    assert without.fidelity is not None
    assert "cannot be compared with that of 2_job" in without.fidelity["reason"]


def test_an_older_comparison_with_the_same_output_is_kept_and_another_one_dropped(tmp_path: Path) -> None:
    reference = left_output(tmp_path / "1")
    tmp_path.joinpath("2").mkdir()
    references = References()
    references.compare(record(1), reference)
    older = replace(
        record(2),
        measured_in=str(tmp_path / "2"),
        metrics={"fidelity/psnr_db": 40.0},
        fidelity={"reference": "9_older", "reference_folder": str(reference), "reason": ""},
    )
    kept = references.compare(older, tmp_path / "2")
    assert kept.metrics == {"fidelity/psnr_db": 40.0}
    assert kept.fidelity is not None
    assert kept.fidelity["reference"] == "1_job"
    moved = replace(older, fidelity={"reference": "9_older", "reference_folder": str(tmp_path), "reason": ""})
    assert references.compare(moved, tmp_path / "2").metrics == {}


def test_a_damaged_output_costs_the_comparison_and_not_the_record(tmp_path: Path) -> None:
    references = References()
    references.compare(record(1), left_output(tmp_path / "1"))
    folder = left_output(tmp_path / "2")
    (folder / "frames.npy").write_bytes(b"no numbers")
    compared = references.compare(record(2), folder)
    assert compared.metrics == {"time/total_s": 1.0}
    assert compared.fidelity is not None
    assert compared.fidelity["reason"]


@pytest.mark.parametrize(("changes", "expected"), [({"precision": "bf16"}, False), ({"base_seed": 1}, True)])
def test_jobs_that_differ_in_what_they_generate_are_alone(changes: dict[str, Any], *, expected: bool) -> None:
    assert is_alone(KNOBS, [{**KNOBS, **changes}]) is expected


def test_jobs_compare_by_the_prompt_that_their_videos_were_made_from(tmp_path: Path) -> None:
    references = References()

    def told(number: int, prompt: str) -> Record:
        return replace(record(number), prompt_extension={"prompt": prompt, "original": "a cat"})

    references.compare(told(1, "a grey cat sleeps"), left_output(tmp_path / "1"))
    same = references.compare(told(2, "a grey cat sleeps"), left_output(tmp_path / "2"))
    failed = references.compare(told(3, "a cat"), left_output(tmp_path / "3", level=9))
    assert same.fidelity is not None
    assert same.fidelity["reference"] == "1_job"
    assert failed.fidelity is not None
    assert failed.fidelity["reason"] == "is the reference itself"
