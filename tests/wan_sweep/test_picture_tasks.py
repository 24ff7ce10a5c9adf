"""Tasks that start from pictures, from the command line to the record, and on a device without memory."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wan_sweep.allocator import Settings
from wan_sweep.build import build_request
from wan_sweep.cards import card_named
from wan_sweep.environment import Gpu, Machine
from wan_sweep.estimate.dry_run import Simulation, dry_run
from wan_sweep.record import Record, load_records
from wan_sweep.rules import resolve
from wan_sweep.schema import Job, Scalar, job_key

Command = Callable[..., subprocess.CompletedProcess[str]]
QUICK = ("-m", "device=cpu", "size=96*64", "frame_num=5", "sample_steps=1", "track=false", "fidelity=false")
MACHINE = Machine(gpus=(Gpu(name="NVIDIA H100", total_bytes=80 * 2**30, used_bytes=0),), torch_version="2.13.0")
H100 = card_named("H100-80GB")


def save(path: Path, width: int = 70, height: int = 100, seed: int = 0) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def records(folder: Path) -> list[list[Record]]:
    return [load_records(sweep) for sweep in sorted((folder / "outputs" / "sweep").iterdir())]


@pytest.mark.slow
def test_a_sweep_makes_videos_from_pictures_and_knows_them_again_elsewhere(wan_sweep: Command, tmp_path: Path) -> None:
    save(tmp_path / "kite.png")
    done = wan_sweep(*QUICK, "model=tiny-i2v", "image=kite.png", "offload=false,true")
    assert done.returncode == 0, done.stderr
    ((stays, leaves),) = records(tmp_path)
    for record in (stays, leaves):
        assert record.outcome == "ok", record.reason
        assert record.sources.startswith("image kite.png (sha256 ")
        assert record.knobs["image"] == str(tmp_path / "kite.png")
        assert record.metrics["memory/base/clip_bytes"] > 0
        assert record.metrics["memory/peak/encode_image/allocated_bytes"] > 0
        assert not record.warnings
    assert leaves.metrics["memory/peak/allocated_bytes"] < stays.metrics["memory/peak/allocated_bytes"]
    assert leaves.metrics["memory/base/vae_bytes"] == stays.metrics["memory/base/vae_bytes"]
    (sweep,) = (tmp_path / "outputs" / "sweep").iterdir()
    assert stays.sources in (sweep / "report.md").read_text()
    assert len(list(sweep.glob("*/video.mp4"))) == 2
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "kite.png", tmp_path / "elsewhere" / "other.png")
    again = wan_sweep(*QUICK, "model=tiny-i2v", "image=elsewhere/other.png")
    assert again.returncode == 0, again.stderr
    ((known,),) = records(tmp_path)[1:]
    assert (known.outcome, known.key) == ("skipped", stays.key)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"model": "tiny", "image": "FILE"}, "image=FILE belongs to the i2v models, and tiny takes no files"),
        ({"model": "tiny-i2v", "last_frame": "FILE"}, "last_frame=FILE belongs to the flf2v models"),
        ({"model": "tiny-flf2v", "first_frame": "FILE"}, "first_frame=FILE needs last_frame as well"),
        ({"model": "i2v-14B", "image": "FOLDER/gone.png"}, "image=FOLDER/gone.png does not exist"),
        ({"model": "i2v-14B", "image": "FOLDER/text.png"}, "image=FOLDER/text.png is no picture that can be read"),
        ({"model": "flf2v-14B", "frame_num": 1}, "frame_num=1 cannot be"),
        ({"model": "i2v-14B", "size": "1024*1024"}, "size=1024*1024 is not a size of i2v-14B"),
    ],
)
def test_what_cannot_be_is_refused_by_name_before_anything_starts(
    tmp_path: Path, knobs: dict[str, Scalar], words: str
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    places = {"FILE": save(tmp_path / "a.png"), "FOLDER": str(tmp_path)}
    for name, place in places.items():
        words = words.replace(name, place)
        knobs = {key: value.replace(name, place) if isinstance(value, str) else value for key, value in knobs.items()}
    assert words in resolve(Job().replace(**knobs), MACHINE).refusal


def test_a_resolved_job_keeps_the_size_that_was_chosen_and_resolves_to_itself(tmp_path: Path) -> None:
    job = resolve(Job(model="i2v-14B", size="832*480", image=save(tmp_path / "a.png", 500, 333)), MACHINE).job
    assert (job.size, job.sample_shift, job.sample_steps) == ("832*480", 3.0, 40)
    assert job == resolve(job, MACHINE).job
    shape = build_request(job).shape
    assert (shape.height, shape.width) == (512, 768)  # 64 x 96 latents in the official code's list


def test_the_key_goes_with_the_content_of_pictures(tmp_path: Path) -> None:
    def key(name: str, seed: int) -> str:
        one = resolve(Job(model="tiny-i2v", image=save(tmp_path / name, seed=seed)), MACHINE)
        return job_key(one.job, 0, sources=one.sources)

    assert key("a.png", 0) == key("b.png", 0)
    assert key("c.png", 1) != key("a.png", 0)
    plain = resolve(Job(model="tiny-i2v"), MACHINE)
    assert job_key(plain.job, 0, sources=plain.sources) not in {key("a.png", 0), key("c.png", 1)}


@pytest.mark.parametrize("model", ["tiny-i2v", "tiny-flf2v"])
def test_an_estimate_runs_the_same_pipeline(model: str, tmp_path: Path) -> None:
    files = {"image": save(tmp_path / "a.png", 160, 96)} if model == "tiny-i2v" else {}
    job = Job(model=model, device="cuda", size="96*64", frame_num=5, sample_steps=1, offload=True, **files)
    run = dry_run(job, Simulation(H100, Settings()))
    assert run.error is None
    assert run.warnings == []  # what loads change is what the parameters take
    assert 0 < run.metrics["memory/base/clip_bytes"] < run.metrics["memory/base/t5_bytes"]
    assert run.metrics["memory/activation/encode_image_bytes"] > 0
