"""The study of all tasks, with the tiny models on a CPU."""

from pathlib import Path

import pytest

from tests.conftest import Command
from wan21.models import MODELS
from wan_sweep.record import load_records

EXPERIMENT = "+experiment=tasks"
TINY = [name for name in MODELS if name.startswith("tiny")]


@pytest.mark.slow
def test_all_tiny_models_run_in_one_sweep_and_leave_a_video_or_an_image(wan_sweep: Command, tmp_path: Path) -> None:
    models = ",".join(TINY)
    done = wan_sweep(EXPERIMENT, f"model={models}", "device=cpu", "size=96*64", "sample_steps=1", "track=false")
    assert done.returncode == 0, done.stdout + done.stderr
    (sweep,) = (tmp_path / "outputs" / "tasks").iterdir()
    records = load_records(sweep)
    assert [record.knobs["model"] for record in records] == TINY
    for record in records:
        assert (record.outcome, record.warnings) == ("ok", [])
        file = "image.png" if MODELS[str(record.knobs["model"])].is_image else "video.mp4"
        assert (sweep / record.name / file).stat().st_size > 1000
        for phase in ("load", "encode_text", "denoise", "decode"):
            assert record.metrics[f"memory/peak/{phase}/allocated_bytes"] > 0
    report = (sweep / "report.md").read_text()
    assert all(name in report for name in TINY)
    by_model = {record.knobs["model"]: record for record in records}
    text, frames = by_model["tiny"], by_model["tiny-flf2v"]
    assert text.sources == ""  # of tasks with pictures, and none given, the record says what stands in for them
    assert frames.sources == "first_frame the built-in example; last_frame the built-in example"
    assert text.metrics["memory/base/vae_bytes"] < frames.metrics["memory/base/vae_bytes"]
