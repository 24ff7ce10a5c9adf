import math
from typing import Any

import pytest

from tests.wan_sweep.made_up_records import ENVIRONMENT, GIB, KNOBS, MIB, main_job, metrics_of, record
from wan_sweep.record import Record
from wan_sweep.track.payload import Point, payload_of, run_name, short_value


def made(*arguments: Any, **changes: Any) -> Record:
    return Record.from_json(record(*arguments, **changes))


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        ("ok", "FINISHED"),
        ("skipped", "FINISHED"),
        ("oom", "FAILED"),
        ("failed", "FAILED"),
        ("timeout", "KILLED"),
        ("refused", "KILLED"),
    ],
)
def test_the_status_of_a_run_follows_the_outcome(outcome: str, status: str) -> None:
    assert payload_of(made(1, {}, outcome=outcome)).status == status


def test_a_name_is_made_of_what_differs() -> None:
    assert run_name(made(1, {"precision": "fp16", "offload": True})) == "fp16 offload=true"
    assert run_name(made(1, {})) == "t2v-1.3B"
    assert run_name(made(1, {"offload": False}, repeat=1, knobs={**KNOBS, "repeats": 3})) == "offload=false #2"


def test_values_are_short_and_never_alike() -> None:
    assert short_value(None) == "null"
    assert short_value(False) == "false"
    assert short_value(5.0) == "5"
    assert short_value("832*480") == "832*480"
    one, two = short_value("x" * 100 + "1"), short_value("x" * 100 + "2")
    assert one != two
    assert len(one) <= 60
    assert short_value("/a/Wan-1.3B") != short_value("/b/Wan-1.3B")
    assert short_value("/a/Wan-1.3B").startswith("Wan-1.3B #")


def test_bytes_become_mib_and_the_compared_numbers_come_first() -> None:
    points = payload_of(Record.from_json(main_job()[0])).points
    assert points[0] == Point(key="memory/peak/allocated_mib", value=6 * GIB / MIB)
    assert [point.key for point in points[1:3]] == ["time/step_s", "time/total_s"]
    assert len({(point.key, point.step) for point in points}) == len(points)
    assert not [point.key for point in points if point.key.endswith("_bytes")]


def test_series_are_counted_from_step_one() -> None:
    points = payload_of(Record.from_json(main_job()[0])).points
    steps = [(point.step, point.value) for point in points if point.key == "step/seconds"]
    assert steps == [(1, 1.07), (2, 0.95), (3, 0.95)]


def test_numbers_that_are_none_are_left_out() -> None:
    metrics = {"time/load_s": math.nan, "time/decode_s": math.inf, "time/save_s": 1.0}
    assert [point.key for point in payload_of(made(1, {}, metrics)).points if "/" in point.key][:1] == ["time/save_s"]


def test_each_of_several_ranks_is_told_by_itself() -> None:
    ranks = [
        {"rank": 0, "metrics": {"time/total_s": 1.0, "memory/peak/allocated_bytes": MIB}, "series": {}},
        {"rank": 1, "metrics": {"time/total_s": 1.0, "memory/peak/allocated_bytes": 2 * MIB}, "series": {}},
    ]
    points = payload_of(made(1, {}, ranks=ranks)).points
    assert [(point.key, point.value) for point in points] == [
        ("rank0/time/total_s", 1.0),
        ("rank0/memory/peak/allocated_mib", 1.0),
        ("rank1/time/total_s", 1.0),
        ("rank1/memory/peak/allocated_mib", 2.0),
    ]


def test_a_single_rank_is_the_job_itself() -> None:
    ranks = [{"rank": 0, "metrics": {"time/total_s": 1.0}, "series": {}}]
    points = payload_of(made(1, {}, {"time/total_s": 1.0}, ranks=ranks)).points
    assert not [point.key for point in points if point.key.startswith("rank")]


def test_tags_tell_where_a_number_comes_from() -> None:
    tags = payload_of(Record.from_json(main_job()[4])).tags
    assert tags["outcome"] == "oom"
    assert tags["failed_in"] == "denoise"
    assert tags["reason"].startswith("out of memory in denoise")
    assert tags["role"] == "job"
    assert tags["weights"] == "random (seed 0)"
    assert {name: tags[name] for name in ENVIRONMENT} == ENVIRONMENT
    assert "measured_in" not in tags


def test_a_long_reason_is_cut_to_a_line() -> None:
    tags = payload_of(made(1, {}, outcome="failed", reason="first " * 200 + "\nsecond")).tags
    assert len(tags["reason"]) == 500
    assert "second" not in tags["reason"]


def test_metrics_of_a_made_up_job_fit_the_schema() -> None:
    assert metrics_of(base={"dit": 1.0}, activation=1)["memory/base/dit_bytes"] == MIB
