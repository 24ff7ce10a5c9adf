"""Writes what VACE can start from: a video, a mask of what of it may change, and a reference picture.

Why: to try and to measure controlled generation without media of one's own. The video shows a kite over a harbour, the
mask is white around the kite, and the picture is the harbour as a square.

How: python scripts/make_example_sources.py FOLDER [--size 832*480] [--frame_num 81]
"""

import argparse
import sys
from pathlib import Path

import torch

from wan21.errors import WanError
from wan21.examples import example_mask, example_picture
from wan21.frames import save_image, save_video
from wan21.shapes import VideoShape, parse_size


def main() -> int:
    """Writes the files and prints the knobs that name them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="is made if it is not there")
    parser.add_argument("--size", default="832*480", help="WIDTH*HEIGHT of the video")
    parser.add_argument("--frame_num", type=int, default=81, help="its frames, 4n+1")
    arguments = parser.parse_args()
    try:
        width, height = parse_size(arguments.size)
        shape = VideoShape(num_frames=arguments.frame_num, height=height, width=width)
    except WanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    arguments.folder.mkdir(parents=True, exist_ok=True)
    steps = [index / max(1, shape.num_frames - 1) for index in range(shape.num_frames)]
    knobs = []
    for knob, draw in (("src_video", example_picture), ("src_mask", example_mask)):
        path = arguments.folder / f"{knob}.mp4"
        save_video(torch.stack([torch.from_numpy(draw(width, height, progress=step)) for step in steps]), path)
        knobs.append(f"{knob}={path}")
    path = arguments.folder / "src_ref_image.png"
    save_image(torch.from_numpy(example_picture(height, height)), path)
    print(" ".join([*knobs, f"src_ref_images={path}"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
