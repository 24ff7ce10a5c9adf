"""How a video is encoded in tiles, exactly: as it is decoded (`wan21.vae.plan`), the other way round.

Down to the last downsampling the encoder's layers are local in space, so a tile of the picture is taken through the
whole video before the next one begins. Its result, 384 numbers for each latent position and frame, is put together
with that of the others; the part behind it, which holds the only attention, then runs over whole frames.

A tile reads a halo around the latent positions that it gives: each residual block two positions on every side at its
level, and each downsampling one more on the right and below. In pixels that is 29 on the left and 36 on the right.
`wan21.vae.encode_budget` counts bytes and multiply-adds for any plan:

| tiles | GiB, 832 x 480, float32 | work | GiB, 1280 x 720, float32 | work |
| --- | --: | --: | --: | --: |
| 1 | 4.11 | 1.00 | 9.49 | 1.00 |
| 1, single frames | 3.10 | 1.06 | 7.15 | 1.06 |
| 2 x 2 | 1.40 | 1.15 | 3.05 | 1.10 |
| 2 x 3 | 1.10 | 1.22 | 2.32 | 1.14 |
| 3 x 4 | 0.77 | 1.39 | 1.56 | 1.25 |
| 3 x 5 | 0.68 | 1.45 | 1.37 | 1.29 |
"""

from collections.abc import Iterator

from wan21.vae.encoder import Encoder
from wan21.vae.plan import DecodePlan, Strip, Tile, split_latents


def encode_strips(encoder: Encoder, size: int, count: int, name: str) -> list[Strip]:
    """The rows (or columns) of tiles over `size` rows of latents, `count` of them.

    Raises:
        UsageError: there are fewer rows than tiles; `name` says of which count.
    """
    found = []
    for features in split_latents(size, count, name):
        pixels, windows = encoder.windows(features)
        found.append(Strip(pixels, features, windows))
    return found


def encode_tiles(encoder: Encoder, plan: DecodePlan, height: int, width: int) -> Iterator[Tile]:
    """The tiles of latents [h, w], row by row.

    Raises:
        UsageError: the plan has more tiles on a side than there are latents.
    """
    all_cols = encode_strips(encoder, width, plan.num_tile_cols, "num_tile_cols")
    for rows in encode_strips(encoder, height, plan.num_tile_rows, "num_tile_rows"):
        for cols in all_cols:
            yield Tile(rows, cols)
