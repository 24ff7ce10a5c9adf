"""Live sets from made-up events, against those worked out by hand."""

from typing import Any

import pytest

from tests.wan_sweep.attribution_checks import inconsistencies
from wan_sweep.measure.live_items import BEFORE, MOST_ITEMS, describe
from wan_sweep.measure.live_set import NOWHERE, Allocation, Event, Free, LiveSet, Moment, Place, Refusal, Use

LOAD, ENCODE, DENOISE = (Place(phase=name) for name in ("load", "encode_text", "denoise"))


class Tape:
    """Writes down events, one nanosecond apart."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    @property
    def time(self) -> int:
        return len(self.events)

    def allocate(self, address: int, num_bytes: int, place: Place = DENOISE, **facts: Any) -> Allocation:
        facts.setdefault("operation", "aten::add")
        allocation = Allocation(time=self.time, address=address, num_bytes=num_bytes, place=place, **facts)
        self.events.append(allocation)
        return allocation

    def free(self, address: int, num_bytes: int) -> None:
        self.events.append(Free(self.time, address, num_bytes))

    def use(self, address: int, *shape: int) -> None:
        self.events.append(Use(self.time, address, shape, "float32"))

    def refuse(self, num_bytes: int, place: Place = DENOISE) -> None:
        self.events.append(Refusal(self.time, num_bytes, place, "aten::mm"))


def replayed(tape: Tape, place: Place = DENOISE, before_bytes: int = 0) -> LiveSet:
    live = LiveSet(before_bytes)
    live.replay(tape.events, place)
    return live


def peak_of(live: LiveSet, phase: str = "denoise") -> Moment:
    return live.phases[phase]


def sizes(moment: Moment) -> list[int]:
    return [allocation.num_bytes for allocation in moment.allocations]


def checked(moment: Moment | None) -> dict[str, Any]:
    assert moment is not None
    peak = describe(moment, "run")
    assert inconsistencies({"peaks": [peak], "oom": None}) == []
    return peak


def test_the_live_set_is_that_of_the_highest_instant() -> None:
    tape = Tape()
    tape.allocate(1, 100)
    tape.allocate(2, 50)
    tape.free(1, 100)
    tape.allocate(3, 200)  # 250: the peak
    tape.free(2, 50)
    tape.allocate(1, 40)  # 240, where 1 was
    live = replayed(tape)
    assert live.allocated_bytes == 240
    assert peak_of(live).allocated_bytes == 250
    assert sizes(peak_of(live)) == [50, 200]
    assert live.highest == peak_of(live)


def test_of_equal_peaks_the_first_counts() -> None:
    tape = Tape()
    tape.allocate(1, 70, operation="aten::first")
    tape.free(1, 70)
    tape.allocate(2, 70, operation="aten::second")
    live = replayed(tape)
    live.replay([Free(9, 2, 70), Allocation(time=10, address=3, num_bytes=70, place=DENOISE)], DENOISE)
    assert peak_of(live).operation == "aten::first"
    assert live.highest is not None
    assert live.highest.operation == "aten::first"


def test_what_lives_on_from_one_reading_to_the_next_is_in_the_later_peaks() -> None:
    live = LiveSet()
    live.replay([Allocation(time=1, address=1, num_bytes=10, place=LOAD)], LOAD)
    live.replay([Allocation(time=2, address=2, num_bytes=5, place=DENOISE), Free(3, 1, 10)], DENOISE)
    live.replay([Allocation(time=4, address=1, num_bytes=7, place=DENOISE)], DENOISE)
    assert sizes(peak_of(live)) == [10, 5]
    assert [allocation.place for allocation in peak_of(live).allocations] == [LOAD, DENOISE]
    assert live.allocated_bytes == 12


def test_a_phase_that_allocates_nothing_peaks_at_what_it_found() -> None:
    live = LiveSet()
    live.replay([Allocation(time=1, address=1, num_bytes=10, place=LOAD)], LOAD)
    live.replay([Free(2, 1, 10)], ENCODE)
    assert peak_of(live, "encode_text").allocated_bytes == 10
    assert peak_of(live, "encode_text").operation == ""
    assert list(live.phases) == ["load", "encode_text"]


def test_between_phases_only_the_run_has_a_peak() -> None:
    live = LiveSet()
    live.replay([Allocation(time=1, address=1, num_bytes=10)], NOWHERE)
    assert live.phases == {}
    assert checked(live.highest)["allocated_bytes"] == 10


def test_a_shape_that_is_seen_later_is_known_of_the_peak() -> None:
    tape = Tape()
    tape.allocate(1, 24)
    live = replayed(tape)
    assert checked(peak_of(live))["live"][0]["shape"] is None
    live.replay([Use(5, 1, (2, 3), "float32"), Use(6, 1, (6,), "int32"), Free(7, 1, 24)], DENOISE)
    (item,) = checked(peak_of(live))["live"]
    assert (item["shape"], item["dtype"]) == ([2, 3], "float32")


def test_a_use_names_what_stands_there_at_the_time() -> None:
    tape = Tape()
    tape.allocate(1, 24, operation="aten::first")
    tape.free(1, 24)
    tape.allocate(1, 24, operation="aten::second")
    tape.use(1, 6)
    tape.use(99, 7)  # not of this device
    live = replayed(tape)
    (second,) = live.standing()
    assert (second.operation, second.shape) == ("aten::second", (6,))
    assert peak_of(live).allocations[0].shape is None


def test_what_was_there_before_has_a_line_of_its_own_and_frees_of_it_are_counted() -> None:
    tape = Tape()
    tape.allocate(1, 30)
    tape.free(77, 60)  # came before the recording
    tape.allocate(2, 20)
    live = replayed(tape, before_bytes=100)
    assert live.allocated_bytes == 90
    peak = checked(peak_of(live))
    assert peak["allocated_bytes"] == 130
    assert [(item["bytes"], item["kind"], item["operation"]) for item in peak["live"]] == [
        (100, "unattributed", BEFORE),
        (30, "activation", "aten::add"),
    ]
    assert peak["unattributed_bytes"] == 100


def test_a_free_of_what_was_never_counted_takes_nothing_away() -> None:
    tape = Tape()
    tape.allocate(1, 30)
    tape.free(77, 60)
    assert replayed(tape).allocated_bytes == 30


def test_memory_handed_out_twice_counts_once() -> None:
    tape = Tape()
    tape.allocate(1, 30)
    tape.allocate(1, 40)  # the free between them was not heard of
    live = replayed(tape)
    assert live.allocated_bytes == 40
    assert sizes(peak_of(live)) == [40]


def test_an_allocation_with_no_name_at_all_is_unattributed_and_one_with_any_is_not() -> None:
    tape = Tape()
    tape.allocate(1, 1, operation="")
    for address, facts in enumerate(({"operation": "aten::mm"}, {"operation": "", "parameter": "weight"}), start=2):
        tape.allocate(address, 10, **facts)
    tape.allocate(4, 10, Place(phase="denoise", module="blocks.1"), operation="")
    tape.allocate(5, 10, Place(phase="denoise", component="dit"), operation="")
    peak = checked(peak_of(replayed(tape)))
    assert (peak["named_bytes"], peak["unattributed_bytes"]) == (40, 1)


def test_a_workspace_is_what_no_operation_gets_and_the_program_never_lets_go() -> None:
    tape = Tape()
    kept = tape.allocate(1, 32, operation="aten::kept", operation_end=2)
    output = tape.allocate(2, 16, operation="aten::output", operation_end=3)
    unread = tape.allocate(3, 8, operation="aten::unread", operation_end=4)
    scratch = tape.allocate(4, 4, operation="aten::scratch", operation_end=99)
    tape.use(2, 4)
    tape.free(3, 8)
    tape.free(4, 4)
    live = replayed(tape)
    assert [kept.is_workspace, scratch.is_workspace] == [False, True]  # memory may have run out before it was read
    live.settle()
    assert [one.is_workspace for one in (kept, output, unread, scratch)] == [True, False, False, True]
    kinds = {item["operation"]: item["kind"] for item in checked(peak_of(live))["live"]}
    assert kinds == {
        "aten::kept": "workspace",
        "aten::output": "activation",
        "aten::unread": "activation",
        "aten::scratch": "workspace",
    }


def test_a_refused_request_keeps_the_live_set_of_that_instant() -> None:
    tape = Tape()
    tape.allocate(1, 30)
    tape.refuse(500, LOAD)
    tape.allocate(2, 20)
    tape.refuse(1000)
    tape.allocate(3, 70)
    tape.free(1, 30)
    live = replayed(tape)
    assert live.refused is not None
    assert sizes(live.refused) == [30, 20]
    assert (live.refused.request_bytes, live.refused.place, live.refused.operation) == (1000, DENOISE, "aten::mm")


def test_equal_allocations_share_a_line_and_the_largest_line_comes_first() -> None:
    tape = Tape()
    tape.allocate(1, 50, operation="aten::mm")
    for address in (2, 3, 4):
        tape.allocate(address, 20)
    tape.allocate(5, 20, Place(phase="denoise", step=1))
    lines = checked(peak_of(replayed(tape)))["live"]
    assert [(line["bytes"], line["count"], line["operation"], line["step"]) for line in lines] == [
        (60, 3, "aten::add", None),
        (50, 1, "aten::mm", None),
        (20, 1, "aten::add", 1),
    ]


def test_a_long_list_is_cut_and_the_bytes_still_add_up() -> None:
    tape = Tape()
    for index in range(2 * MOST_ITEMS):
        tape.allocate(index, 1000 + index, operation=f"aten::op{index}")
    tape.allocate(-1, 3, operation="")
    peak = checked(peak_of(replayed(tape)))
    assert len(peak["live"]) == MOST_ITEMS
    assert peak["live"][0]["bytes"] == 1000 + 2 * MOST_ITEMS - 1
    assert peak["live"][-1]["kind"] == "unattributed"  # however small
    assert peak["rest_bytes"] == sum(1000 + index for index in range(MOST_ITEMS + 1))
    assert peak["num_live"] == 2 * MOST_ITEMS + 1


def test_weights_are_summed_by_component() -> None:
    tape = Tape()
    for address, component in enumerate(("t5", "t5", "dit")):
        tape.allocate(address, 10, Place(phase="load", component=component, is_loading=True), weights_of=component)
    tape.allocate(9, 5)
    peak = checked(peak_of(replayed(tape)))
    assert peak["weights"] == {"t5": 20, "dit": 10}
    assert peak["activation_bytes"] == 5


@pytest.mark.parametrize(
    "change",
    [{"allocated_bytes": 6}, {"rest_bytes": 1}, {"unattributed_bytes": 1}, {"weights": {"t5": 1}}, {"extra": 0}],
)
def test_the_checker_sees_what_does_not_add_up(change: dict[str, Any]) -> None:
    tape = Tape()
    tape.allocate(1, 5)
    peak = describe(peak_of(replayed(tape)), "run")
    assert inconsistencies({"peaks": [peak], "oom": None}) == []
    assert inconsistencies({"peaks": [{**peak, **change}], "oom": None}) != []
