"""What a pass of the VAE keeps alive, counted on tensors without data."""

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from wan21.config import VaeConfig
from wan21.vae import Vae
from wan21.vae.past import Past

CONFIG = VaeConfig(base_dim=32)
HEIGHT, WIDTH = 64, 96
FRAME_BYTES = CONFIG.base_dim * HEIGHT * WIDTH * 4  # one frame of the full-resolution level


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, until they die; not those of what is given."""

    def __init__(self, vae: Vae, *given: Tensor) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in (*vae.parameters(), *given)}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._known:
                storage = value.untyped_storage()
                self._known.add(storage._cdata)
                self.current += storage.nbytes()
                self.peak = max(self.peak, self.current)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.current -= num_bytes


@pytest.fixture(scope="module")
def vae() -> Vae:
    with torch.device("meta"):
        return Vae(CONFIG)


def past_bytes(past: Past) -> int:
    return sum(frames.nbytes for frames in past._frames.values())


def test_decode_holds_its_past_and_fourteen_frames_of_the_largest_layer(vae: Vae) -> None:
    past = Past()
    z = torch.empty(1, CONFIG.z_dim, 1, HEIGHT // 8, WIDTH // 8, device="meta")
    with torch.no_grad(), LiveBytes(vae, z) as live:
        for i in range(4):
            past.is_first = i == 0
            vae.decoder(z, past)
    # In a residual block: input (4), the convolution's input with its past (6) and its output (4).
    assert live.current == past_bytes(past)
    assert live.peak - past_bytes(past) <= 14 * FRAME_BYTES


def test_encode_holds_its_past_and_fourteen_frames_of_the_largest_layer(vae: Vae) -> None:
    past = Past()
    frames = torch.empty(1, 3, 4, HEIGHT, WIDTH, device="meta").contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad(), LiveBytes(vae, frames) as live:
        for i in range(4):
            past.is_first = i == 0
            vae.encoder(frames[:, :, :1] if i == 0 else frames, past)
    assert live.current == past_bytes(past)
    # The normalisation's lengths, one channel, come while the past is not yet complete.
    assert live.peak - past_bytes(past) <= 14 * FRAME_BYTES


@pytest.mark.parametrize("num_latent_frames", [4, 8])
def test_decoding_in_chunks_does_not_need_more_for_a_longer_video(vae: Vae, num_latent_frames: int) -> None:
    peaks = []
    for t in (4, num_latent_frames):
        latents = torch.empty(1, CONFIG.z_dim, t, HEIGHT // 8, WIDTH // 8, device="meta")
        with torch.no_grad(), LiveBytes(vae, latents) as live:
            for chunk in vae.decode_chunks(latents):
                del chunk
        peaks.append(live.peak - latents.nbytes)  # the scaled latents stay, all of them
    assert peaks[0] == pytest.approx(peaks[1], rel=1e-3)


def test_an_image_keeps_no_past(vae: Vae) -> None:
    latents = torch.empty(1, CONFIG.z_dim, 1, HEIGHT // 8, WIDTH // 8, device="meta")
    with torch.no_grad(), LiveBytes(vae, latents) as live:
        vae.decode(latents)
    # At the last upsampling: input (half a frame of the largest layer), enlarged input (2) and output (1).
    image_bytes = 3 * HEIGHT * WIDTH * 4
    statistics_bytes = 2 * CONFIG.z_dim * 4
    assert live.peak <= 3.5 * FRAME_BYTES + latents.nbytes + image_bytes + statistics_bytes


def num_live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def test_a_pass_that_is_given_up_leaves_no_tensor_behind(vae: Vae) -> None:
    before = num_live_tensors()
    with torch.no_grad():
        chunks = vae.decode_chunks(torch.empty(1, CONFIG.z_dim, 3, 2, 2, device="meta"))
        next(chunks)
        next(chunks)
        assert num_live_tensors() > before
        del chunks
    assert num_live_tensors() == before
