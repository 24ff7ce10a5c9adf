"""Distances of outputs against formulas written out, and what is said where there is no distance."""

import hashlib
import json
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wan_sweep.measure.fidelity import WORKLOAD, comparable, compare, digests, main, remove_frames, write_outputs
from wan_sweep.measure.image_metrics import luma, mean_ssim
from wan_sweep.schema import Job

FLOAT32_ROUNDING = 1e-5  # of sums over 121 pixels, squared, in a ratio of order one
LATENTS = (2, 4, 2, 3, 4)
FRAMES = (2, 3, 45, 14, 3)  # higher than the block of rows that is handled at once
TINY = Job(model="tiny", device="cpu", size="96*64", frame_num=5, sample_steps=3).to_dict()


def random_latents(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(LATENTS).astype(np.float32)


def random_frames(seed: int = 0, shape: tuple[int, ...] = FRAMES) -> np.ndarray:
    """Smooth, so that structure is there to be similar in."""
    noise = np.random.default_rng(seed).integers(0, 60, shape)
    slope = np.add.outer(4 * np.arange(shape[2]), 3 * np.arange(shape[3]))[:, :, np.newaxis]
    return np.clip(slope + noise, 0, 255).astype(np.uint8)


def outputs(folder: Path, latents: np.ndarray, frames: np.ndarray) -> Path:
    folder.mkdir()
    write_outputs(folder, latents, list(frames))
    return folder


def compared(tmp_path: Path, ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> tuple[dict[str, float], str]:
    told = compare(outputs(tmp_path / "job", *ours), outputs(tmp_path / "reference", *theirs))
    assert all(math.isfinite(value) for value in told["metrics"].values())
    return {name.removeprefix("fidelity/"): value for name, value in told["metrics"].items()}, told["reason"]


def naive_ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Formula (13) of the paper in float64, window by window."""
    offsets = np.arange(-5, 6)
    window = np.exp(-np.add.outer(offsets**2, offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for top in range(one.shape[0] - 10):
        for left in range(one.shape[1] - 10):
            x, y = (image[top : top + 11, left : left + 11].astype(np.float64) for image in (one, other))
            mean_x, mean_y = (window * x).sum(), (window * y).sum()
            variance_x, variance_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
            covariance = (window * (x - mean_x) * (y - mean_y)).sum()
            values.append(
                (2 * mean_x * mean_y + c1)
                * (2 * covariance + c2)
                / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
            )
    return float(np.mean(values))


def naive_luma(frame: np.ndarray) -> np.ndarray:
    red, green, blue = (frame[..., channel].astype(np.float64) for channel in range(3))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_ssim_equals_the_formula_window_by_window() -> None:
    one, other = random_frames(0)[0, 0], random_frames(1)[0, 0]
    expected = naive_ssim(naive_luma(one), naive_luma(other))
    assert 0.05 < expected < 0.95
    assert expected == pytest.approx(mean_ssim(luma(one), luma(other)), abs=FLOAT32_ROUNDING)


def test_ssim_of_bright_and_nearly_flat_images_keeps_its_digits() -> None:
    one, other = (np.float32(250) + np.random.default_rng(seed).random((12, 12), np.float32) for seed in (0, 1))
    assert naive_ssim(one, other) == pytest.approx(mean_ssim(one, other), abs=FLOAT32_ROUNDING)


def test_distances_of_frames_and_latents_equal_their_formulas(tmp_path: Path) -> None:
    ours, theirs = (random_latents(0), random_frames(0)), (random_latents(1), random_frames(1))
    metrics, reason = compared(tmp_path, ours, theirs)
    levels = ours[1].astype(np.float64) - theirs[1]
    values = ours[0].astype(np.float64) - theirs[0]
    peak = float(theirs[0].max()) - float(theirs[0].min())
    ssim = [
        naive_ssim(naive_luma(one), naive_luma(other))
        for one, other in zip(ours[1].reshape(-1, *FRAMES[2:]), theirs[1].reshape(-1, *FRAMES[2:]), strict=True)
    ]
    assert metrics == {
        "psnr_db": pytest.approx(10 * math.log10(255**2 / (levels**2).mean())),
        "ssim": pytest.approx(np.mean(ssim), abs=FLOAT32_ROUNDING),
        "max_abs_diff": np.abs(levels).max(),
        "latents_max_abs_diff": np.abs(values).max(),
        "latents_relative_l2": pytest.approx(np.linalg.norm(values) / np.linalg.norm(theirs[0].astype(np.float64))),
        "latents_psnr_db": pytest.approx(10 * math.log10(peak**2 / (values**2).mean())),
        "is_bit_equal": 0,
    }
    assert reason == ""


def test_equal_outputs_have_no_psnr_and_an_ssim_of_one(tmp_path: Path) -> None:
    same = (random_latents(), random_frames())
    expected = {"ssim": 1.0, "max_abs_diff": 0, "is_bit_equal": 1}
    expected |= {"latents_max_abs_diff": 0.0, "latents_relative_l2": 0.0}
    assert compared(tmp_path, same, same) == (expected, "")


def test_equal_frames_from_latents_that_differ_in_one_bit_are_not_bit_equal(tmp_path: Path) -> None:
    ours = random_latents()
    ours[-1, -1, -1, -1, -1] = np.nextafter(ours[-1, -1, -1, -1, -1], np.float32(9))
    metrics, _ = compared(tmp_path, (ours, random_frames()), (random_latents(), random_frames()))
    assert metrics["is_bit_equal"] == 0
    assert metrics["max_abs_diff"] == 0
    assert "psnr_db" not in metrics
    assert metrics["latents_psnr_db"] > 100


def test_digests_are_those_of_the_plain_bytes_and_tell_one_bit() -> None:
    latents = random_latents()
    videos = [np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3), np.ones((2, 3, 4, 3), np.uint8)]
    frames_first = [np.ascontiguousarray(video.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0) for video in videos]
    told = digests(latents, videos)
    assert told == {
        "latents_sha256": hashlib.sha256(latents.tobytes()).hexdigest(),
        "frames_sha256": hashlib.sha256(videos[0].tobytes() + videos[1].tobytes()).hexdigest(),
    }
    assert told == digests(latents.copy(), frames_first)
    latents.view(np.uint32).flat[-1] ^= 1
    assert told["latents_sha256"] != digests(latents, videos)["latents_sha256"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_take_only_the_distance_of_the_latents(bad: float, tmp_path: Path) -> None:
    ours = random_latents()
    ours[0, 0, 0, 0, :2] = bad
    metrics, reason = compared(tmp_path, (ours, random_frames(0)), (random_latents(), random_frames(1)))
    assert sorted(metrics) == ["is_bit_equal", "max_abs_diff", "psnr_db", "ssim"]
    assert reason == ("no distance of the latents: of 192 numbers 2 here and 0 in the reference are not finite")


def test_outputs_with_the_same_nan_are_bit_equal(tmp_path: Path) -> None:
    latents = random_latents()
    latents[0, 0] = np.nan
    metrics, reason = compared(tmp_path, (latents, random_frames()), (latents, random_frames()))
    assert metrics["is_bit_equal"] == 1
    assert "latents_max_abs_diff" not in metrics
    assert reason


def test_a_constant_reference_has_no_range_to_be_a_peak(tmp_path: Path) -> None:
    theirs = np.ones(LATENTS, np.float32)
    metrics, _ = compared(tmp_path, (random_latents(), random_frames()), (theirs, random_frames()))
    assert "latents_psnr_db" not in metrics
    assert metrics["latents_max_abs_diff"] > 0


def test_frames_smaller_than_a_window_have_no_ssim_unless_they_are_equal(tmp_path: Path) -> None:
    small, other = (random_frames(seed, (2, 1, 10, 40, 3)) for seed in (0, 1))
    metrics, reason = compared(tmp_path, (random_latents(), small), (random_latents(), other))
    assert "ssim" not in metrics
    assert reason == "no SSIM: frames are smaller than its window of 11 x 11"
    told = compare(outputs(tmp_path / "equal", random_latents(), small), tmp_path / "job")
    assert told["metrics"]["fidelity/ssim"] == 1.0


def test_outputs_of_different_shapes_do_not_compare(tmp_path: Path) -> None:
    metrics, reason = compared(
        tmp_path, (random_latents(), random_frames()), (random_latents(), random_frames(0, (2, 3, 45, 16, 3)))
    )
    assert metrics == {}
    assert reason == (
        "frames.npy is [2, 3, 45, 14, 3] of uint8 and the reference's [2, 3, 45, 16, 3] of uint8; "
        "only outputs of one shape compare"
    )


def test_a_missing_or_a_damaged_file_is_a_reason(tmp_path: Path) -> None:
    whole = outputs(tmp_path / "job", random_latents(), random_frames())
    gone, cut = (outputs(tmp_path / name, random_latents(), random_frames()) for name in ("gone", "cut"))
    remove_frames(gone)
    (cut / "frames.npy").write_bytes((cut / "frames.npy").read_bytes()[:-1])
    assert [path.name for path in gone.iterdir()] == ["latents.npy"]
    for other in (gone, cut):
        told = compare(whole, other)
        assert told["metrics"] == {}
        assert told["reason"].startswith("the outputs cannot be read: ")


def test_outputs_are_plain_arrays_written_whole(tmp_path: Path) -> None:
    folder = outputs(tmp_path / "job", random_latents(), random_frames()[:, :, ::2])  # not contiguous
    assert sorted(path.name for path in folder.iterdir()) == ["frames.npy", "latents.npy"]
    np.testing.assert_array_equal(np.load(folder / "frames.npy"), random_frames()[:, :, ::2])
    np.testing.assert_array_equal(np.load(folder / "latents.npy"), random_latents())


def test_a_write_that_fails_leaves_the_file_of_before(tmp_path: Path) -> None:
    folder = outputs(tmp_path / "job", random_latents(), random_frames())
    videos = list(random_frames(1))
    with pytest.raises(ValueError, match="videos must be of one shape"):
        write_outputs(folder, random_latents(), [videos[0], videos[1][:1]])
    with pytest.raises(ValueError, match="float64 was given"):
        write_outputs(folder, random_latents().astype(np.float64), videos)
    assert sorted(path.name for path in folder.iterdir()) == ["frames.npy", "latents.npy"]
    np.testing.assert_array_equal(np.load(folder / "frames.npy"), random_frames())


def test_comparing_holds_a_few_frames_whatever_the_length_of_the_video(tmp_path: Path) -> None:
    shape = (1, 24, 64, 96, 3)
    for seed, name in enumerate(("job", "reference")):
        outputs(tmp_path / name, random_latents(), random_frames(seed, shape))
    compare(tmp_path / "job", tmp_path / "reference")  # modules are imported by then
    tracemalloc.start()
    try:
        compare(tmp_path / "job", tmp_path / "reference")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < math.prod(shape)  # one video of the two; both are 24 frames


def test_the_command_leaves_its_result_in_the_first_folder(tmp_path: Path) -> None:
    job, reference = (outputs(tmp_path / name, random_latents(), random_frames()) for name in ("job", "reference"))
    assert main([str(job), str(reference)]) == 0
    told = json.loads((job / "fidelity.json").read_text())
    assert told == compare(job, reference)
    assert told["schema_version"] == 1
    assert told["reference_folder"] == str(reference)
    assert not (reference / "fidelity.json").exists()


def test_jobs_compare_whatever_their_optimizations_are() -> None:
    other = TINY | {"precision": "bf16", "offload": True, "attention_slicing": 4, "micro_batch_size": 2}
    assert comparable(TINY, other) == ""


@pytest.mark.parametrize("knob", WORKLOAD)
def test_jobs_that_generate_something_else_do_not_compare(knob: str) -> None:
    assert comparable(TINY, TINY | {knob: "else"}).startswith(f"{knob} is ")


def test_the_reason_names_what_differs_and_shortens_prompts() -> None:
    other = TINY | {"sample_steps": 50, "prompt": 30 * "a cat "}
    assert comparable(TINY, other) == (
        "prompt is null and a cat a cat a cat a cat a cat a cat a..., sample_steps is 3 and 50; "
        "only outputs of the same workload compare"
    )


def test_who_only_asks_whether_jobs_compare_imports_neither_numpy_nor_torch() -> None:
    code = "import sys, wan_sweep.measure.fidelity; sys.exit(bool({'numpy', 'torch'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False).returncode
        == 0
    )
