"""One job on a device without memory: the pipeline itself runs, on fake tensors, and a model counts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from wan21.assets import Assets
from wan21.events import Span, together
from wan21.pipeline import VideoPipeline
from wan21.text.tokenizer import Tokenizer
from wan21.vae.choose import choose_plan
from wan_sweep.allocator import Allocator, Settings
from wan_sweep.build import build_options, build_request, build_spec
from wan_sweep.cards import Card
from wan_sweep.estimate.choices import CudaChoices
from wan_sweep.estimate.fa3 import stand_in
from wan_sweep.estimate.fake_device import fake_device
from wan_sweep.estimate.fake_world import fake_world
from wan_sweep.estimate.kernel_table import row_for
from wan_sweep.estimate.memory import DeviceMemory
from wan_sweep.estimate.replay import Replays
from wan_sweep.estimate.runtime import EstimatingRuntime
from wan_sweep.estimate.tracker import StorageTracker
from wan_sweep.estimate.weights import UndrawnWeights
from wan_sweep.measure.recorder import Recorder, Sink
from wan_sweep.schema import Job

EMPTY: Mapping[str, object] = MappingProxyType({})


class FakeTensors(FakeTensorMode):  # type: ignore[no-untyped-call] # torch's part of making a subclass
    """Torch's own, without what keeps torch's compiler away from every operation: nothing is compiled here."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 # an operation of torch carries no type
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] = EMPTY,
    ) -> Any:  # noqa: ANN401
        return self.dispatch(func, types, args, kwargs)


MOST_STEPS = 4
"""The first step, the second, one with the solver's history full, and the last, which forgets it; others repeat."""


class Places:
    """An observer that tells the memory where the run is."""

    wants_blocks = False

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory

    def span(self, span: Span) -> AbstractContextManager[object]:
        """Labels what happens inside."""
        outer = self._memory.place
        if span.kind == "phase":
            return self._memory.at(replace(outer, phase=span.name))
        if span.kind == "component":
            return self._memory.at(replace(outer, component=span.name))
        if span.kind == "step":
            return self._memory.at(replace(outer, step=span.index))
        return nullcontext()


class NoSink:
    """Takes a recorder's events and keeps none."""

    def write(self, event: dict[str, Any], *, is_urgent: bool) -> None:
        """Nothing to keep."""


SILENT_SINK = NoSink()


class Simulation:
    """A device of a card's size that holds tensors without memory, and everything that counts on it.

    Args:
        card: what to play.
        settings: of torch's allocator.
        capacity_bytes: the most that the allocator may take; None: whatever is asked for.
        device: a fake one; by default the most faithful that this build of torch can have.
        repeats_blocks: whether equal blocks run once.
    """

    def __init__(
        self,
        card: Card,
        settings: Settings,
        *,
        capacity_bytes: int | None = None,
        device: torch.device | None = None,
        repeats_blocks: bool = True,
    ) -> None:
        self.card = card
        self.device = fake_device() if device is None else device
        self.memory = DeviceMemory(Allocator(settings, capacity_bytes=capacity_bytes, device_bytes=card.device_bytes))
        self.replays = Replays(self.memory, is_on=repeats_blocks)
        self.runtime = EstimatingRuntime(self.device, self.memory, card, self.replays)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside it tensors on the device are fake, and all of them are counted."""
        with (
            torch.no_grad(),
            FakeTensors(),
            StorageTracker(self.device, self.memory, self.card),
            CudaChoices(self.device, self.card),
            stand_in(self.memory, row_for(self.card)[0].fa3_bytes_per_row),
        ):
            yield


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What came of it.

    Attributes:
        metrics, series: of the recorder, which times this process, too, and reads its resident memory.
        warnings: of the recorder.
        error: what ended the run, if anything did, and where.
    """

    metrics: dict[str, int | float]
    series: dict[str, list[int] | list[float]]
    warnings: list[dict[str, str]]
    error: Exception | None
    failed_at: dict[str, Any] | None


def dry_run(
    job: Job, simulation: Simulation, *, rank: int = 0, most_steps: int = MOST_STEPS, sink: Sink = SILENT_SINK
) -> DryRun:
    """Runs the pipeline from the warm-up to the end.

    Args:
        job: resolved.
        simulation: of the device; new.
        rank: which of the job's processes is gone through.
        most_steps: so many steps at most.
        sink: gets the events.
    """
    runtime, memory = simulation.runtime, simulation.memory
    spec, options, request = build_spec(job), build_options(job), build_request(job)
    request = replace(request, num_steps=min(request.num_steps, most_steps))
    tokenizer = Tokenizer.built_in(max_tokens=spec.text.text_len)
    assets = Assets(UndrawnWeights(spec, runtime, memory), tokenizer, "never drawn")
    choose_plan(spec, options, request.shape.latent)  # which is kept; outside of the run torch builds modules faster
    error: Exception | None = None
    with fake_world(options.layout, rank, runtime) as world, simulation.running(), simulation.replays.loops():
        try:
            runtime.warm_up()
        except torch.OutOfMemoryError as caught:  # a limit that not even the libraries fit into
            return DryRun(metrics={}, series={}, warnings=[], error=caught.with_traceback(None), failed_at=None)
        recorder = Recorder(runtime, sink, process_used=runtime.device_used_bytes)
        observer = together(Places(memory), recorder)
        try:
            generation = VideoPipeline(spec, options, assets, runtime, observer, world).generate(request)
            recorder.forget_components()
            with observer.span(Span(kind="phase", name="save")):
                del generation
        except torch.OutOfMemoryError as caught:
            error = caught.with_traceback(None)  # which would keep the tensors of the run alive
    return DryRun(
        metrics=recorder.metrics(),
        series=recorder.series(),
        warnings=recorder.warnings,
        error=error,
        failed_at=recorder.failed_at,
    )
