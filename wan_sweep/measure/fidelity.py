"""Fidelity: how far a job's output is from that of the sweep's reference job.

A worker leaves what it generated as it is: latents.npy (float32, [B, C, t, h, w]) and frames.npy (uint8,
[B, T, H, W, 3]). Afterwards `python -m wan_sweep.measure.fidelity JOB_FOLDER REFERENCE_FOLDER` compares two folders
and leaves fidelity.json in the first:

    {"schema_version": 1, "reference_folder": "...", "metrics": {"fidelity/ssim": 0.98, ...}, "reason": ""}

fidelity/psnr_db               PSNR of all frames together, peak 255
fidelity/ssim                  mean SSIM of the frames' luma (`image_metrics` defines both)
fidelity/max_abs_diff          largest difference of two pixels' channels, in levels from 0 to 255
fidelity/latents_max_abs_diff  largest difference of two latents
fidelity/latents_relative_l2   norm of the difference of all latents over the norm of the reference's
fidelity/latents_psnr_db       PSNR of the latents; the peak is the range of the reference's
fidelity/is_bit_equal          1 if latents and frames are equal to the bit, else 0

A metric is never NaN or infinite: it is absent where it has no value, as PSNR has none for equal outputs. The reason
says why metrics are missing that could be there: outputs of different shapes, numbers that are not finite.

The parent imports this module, so numpy is imported where it is needed, and torch nowhere.
"""

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_sweep.schema import Scalar, text
from wan_sweep.store import FIDELITY_FILE, FRAMES_FILE, LATENTS_FILE, write_json

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SCHEMA_VERSION = 1

WORKLOAD = (
    "model",
    "ckpt_dir",
    "weights_seed",
    "size",
    "frame_num",
    "prompt",
    "image",
    "first_frame",
    "last_frame",
    "src_video",
    "src_mask",
    "src_ref_images",
    "vace_context_scale",
    "upstream_quirks",
    "base_seed",
    "sample_solver",
    "sample_steps",
    "sample_shift",
    "sample_guide_scale",
    "batch_size",
    "device",
)
"""The knobs that say what is generated. Two kinds of device draw different noise from one seed."""

_LONGEST_VALUE = 40


def comparable(knobs: Mapping[str, Scalar], others: Mapping[str, Scalar]) -> str:
    """Why the outputs of two jobs do not compare; "" if they do, which is when both generate the same thing."""
    different = [
        f"{name} is {_short(knobs.get(name))} and {_short(others.get(name))}"
        for name in WORKLOAD
        if knobs.get(name) != others.get(name)
    ]
    return f"{', '.join(different)}; only outputs of the same workload compare" if different else ""


def _short(value: Scalar) -> str:
    shown = text(value)
    return shown if len(shown) <= _LONGEST_VALUE else f"{shown[: _LONGEST_VALUE - 3]}..."


def remove_frames(folder: Path) -> None:
    """Deletes the frames of a job that nothing will be compared with; the latents, some MB, stay."""
    (folder / FRAMES_FILE).unlink(missing_ok=True)


def write_outputs(folder: Path, latents: "npt.NDArray[np.float32]", videos: Sequence["npt.NDArray[np.uint8]"]) -> None:
    """Leaves what a job generated in its folder, each file whole or not at all.

    Args:
        folder: of the job.
        latents: [B, C, t, h, w], float32.
        videos: B times [T, H, W, 3], uint8.

    Raises:
        ValueError: videos differ in shape, or number formats are others.
        OSError: a file cannot be written.

    Memory: one frame, if a video's frames are not contiguous.
    """
    _write_array(folder / LATENTS_FILE, latents.shape, "float32", latents)
    shape = (len(videos), *videos[0].shape)
    _write_array(folder / FRAMES_FILE, shape, "uint8", (frame for video in videos for frame in video))


def digests(latents: "npt.NDArray[np.float32]", videos: Sequence["npt.NDArray[np.uint8]"]) -> dict[str, str]:
    """SHA-256 of all latents, and of all frames: whether two runs are equal to the bit is known without their outputs.

    Args:
        latents: [B, C, t, h, w], float32.
        videos: B times [T, H, W, 3], uint8.

    Memory: one frame, if a video's frames are not contiguous.
    """
    frames = (frame for video in videos for frame in video)
    return {"latents_sha256": _sha256([latents]), "frames_sha256": _sha256(frames)}


def _sha256(items: Iterable["npt.NDArray[Any]"]) -> str:
    import numpy as np

    digest = hashlib.sha256()
    for item in items:
        digest.update(np.ascontiguousarray(item).data)
    return digest.hexdigest()


def _write_array(path: Path, shape: tuple[int, ...], dtype: str, items: Iterable["npt.NDArray[Any]"]) -> None:
    """A .npy file, written piece by piece: mapped memory, the other way, kills the process when the disk is full."""
    import numpy as np

    part = path.with_name(f".{path.name}.part")
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    num_values = 0
    try:
        with part.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for item in items:
                if item.dtype != dtype:
                    raise ValueError(f"{path.name} is of {dtype}, and {item.dtype} was given; convert it")
                file.write(np.ascontiguousarray(item).data)
                num_values += item.size
        if num_values != np.prod(shape):
            raise ValueError(f"{path.name} of shape {list(shape)} got {num_values} values; videos must be of one shape")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def compare(folder: Path, reference: Path) -> dict[str, Any]:
    """What fidelity.json says of two folders with outputs. A file that cannot be read is a reason, too."""
    try:
        metrics, reason = _distances(folder, reference)
    except (OSError, ValueError) as error:
        metrics, reason = {}, f"the outputs cannot be read: {error}"
    return {
        "schema_version": SCHEMA_VERSION,
        "reference_folder": str(reference),
        "metrics": {f"fidelity/{name}": value for name, value in metrics.items() if value is not None},
        "reason": reason,
    }


def _distances(folder: Path, reference: Path) -> tuple[dict[str, float | None], str]:
    """Metrics, and why some are missing; None is a metric without a value.

    Memory: a frame and the latents of a video, of each folder, and what comparing them takes.
    """
    from wan_sweep.measure.image_metrics import ValuesDistance, VideoDistance

    pairs = [(_open(folder / name), _open(reference / name)) for name in (LATENTS_FILE, FRAMES_FILE)]
    for ours, theirs in pairs:
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            return {}, (
                f"{Path(str(ours.filename)).name} is {_kind(ours)} and the reference's {_kind(theirs)}; "
                "only outputs of one shape compare"
            )
    latents, frames = ValuesDistance(), VideoDistance()
    is_equal = True
    for one, other in zip(*(_read(array, axes=1) for array in pairs[0]), strict=True):
        is_equal = is_equal and one.tobytes() == other.tobytes()
        latents.add(one, other)
    for one, other in zip(*(_read(array, axes=2) for array in pairs[1]), strict=True):
        frames.add(one, other)
    metrics: dict[str, float | None] = {
        "psnr_db": frames.psnr_db,
        "ssim": frames.ssim,
        "max_abs_diff": frames.max_abs_diff,
        "is_bit_equal": int(is_equal and frames.max_abs_diff == 0),
    }
    reasons = [] if frames.ssim is not None else ["no SSIM: frames are smaller than its window of 11 x 11"]
    if latents.is_finite:
        metrics |= {
            "latents_max_abs_diff": latents.max_abs_diff,
            "latents_relative_l2": latents.relative_l2,
            "latents_psnr_db": latents.psnr_db,
        }
    else:
        reasons.append(
            f"no distance of the latents: of {latents.num_values} numbers {latents.num_not_finite} here and "
            f"{latents.num_not_finite_reference} in the reference are not finite"
        )
    return metrics, "; ".join(reasons)


def _kind(array: "np.memmap[Any, Any]") -> str:
    return f"{list(array.shape)} of {array.dtype}"


def _open(path: Path) -> "np.memmap[Any, Any]":
    """Shape, format and place of an array in a file; its values are not touched."""
    import numpy as np

    array = np.load(path, mmap_mode="r")
    if not isinstance(array, np.memmap) or not array.size or not array.flags.c_contiguous:
        raise ValueError(f"{path} holds no array in C order")
    return array


def _read(array: "np.memmap[Any, Any]", *, axes: int) -> "Iterator[npt.NDArray[Any]]":
    """The items along the first axes, one by one. They are read: pages of a mapping would stay, and add up."""
    import numpy as np

    shape = array.shape[axes:]
    with Path(str(array.filename)).open("rb") as file:
        file.seek(array.offset)
        for _ in range(int(np.prod(array.shape[:axes]))):
            yield np.fromfile(file, dtype=array.dtype, count=int(np.prod(shape))).reshape(shape)


def main(arguments: list[str]) -> int:
    """Compares the first folder with the second."""
    folder, reference = map(Path, arguments)
    write_json(folder / FIDELITY_FILE, compare(folder, reference))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
