"""Pixels and the files that hold them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wan21.frames import save_image, save_video, to_uint8


def test_videos_truncate_and_images_round() -> None:
    values = torch.tensor([-2.0, -1.0, -0.99, 0.0, 0.999, 1.0, 3.0])
    frames = values.view(1, 1, 1, -1).expand(3, 1, 1, -1)
    assert to_uint8(frames, is_image=False)[0, 0, :, 0].tolist() == [0, 0, 1, 127, 254, 255, 255]
    assert to_uint8(frames, is_image=True)[0, 0, :, 0].tolist() == [0, 0, 1, 128, 255, 255, 255]
    assert values[0] == -2.0


def test_truncation_is_that_of_the_official_formula() -> None:
    values = torch.linspace(-1, 1, 100_001)
    official = ((values + 1) / 2 * 255).to(torch.uint8)
    assert torch.equal(to_uint8(values.view(1, 1, 1, -1).expand(3, 1, 1, -1), is_image=False)[0, 0, :, 0], official)


def test_an_image_survives_its_file(tmp_path: Path) -> None:
    frame = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8)
    save_image(frame, tmp_path / "a.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), frame.numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_video_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(OSError, match=r"a\.mp4"):
        save_video(torch.zeros(5, 32, 48, 3, dtype=torch.uint8), tmp_path / "a.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
