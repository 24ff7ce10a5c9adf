from pathlib import Path
from typing import Any

from tests.wan_sweep.made_up_records import GIB, KNOBS, metrics_of, record, write_sweep
from wan_sweep.report.advice import advice, pick
from wan_sweep.report.sheet import Sheet, read_sheet

BASE = {"t5": 3.0, "dit": 2.0, "vae": 4.0}


def job(number: int, *, needs_gib: float, seconds: float, repeat: int = 0, **knobs: Any) -> dict[str, Any]:
    metrics = metrics_of(base=BASE, activation=41) | {
        "memory/peak/process_used_bytes": int(needs_gib * GIB),
        "time/total_s": seconds,
    }
    overrides = {"base_seed": knobs.pop("base_seed", number)}
    return record(number, overrides, metrics, repeat=repeat, knobs={**KNOBS, **overrides, **knobs})


def sheet_of(folder: Path, *records: dict[str, Any]) -> Sheet:
    return read_sheet(write_sweep(folder, *records))


def test_each_card_gets_the_fastest_that_fits(tmp_path: Path) -> None:
    sheet = sheet_of(
        tmp_path,
        job(1, needs_gib=30, seconds=10),
        job(2, needs_gib=14, seconds=20),
        job(3, needs_gib=9, seconds=30),
    )
    rule, *lines = advice(sheet)
    assert "process held of the device" in rule
    assert "on NVIDIA H100 80GB HBM3; on another card the time differs" in rule
    assert lines == [
        "8 GiB: nothing that was measured fits; the least, job 3, needs 9.00 GiB.",
        "12 GiB: job 3 (base_seed=3), 30.0 s in total, needs 9.00 GiB.",
        "16 and 24 GiB: job 2 (base_seed=2), 20.0 s in total, needs 14.00 GiB.",
        "40 and 80 GiB: job 1 (base_seed=1), 10.0 s in total, needs 30.00 GiB.",
    ]


def test_exactly_the_size_of_a_card_fits_and_a_byte_more_does_not(tmp_path: Path) -> None:
    sheet = sheet_of(tmp_path, job(1, needs_gib=12, seconds=10), job(2, needs_gib=12 + 2**-30, seconds=5))
    found = pick(sheet.rows, 12)
    assert found is not None
    assert found[0].number == 1


def test_of_equally_fast_ones_the_one_with_less_memory_is_advised(tmp_path: Path) -> None:
    sheet = sheet_of(tmp_path, job(1, needs_gib=30, seconds=10), job(2, needs_gib=9, seconds=10.15))
    assert advice(sheet)[2] == ("12, 16 and 24 GiB: job 2 (base_seed=2), 10.2 s in total, needs 9.00 GiB.")
    assert advice(sheet)[3].endswith("needs 9.00 GiB; job 1 is as fast and needs no less.")


def test_repeats_that_do_not_overlap_are_told_apart_however_close(tmp_path: Path) -> None:
    times = {1: (10.00, 10.02), 2: (10.05, 10.07)}
    jobs = [
        job(2 * repeat + number, needs_gib=20 if number == 1 else 9, seconds=seconds, repeat=repeat, base_seed=number)
        for number, runs in times.items()
        for repeat, seconds in enumerate(runs)
    ]
    found = pick(sheet_of(tmp_path, *jobs).rows, 24)
    assert found is not None
    assert found[0].number == 1
    assert found[1] == []


def test_what_a_card_needs_is_the_most_over_all_repeats(tmp_path: Path) -> None:
    jobs = [job(1, needs_gib=11, seconds=10, base_seed=1), job(2, needs_gib=13, seconds=10, repeat=1, base_seed=1)]
    assert pick(sheet_of(tmp_path, *jobs).rows, 12) is None


def test_a_cpu_gives_no_advice_on_cards_and_says_why(tmp_path: Path) -> None:
    sheet = sheet_of(tmp_path, job(1, needs_gib=1, seconds=10, device="cpu"))
    assert advice(sheet) == ["None: this sweep ran on a CPU, whose memory and time say nothing about a card."]


def test_nothing_is_advised_where_the_needs_are_not_known(tmp_path: Path) -> None:
    bare = record(1, {"base_seed": 1}, metrics_of(base=BASE, activation=41))
    assert advice(sheet_of(tmp_path / "none", bare)) == [
        "None: what the processes held of the device besides torch's allocator was not recorded."
    ]
    lines = advice(sheet_of(tmp_path / "some", bare, job(2, needs_gib=9, seconds=10)))
    assert lines[-1] == "Left out, as what it needs in all was not recorded: job 1 (base_seed=1)."


def test_a_sweep_without_measurements_needs_no_advice(tmp_path: Path) -> None:
    assert advice(sheet_of(tmp_path, record(1, {}, outcome="oom", reason="out of memory"))) == []
