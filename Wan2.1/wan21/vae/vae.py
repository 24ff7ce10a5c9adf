"""The causal video VAE: videos to normalised latents and back, a few frames at a time.

Frames are coded in chunks of 1, 4, 4, ... and latents one frame at a time; causal layers see the chunks before through
a `Past`. A frame depends on earlier ones only, so the start of a video is coded the same whatever follows it.

Letters: B videos; C channels; T, H, W of the video; t, h, w of the latents (t = (T - 1) / 4 + 1, h = H / 8, w = W / 8).

Reference: Wan2.1 (arXiv 2503.20314), the section on the spatio-temporal VAE.
"""

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import cast

import torch
from torch import Tensor, nn

from wan21.errors import UsageError
from wan21.models import VaeConfig
from wan21.options import Kernels
from wan21.vae.decoder import Decoder
from wan21.vae.encode_budget import EncodeBudget
from wan21.vae.encode_plan import encode_tiles
from wan21.vae.encoder import Encoder
from wan21.vae.past import Past
from wan21.vae.plan import WHOLE, DecodePlan, Piece, tiles

Pixels = Callable[[slice, slice, slice], Tensor]
"""From frames, rows and columns to values in [-1, 1], [B, 3, T, H, W] of that window, where the VAE is."""

NO_ENCODER = "this VAE has no encoder any more; load it again, and do not call drop_encoder"

# Of the 16 channels of the released VAE's latents, over its training data.
LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


class Vae(nn.Module):
    """Encoder and decoder, and the scaling of the latents between them.

    It computes in the parameters' number format; the scaling is done in float32, and what comes out is float32.

    Args:
        config: sizes.
        dtype: of the parameters.
        kernels: of the decoder.

    Raises:
        UsageError: z_dim differs from the number of channels whose statistics are known.
    """

    def __init__(self, config: VaeConfig, *, dtype: torch.dtype = torch.float32, kernels: Kernels = "torch") -> None:
        super().__init__()
        if config.z_dim != len(LATENT_MEAN):
            raise UsageError(
                f"z_dim={config.z_dim} cannot be: mean and deviation are known for {len(LATENT_MEAN)} latent "
                f"channels; choose z_dim={len(LATENT_MEAN)}"
            )
        self.z_dim = config.z_dim
        self.temporal_stride = 2 ** sum(config.temporal_downsample)
        self.spatial_stride = 2 ** len(config.temporal_downsample)
        self.encoder: Encoder | None = Encoder(config, dtype=dtype)
        self.conv1: nn.Conv3d | None = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1, dtype=dtype)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1, dtype=dtype)
        self.decoder = Decoder(config, dtype=dtype, kernels=kernels)

    def drop_encoder(self) -> None:
        """Lets go of what only encoding needs, 42 % of the weights: 214 MB in float32."""
        self.encoder = None
        self.conv1 = None

    def encode(self, video: Tensor, plan: DecodePlan = WHOLE) -> Tensor:
        """The normalised latents of a video: the mean of their distribution, nothing is drawn.

        Args:
            video: values in [-1, 1], [B, 3, T, H, W], any floating format.
            plan: what is encoded at once.

        Returns:
            [B, C, t, h, w] in float32, C = z_dim.

        Raises:
            UsageError: as `encode_pixels`.

        Memory: that of `encode_pixels`.
        """
        batch, _, num_frames, height, width = video.shape
        shape = (batch, num_frames, height, width)
        return self.encode_pixels(lambda frames, rows, cols: video[:, :, frames, rows, cols], shape, plan)

    def encode_pixels(self, pixels: Pixels, shape: tuple[int, int, int, int], plan: DecodePlan = WHOLE) -> Tensor:
        """The same for a video of which no more is there than is asked for.

        Tiles come one after the other, each through all frames, and then the part that needs whole frames; nothing is
        blended. The video is asked for a tile of 4 frames at a time.

        Args:
            pixels: gives a window of the video.
            shape: B, T, H, W.
            plan: what is encoded at once.

        Returns:
            [B, C, t, h, w] in float32, C = z_dim.

        Raises:
            UsageError: T is not 4n + 1, or a side is not a multiple of 8 (the official code drops what is left over),
                the plan has more tiles on a side than there are latents, or the encoder was dropped.

        Memory: `wan21.vae.encode_budget.EncodeBudget.num_bytes`. For whole frames at T = 4 and full resolution
        [B, base_dim, 3T + 2, H, W] beside the past of 26 layers, which at 832 x 480 is 2.2 GB in float32; neither grows
        with the number of frames. With tiles the same for a tile with its halo, and beside it the features of all
        latent frames, [B, 4 base_dim, t, h, w].
        """
        if self.encoder is None or self.conv1 is None:
            raise UsageError(NO_ENCODER)
        batch, num_frames, height, width = shape
        t, h, w = self._latent_shape(num_frames, height, width)
        device = self.conv2.weight.device
        mean, inverse_std = _latent_statistics(device)
        latents = torch.empty((batch, self.z_dim, t, h, w), dtype=torch.float32, device=device)
        if plan.num_tiles > 1:
            local = self._local_of_all(pixels, (batch, t, h, w), plan)
            features: Iterator[Tensor] = (local[:, :, i : i + 1] for i in plan.latent_frames(t))
        else:
            features = self._local(pixels, t, (slice(0, height), slice(0, width)), Past(), plan)
        past = Past()
        for i in plan.latent_frames(t):
            past.is_first, past.is_last = i == 0, i == t - 1
            mu = self.conv1(self.encoder.low(next(features), past))[:, : self.z_dim]
            latents[:, :, i : i + 1] = (mu.float() - mean) * inverse_std
            del mu  # or it would stand beside the next one
        return latents

    def encode_budget(self, shape: tuple[int, int, int, int]) -> EncodeBudget:
        """Bytes and work of plans for encoding B, T, H, W pixels.

        Raises:
            UsageError: as `encode_pixels`.
        """
        if self.encoder is None:
            raise UsageError(NO_ENCODER)
        batch, num_frames, height, width = shape
        latent_shape = self._latent_shape(num_frames, height, width)
        itemsize = self.conv2.weight.element_size()
        return EncodeBudget(self.encoder, latent_shape, itemsize=itemsize, batch_size=batch)

    def decode_chunks(self, latents: Tensor) -> Iterator[Tensor]:
        """The video of some normalised latents, as many frames at a time as a latent frame gives.

        Args:
            latents: [B, C, t, h, w], C = z_dim, any floating format.

        Yields:
            [B, 3, 1, H, W], then t - 1 times [B, 3, 4, H, W]: `decode_pieces` of whole frames.
        """
        # Not a generator, which would hold each chunk while it makes the next one.
        return map(attrgetter("pixels"), self.decode_pieces(latents))

    def decode_pieces(self, latents: Tensor, plan: DecodePlan = WHOLE, which: slice = slice(None)) -> Iterator[Piece]:
        """The video of some normalised latents, piece by piece.

        Whoever takes the pieces away as they come needs no memory for the whole video. Tiles come one after the other,
        each through all frames; nothing is blended, and each pixel comes once.

        Args:
            latents: [B, C, t, h, w], C = z_dim, any floating format.
            plan: what is decoded at once.
            which: of the plan's tiles; the others are left out.

        Yields:
            For each tile a piece of the first frame, then t - 1 pieces of 4 frames.

        Raises:
            UsageError: the plan has more tiles on a side than there are latents.

        Memory: `wan21.vae.budget.Budget.num_bytes`. For whole frames at T = 4 and full resolution
        [B, base_dim, 3T + 2, H, W] beside the past of 33 layers, which at 832 x 480 is 3.8 GB in float32; neither grows
        with the number of frames. With tiles the same for a tile with its halo, and beside it the features of all
        latent frames, [B, 4 base_dim, t, h, w].
        """
        t, h, w = latents.shape[2:]
        wanted = list(tiles(self.decoder, plan, h, w))[which]
        if not wanted:
            return
        self.decoder.lay_out()
        mean, inverse_std = _latent_statistics(latents.device)
        z = self.conv2(self._as_input(latents.float() / inverse_std + mean))
        features = self._low_of_all(z, plan) if plan.num_tiles > 1 else None
        for tile in plan.tiles(wanted):
            if features is None:
                past, chunks = Past(), self._low(z, plan)
            else:
                past = Past(tile.crops())
                part = features[..., tile.rows.features.as_slice(), tile.cols.features.as_slice()]
                chunks = iter(part.split(1, dim=2))
            start = 0
            for i in plan.latent_frames(t):
                past.is_first, past.is_last = i == 0, i == t - 1
                stop = start + (1 if i == 0 else self.temporal_stride)
                # Not named, here and in the decoder: a name would keep its value alive beside what follows from it.
                yield Piece(
                    slice(start, stop),
                    tile.rows.pixels.as_slice(),
                    tile.cols.pixels.as_slice(),
                    self.decoder.high(self.decoder.mid(next(chunks), past), past, frames_at_once=plan.frames_at_once)
                    .float()
                    .clamp_(-1, 1),
                )
                start = stop

    def decode(self, latents: Tensor, plan: DecodePlan = WHOLE) -> Tensor:
        """The video of some normalised latents, whole.

        Args:
            latents: [B, C, t, h, w], C = z_dim, any floating format.
            plan: what is decoded at once.

        Returns:
            [B, 3, T, H, W] in float32, clamped to [-1, 1].

        Memory: the video once, and that of `decode_pieces`.
        """
        batch, _, t, h, w = latents.shape
        num_frames = self.temporal_stride * (t - 1) + 1
        shape = (batch, 3, num_frames, self.spatial_stride * h, self.spatial_stride * w)
        video = torch.empty(shape, dtype=torch.float32, device=latents.device)
        for piece in self.decode_pieces(latents, plan):
            video[:, :, piece.frames, piece.rows, piece.cols] = piece.pixels
        return video

    def _local(
        self, pixels: Pixels, num_latent_frames: int, window: tuple[slice, slice], past: Past, plan: DecodePlan
    ) -> Iterator[Tensor]:
        """The encoder's local parts for each latent frame of a window of the video: t times [B, C', 1, h', w']."""
        encoder = cast("Encoder", self.encoder)
        for i in plan.latent_frames(num_latent_frames):
            past.is_first, past.is_last = i == 0, i == num_latent_frames - 1
            frames = slice(max(0, self.temporal_stride * (i - 1) + 1), self.temporal_stride * i + 1)
            # Not named: a name would keep its value alive beside what follows from it.
            yield encoder.mid(
                encoder.high(self._as_input(pixels(frames, *window)), past, frames_at_once=plan.frames_at_once), past
            )

    def _local_of_all(self, pixels: Pixels, shape: tuple[int, int, int, int], plan: DecodePlan) -> Tensor:
        """The same for the whole video, tile after tile, [B, C', t, h, w], channels last."""
        encoder = cast("Encoder", self.encoder)
        batch, t, h, w = shape
        weight = self.conv2.weight
        size = (batch, encoder.low_dim, t, h, w)
        features = torch.empty(size, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last_3d)
        for tile in plan.tiles(encode_tiles(encoder, plan, h, w)):
            window = tile.rows.pixels.as_slice(), tile.cols.pixels.as_slice()
            part = features[..., tile.rows.features.as_slice(), tile.cols.features.as_slice()]
            of_tile = self._local(pixels, t, window, Past(tile.crops()), plan)
            for i in plan.latent_frames(t):
                part[:, :, i : i + 1] = next(of_tile)
        return features

    def _low(self, z: Tensor, plan: DecodePlan) -> Iterator[Tensor]:
        """The low part's result for each latent frame of z [B, C, t, h, w]: t times [B, C', 1, h, w]."""
        past = Past()
        for i in plan.latent_frames(z.shape[2]):
            past.is_first, past.is_last = i == 0, i == z.shape[2] - 1
            yield self.decoder.low(z[:, :, i : i + 1], past)

    def _low_of_all(self, z: Tensor, plan: DecodePlan) -> Tensor:
        """The same in one tensor, [B, C', t, h, w], channels last."""
        shape = (z.shape[0], self.decoder.low_dim, *z.shape[2:])
        features = torch.empty(shape, dtype=z.dtype, device=z.device, memory_format=torch.channels_last_3d)
        for i, frame in zip(plan.latent_frames(z.shape[2]), self._low(z, plan), strict=True):
            features[:, :, i : i + 1] = frame
            del frame  # or it would stand beside the next one
        return features

    def _as_input(self, x: Tensor) -> Tensor:
        """The same values in the parameters' format, channels last."""
        return x.to(dtype=self.conv2.weight.dtype, memory_format=torch.channels_last_3d)

    def _latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        stride = self.temporal_stride
        if num_frames < 1 or (num_frames - 1) % stride:
            below = max(1, (num_frames - 1) // stride * stride + 1)
            raise UsageError(
                f"num_frames={num_frames} is not of the form {stride}n+1, which the VAE needs; "
                f"choose {below} or {below + stride}"
            )
        unit = self.spatial_stride
        for name, side in (("height", height), ("width", width)):
            if side < unit or side % unit:
                raise UsageError(
                    f"{name}={side} is not a positive multiple of {unit}; choose {max(1, side // unit) * unit}"
                )
        return (num_frames - 1) // stride + 1, height // unit, width // unit


def _latent_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and one over the standard deviation of each latent channel, [C, 1, 1, 1] in float32."""
    mean = torch.tensor(LATENT_MEAN, dtype=torch.float32, device=device)
    std = torch.tensor(LATENT_STD, dtype=torch.float32, device=device)
    return mean.view(-1, 1, 1, 1), (1 / std).view(-1, 1, 1, 1)
