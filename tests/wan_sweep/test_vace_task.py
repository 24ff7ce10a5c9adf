"""VACE from the command line to the record, and on a device without memory."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from wan21.frames import save_image, save_video
from wan_sweep.allocator import Settings
from wan_sweep.build import build_request
from wan_sweep.cards import card_named
from wan_sweep.environment import Gpu, Machine
from wan_sweep.estimate.dry_run import DryRun, Simulation, dry_run
from wan_sweep.record import load_records
from wan_sweep.rules import resolve
from wan_sweep.schema import Job, Scalar

Command = Callable[..., subprocess.CompletedProcess[str]]
MACHINE = Machine(gpus=(Gpu(name="NVIDIA H100", total_bytes=80 * 2**30, used_bytes=0),), torch_version="2.13.0")
H100 = card_named("H100-80GB")
TINY = Job(model="tiny-vace", device="cuda", size="96*64", frame_num=5, sample_steps=1)


def save_sources(folder: Path) -> dict[str, str]:
    generator = torch.Generator().manual_seed(0)
    paths = {name: folder / file for name, file in (("src_video", "video.mp4"), ("src_mask", "mask.mp4"))}
    for path in paths.values():
        save_video(torch.randint(0, 256, (5, 48, 80, 3), generator=generator, dtype=torch.uint8), path)
    for name in ("one", "two"):
        save_image(torch.randint(0, 256, (40, 30, 3), generator=generator, dtype=torch.uint8), folder / f"{name}.png")
    return {name: str(path) for name, path in paths.items()}


@pytest.mark.slow
def test_a_sweep_makes_a_video_from_files_and_without_them(wan_sweep: Command, tmp_path: Path) -> None:
    save_sources(tmp_path)
    done = wan_sweep(
        *(
            "-m",
            "device=cpu",
            "model=tiny-vace",
            "size=96*64",
            "frame_num=5",
            "sample_steps=1",
            "track=false",
            "offload=true",
        ),
        *("src_video=video.mp4,null", "src_ref_images='one.png,two.png'"),
    )
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "outputs" / "sweep").iterdir()
    source, blank = load_records(sweep)
    for record in (source, blank):
        assert record.outcome == "ok", record.reason
        assert record.metrics["memory/peak/encode_image/allocated_bytes"] > 0
        assert not record.warnings
    assert source.sources.startswith("src_video video.mp4 (sha256 ")
    assert "src_ref_images one.png, two.png (sha256 " in source.sources
    assert blank.sources.startswith("src_video a blank one; src_ref_images one.png, two.png")
    assert source.knobs["src_ref_images"] == f"{tmp_path / 'one.png'},{tmp_path / 'two.png'}"
    assert len(list(sweep.glob("*/video.mp4"))) == 2


def test_a_resolved_job_keeps_what_was_chosen_and_resolves_to_itself(tmp_path: Path) -> None:
    files = save_sources(tmp_path)
    job = resolve(Job(model="vace-14B", **files), MACHINE).job
    assert (job.size, job.frame_num, job.sample_shift) == ("1280*720", 81, 16.0)
    assert job == resolve(job, MACHINE).job
    shape = build_request(job).shape
    assert (shape.num_frames, shape.height, shape.width) == (5, 48, 80)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"model": "tiny", "src_video": "src_video"}, "belongs to the vace models, and tiny takes no files"),
        ({"model": "vace-1.3B", "src_mask": "src_mask"}, "needs src_video as well"),
        ({"model": "vace-1.3B", "src_video": "gone.mp4"}, "src_video=gone.mp4 does not exist"),
        ({"model": "vace-1.3B", "size": "1280*720"}, "size=1280*720 is not a size of vace-1.3B"),
        ({"model": "t2v-1.3B", "vace_context_scale": 0.5}, "vace_context_scale=0.5 belongs to the vace models"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, knobs: dict[str, Scalar], words: str) -> None:
    files = save_sources(tmp_path)
    given = {name: files.get(str(value), value) for name, value in knobs.items()}
    assert words in resolve(Job().replace(**given), MACHINE).refusal


def bytes_of(run: DryRun) -> dict[str, int | float]:
    assert run.error is None
    assert run.warnings == []  # what loads change is what the parameters take
    return {name: run.metrics[name] for name in run.metrics if name.startswith("memory/") and "host_rss" not in name}


def test_an_estimate_runs_the_same_pipeline_and_may_repeat_its_blocks(tmp_path: Path) -> None:
    job = TINY.replace(load_strategy="part", offload=True, **save_sources(tmp_path))
    repeated = bytes_of(dry_run(job, Simulation(H100, Settings())))
    assert repeated["memory/activation/encode_image_bytes"] > 0
    assert repeated == bytes_of(dry_run(job, Simulation(H100, Settings(), repeats_blocks=False)))
