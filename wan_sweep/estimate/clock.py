"""The time of an estimate's events: nothing runs, so each happens where the lower bounds of the phases put it."""

import time
from collections.abc import Mapping
from typing import Any

from wan_sweep.measure.recorder import Sink


class LowerBoundClock:
    """Passes a recorder's events on with times and step numbers as the whole run would have them at the earliest.

    Args:
        sink: gets them.
        bounds: seconds of phases and of a `step`, at the least (`lower_bound.lower_bounds`).
        load_bandwidth: bytes of weights that may arrive in a second.
        num_steps: of each group of videos, in the real run.
        num_run: how many of them are gone through; where that is fewer, the last one stands for the real last, and the
            events of the one before it are repeated for the steps between.
    """

    def __init__(
        self, sink: Sink, bounds: Mapping[str, float], *, load_bandwidth: float, num_steps: int, num_run: int
    ) -> None:
        self.seconds: dict[str, float] = {}
        """Of each phase so far."""
        self._sink = sink
        self._bounds = bounds
        self._load_bandwidth = load_bandwidth
        self._num_steps = num_steps
        self._num_run = num_run
        self._began = time.time()
        self._now = 0.0
        self._begun: dict[tuple[str, str, int | None], float] = {}
        self._step: list[tuple[dict[str, Any], bool]] = []  # the events of the step gone through last

    def write(self, event: dict[str, Any], *, is_urgent: bool) -> None:
        """Passes an event on."""
        if event["kind"] == "step" and event["event"] == "begin":
            group, step = divmod(event["index"], self._num_run)
            for between in range(step, self._num_steps - 1) if step == self._num_run - 1 else ():
                for one, was_urgent in self._step:
                    self._pass_on(one, group * self._num_steps + between, is_urgent=was_urgent)
            self._step = []
        if event["kind"] in {"step", "block"}:
            self._step.append((event, is_urgent))
        self._pass_on(event, None if event["index"] is None else self._real_step(event["index"]), is_urgent=is_urgent)

    def _pass_on(self, event: dict[str, Any], step: int | None, *, is_urgent: bool) -> None:
        event = dict(event)
        if event["kind"] == "step":
            event["index"] = step
            event["total"] = event["total"] // self._num_run * self._num_steps
        key = (event["kind"], event["name"], event["index"])
        if event["event"] == "begin":
            self._begun[key] = self._now
        else:
            began = self._begun.pop(key)
            self._now = max(self._now, began + self._least_seconds(event))
            event["seconds"] = self._now - began
            if event["kind"] == "phase":
                self.seconds[event["name"]] = self.seconds.get(event["name"], 0.0) + event["seconds"]
        event |= {"time": self._began + self._now, "elapsed_s": self._now}
        self._sink.write(event, is_urgent=is_urgent)

    def _least_seconds(self, event: Mapping[str, Any]) -> float:
        if event["kind"] == "component":
            return float(event["moved_bytes"] / self._load_bandwidth)
        if event["kind"] in {"phase", "step"}:
            return self._bounds.get(event["name"], 0.0)
        if event["kind"] == "video":  # all of decoding
            return float(self._bounds.get("decode", 0.0) / event["total"])
        return 0.0

    def _real_step(self, index: int) -> int:
        group, step = divmod(index, self._num_run)
        is_last = step == self._num_run - 1
        return group * self._num_steps + (self._num_steps - 1 if is_last else step)


def all_steps(values: list[Any], *, num_steps: int, num_run: int) -> list[Any]:
    """A series of the whole run from that of the steps gone through: those between are like the last but one."""
    if num_run == num_steps:
        return values
    groups = [values[first : first + num_run] for first in range(0, len(values), num_run)]
    return [value for group in groups for value in (*group[:-1], *[group[-2]] * (num_steps - num_run), group[-1])]
