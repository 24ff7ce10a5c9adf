"""Frames reach their places in order, however late the copies are, and none is waited for sooner than it must be."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.wan21.test_pipeline import generate, request
from tests.wan21.vae_examples import random_latents, random_vae
from wan21.decoding import decode, departures
from wan21.events import Span
from wan21.frames import to_uint8
from wan21.memory.departures import NUM_BUFFERS, Departures
from wan21.parallel.world import ALONE
from wan21.runtime import CpuRuntime, Mark, Stream, whole_pages
from wan21.vae import WHOLE, DecodePlan, Vae

PLANS = [WHOLE, DecodePlan(frames_at_once=1), DecodePlan(num_tile_rows=2, num_tile_cols=3)]


class LateCopy(torch.Tensor):
    """Host memory that copies reach only when somebody waits for them."""

    queue: list[Callable[[], object]]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.copy_ and kwargs.get("non_blocking"):
                destination, source = args[0], args[1].clone()  # a stream copies what is there at its turn
                args[0].queue.append(lambda: destination.copy_(source))
                return destination
            result = func(*args, **kwargs)
        if func in (torch.Tensor.__getitem__, torch.Tensor.view):
            result = result.as_subclass(cls)
            result.queue = args[0].queue
        return result


class LateRuntime(CpuRuntime):
    """A device that has done nothing of what was asked of it until it is waited for.

    Attributes:
        queue: copies that were asked for.
        num_done: so many of them have happened.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[Callable[[], object]] = []
        self.num_done = 0

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        buffer = super().host_buffer(num_bytes).fill_(99).as_subclass(LateCopy)
        buffer.queue = self.queue
        return buffer

    def work_until(self, count: int) -> None:
        for copy in self.queue[self.num_done : count]:
            copy()
        self.num_done = max(self.num_done, count)

    def synchronize(self) -> None:
        self.work_until(len(self.queue))

    def side_stream(self) -> Stream:
        runtime, stream = self, super().side_stream()

        class LateMark(Mark):
            def __init__(self) -> None:
                self.count = len(runtime.queue)

            def hold_current(self) -> None:
                raise NotImplementedError

            def wait(self) -> None:
                runtime.work_until(self.count)

        stream.mark_current = LateMark  # type: ignore[method-assign]
        return stream


@pytest.fixture(scope="module")
def vae() -> Vae:
    return random_vae(8)


def frames_of(vae: Vae, latents: torch.Tensor, plan: DecodePlan, runtime: CpuRuntime) -> list[torch.Tensor]:
    """Two videos of the same shape, the second being the first one backwards."""
    found = []
    with torch.no_grad(), departures(vae, latents.shape, plan, ALONE, runtime) as leaving:
        for one in (latents, latents.flip(2)):
            video = decode(vae, one, plan, ALONE, leaving, is_image=False)
            assert video is not None
            found.append(video)
    return found


@pytest.mark.parametrize("runtime_of", [CpuRuntime, LateRuntime])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_piece_arrives_in_its_place(vae: Vae, plan: DecodePlan, runtime_of: Callable[[], CpuRuntime]) -> None:
    latents = random_latents(1, 16, 3, 4, 6)
    with torch.no_grad():
        expected = [to_uint8(vae.decode(one, plan)[0], is_image=False) for one in (latents, latents.flip(2))]
    for video, one in zip(frames_of(vae, latents, plan, runtime_of()), expected, strict=True):
        assert torch.equal(video, one)
    assert not torch.equal(*expected)


def test_an_image_has_one_piece(vae: Vae) -> None:
    latents = random_latents(1, 16, 1, 4, 6)
    with torch.no_grad():
        expected = to_uint8(vae.decode(latents)[0], is_image=False)
    assert torch.equal(frames_of(vae, latents, WHOLE, LateRuntime())[0], expected)


def test_a_piece_is_waited_for_when_its_buffer_is_needed_and_no_sooner() -> None:
    runtime = LateRuntime()
    places = torch.zeros(5, 7, dtype=torch.uint8)
    with Departures(runtime, 7) as leaving:
        for index, place in enumerate(places):
            leaving.leave(torch.full((7,), index + 1, dtype=torch.uint8), place)
            assert runtime.num_done == max(0, index + 1 - NUM_BUFFERS)
        leaving.finish()
        assert runtime.num_done == len(places)
    assert places.T.tolist() == [[1, 2, 3, 4, 5]] * 7


def test_two_pieces_are_pinned_and_given_back_also_after_an_error(vae: Vae) -> None:
    runtime = LateRuntime()
    plan = DecodePlan(num_tile_rows=2, num_tile_cols=3)
    largest = 4 * (8 * 3) * (8 * 2) * 3  # of 5 x 6 rows and columns of latents

    def fail() -> None:
        with departures(vae, torch.Size((1, 16, 3, 5, 6)), plan, ALONE, runtime) as leaving:
            assert runtime.host_buffer_bytes() == NUM_BUFFERS * whole_pages(largest)
            leaving.leave(torch.zeros(largest, dtype=torch.uint8), torch.empty(largest, dtype=torch.uint8))
            raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError, match="no more memory"):
        fail()
    assert runtime.num_done == 1  # nothing is on its way to memory that is gone
    runtime.queue.clear()
    assert runtime.host_buffer_bytes() == 0


def test_what_is_pinned_for_frames_is_there_at_the_end_of_a_video_and_gone_with_the_phase() -> None:
    runtime = CpuRuntime()
    pinned: dict[str, int] = {}

    class Listener:
        wants_blocks = False

        @contextmanager
        def span(self, span: Span) -> Iterator[None]:
            yield
            pinned[span.name] = runtime.host_buffer_bytes()

    generate(request(), observer=Listener(), runtime=runtime)
    assert pinned["video"] == NUM_BUFFERS * whole_pages(4 * 64 * 96 * 3)
    assert pinned["decode"] == 0
