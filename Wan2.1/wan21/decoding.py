"""A video decoded by several processes, each some of its tiles.

Letters: T, H, W of the video; C, t, h, w of its latents.
"""

import torch

from wan21.frames import to_uint8
from wan21.memory.departures import Departures
from wan21.parallel.exchange import send_and_receive
from wan21.parallel.world import World
from wan21.runtime import Runtime
from wan21.vae.plan import DecodePlan, tiles
from wan21.vae.vae import Vae


def departures(vae: Vae, shape: torch.Size, plan: DecodePlan, world: World, runtime: Runtime) -> Departures:
    """What takes the pieces of a video to the host of this process, which may decode several such videos.

    Args:
        vae: that decodes it.
        shape: of its latents, [1, C, t, h, w].
        plan: into which tiles.
        world: this process's place.
        runtime: where it is decoded.
    """
    t, h, w = shape[2:]
    mine = list(tiles(vae.decoder, plan, h, w))[world.rank :: world.size]
    num_frames = 1 if t == 1 else vae.temporal_stride
    sizes = [3 * num_frames * len(tile.rows.pixels) * len(tile.cols.pixels) for tile in mine]
    return Departures(runtime, max(sizes, default=0))


def decode(
    vae: Vae, latents: torch.Tensor, plan: DecodePlan, world: World, leaving: Departures, *, is_image: bool
) -> torch.Tensor | None:
    """The frames of a video, on the host of the first process.

    Tiles are dealt out in turn. Each process decodes its own and takes the frames to its host as they come; then the
    tiles go to the first process, one at a time, as bytes.

    Args:
        vae: the same for all.
        latents: [1, C, t, h, w], the same for all.
        plan: into which tiles.
        world: this process's place.
        leaving: of `departures` for such a video.
        is_image: whether pixels are rounded as images are.

    Returns:
        [T, H, W, 3], uint8; None for the other processes.

    Memory: on the device that of `Vae.decode_pieces` for the largest tile, and one tile's bytes in all frames while
    they travel.
    """
    t, h, w = latents.shape[2:]
    num_frames = vae.temporal_stride * (t - 1) + 1
    places = [(tile.rows.pixels.as_slice(), tile.cols.pixels.as_slice()) for tile in tiles(vae.decoder, plan, h, w)]
    video = None
    if world.rank == 0:
        shape = (num_frames, vae.spatial_stride * h, vae.spatial_stride * w, 3)
        video = torch.empty(shape, dtype=torch.uint8)
    mine = slice(world.rank, None, world.size)
    here = {}
    for rows, cols in places[mine]:
        size = (num_frames, rows.stop - rows.start, cols.stop - cols.start, 3)
        tile = torch.empty(size, dtype=torch.uint8) if video is None else video[:, rows, cols]
        here[rows.start, cols.start] = tile
    for piece in vae.decode_pieces(latents, plan, mine):
        place = here[piece.rows.start, piece.cols.start][piece.frames]
        leaving.leave(to_uint8(piece.pixels[0], is_image=is_image), place)
        del piece  # or it would stand beside the next one
    leaving.finish()
    for index, (rows, cols) in enumerate(places):
        owner = index % world.size
        if owner == 0:
            continue
        if world.rank == owner:
            tile = here.pop((rows.start, cols.start)).to(latents.device)
            send_and_receive(world.everyone, [(0, tile)], []).wait()
        elif video is not None:
            tile = torch.empty(video[:, rows, cols].shape, dtype=torch.uint8, device=latents.device)
            send_and_receive(world.everyone, [], [(owner, tile)]).wait()
            video[:, rows, cols] = tile.cpu()
    return video
