"""From numbers to pictures: uint8 frames, and the files that hold them.

Letters: T, H, W of a video.
"""

from pathlib import Path

import torch

from wan21.models import SAMPLE_FPS

VIDEO_QUALITY = 8
"""Of 10, as imageio's ffmpeg writer counts."""


def to_uint8(frames: torch.Tensor, *, is_image: bool) -> torch.Tensor:
    """[3, T, H, W] in [-1, 1] to [T, H, W, 3], uint8, on the same device.

    Videos truncate and images round, as upstream's two writers do.

    Memory: one copy of the frames in their own dtype.
    """
    scaled = frames.clamp(-1, 1).add_(1).mul_(127.5)
    if is_image:
        scaled.add_(0.5)
    return scaled.clamp_(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def save_video(frames: torch.Tensor, path: Path) -> None:
    """Writes [T, H, W, 3] uint8 as an mp4 (H.264, 16 frames a second), whole or not at all.

    Raises:
        OSError: the file cannot be written, or ffmpeg did not write all of it.
    """
    import imageio_ffmpeg

    num_frames, height, width = frames.shape[:3]
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        writer = imageio_ffmpeg.write_frames(
            str(part), (width, height), fps=SAMPLE_FPS, codec="libx264", quality=VIDEO_QUALITY, ffmpeg_log_level="error"
        )
        writer.send(None)
        for frame in frames:
            writer.send(frame.numpy().tobytes())
        writer.close()
        # The writer does not look at ffmpeg's exit code, so a disk that was full at the end would go unnoticed.
        written = imageio_ffmpeg.count_frames_and_secs(str(part))[0] if part.exists() else 0
        if written != num_frames:
            raise OSError(f"{path}: ffmpeg wrote {written} of {num_frames} frames; is the disk full?")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_image(frame: torch.Tensor, path: Path) -> None:
    """Writes [H, W, 3] uint8 as a png, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    from PIL import Image

    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        Image.fromarray(frame.numpy()).save(part, format="png")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
