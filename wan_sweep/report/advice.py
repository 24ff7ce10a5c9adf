"""For cards of usual sizes the fastest configuration of each workload, from what was measured."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from wan_sweep.report.change import NOISE_PCT, differ
from wan_sweep.report.sheet import TOTAL_SECONDS, Row, Sheet, job_list, word_list
from wan_sweep.report.workloads import by_workload
from wan_sweep.units import GIB, format_bytes, format_seconds

CARDS_GIB = (8, 12, 16, 24, 40, 80)

TITLE = "Which configuration for which card"


def advice(sheet: Sheet) -> list[str]:
    """Return the rule, then a line for each size of card; one line that says why where there is no advice."""
    rows = [row for row in sheet.measured if row.value(TOTAL_SECONDS) is not None]
    if not rows:
        return []
    if all(row.knobs.get("device") == "cpu" for row in rows):
        return ["None: this sweep ran on a CPU, whose memory and time say nothing about a card."]
    known = [row for row in rows if row.needed_bytes() is not None]
    if not known:
        return ["None: what the processes held of the device besides torch's allocator was not recorded."]
    workloads = by_workload(replace(sheet, rows=tuple(known)))
    lines = [_rule(sheet, known, workloads)]
    for name, part in workloads:
        found = _by_card(part.rows) if part.rows[1:] else [_enough_for(part.rows[0])]
        lines += [f"{name}: {line}" for line in found] if workloads[1:] else found
    left_out = [row for row in rows if row not in known]
    if left_out:
        lines.append(f"Left out, as what it needs in all was not recorded: {job_list(left_out)}.")
    return lines


def pick(rows: Sequence[Row], card_gib: int) -> tuple[Row, list[Row]] | None:
    """Return the fastest row that fits, and those that are as fast and need more; None if none fits.

    Rows whose times cannot be told apart from the fastest one's count as equally fast; the one that needs least wins.
    """
    fitting = [row for row in rows if _needed(row) <= card_gib * GIB]
    if not fitting:
        return None
    fastest = min(fitting, key=_seconds)
    equal = sorted((row for row in fitting if row is fastest or not _is_slower(row, fastest)), key=_needed)
    return equal[0], equal[1:]


def _rule(sheet: Sheet, rows: Sequence[Row], workloads: Sequence[tuple[str, Sheet]]) -> str:
    gpus = word_list(list(dict.fromkeys(row.records[0].environment.get("gpu") or "a GPU" for row in rows)))
    verb = "Measured" if sheet.mode == "measure" else "Estimated"
    which = "each workload by itself" if workloads[1:] else "this workload"
    rule = (
        f"{verb} for {which} on {gpus}; on another card the time differs. A configuration fits if the most that "
        "its process held of the device, context and libraries included (process_used; else reserved + outside "
        "allocator), is at most the card's GiB of 2**30 bytes, with nothing kept in reserve."
    )
    if len(workloads) == len(rows):  # nothing to choose from
        return rule
    return (
        f"{rule} Fastest is the shortest total; times within {NOISE_PCT:g} % of each other, within what the steps of "
        "one run differ by, or within the spread of repeats, are equal, and then the least memory wins."
    )


def _by_card(rows: Sequence[Row]) -> list[str]:
    """Return a line for each run of neighbouring sizes with the same answer."""
    answers = [(size, _answer(rows, size)) for size in CARDS_GIB]
    return [
        f"{word_list([str(size) for size, _ in sizes])} GiB: {words}"
        for words, sizes in ((words, list(group)) for words, group in groupby(answers, key=lambda pair: pair[1]))
    ]


def _enough_for(row: Row) -> str:
    """Return what the only configuration of a workload needs, and which cards have that."""
    too_small = [size for size in CARDS_GIB if size * GIB < _needed(row)]
    enough = [size for size in CARDS_GIB if size not in too_small]
    cards = [f"{enough[0]} GiB are enough"] if enough else []
    cards += [f"{too_small[-1]} GiB are not{'' if enough else ' enough'}"] if too_small else []
    return (
        f"Job {row.number} ({row.label}) needs {format_bytes(_needed(row))}: {', '.join(cards)}; "
        f"{format_seconds(_seconds(row))} in total."
    )


def _answer(rows: Sequence[Row], card_gib: int) -> str:
    found = pick(rows, card_gib)
    if found is None:
        least = min(rows, key=_needed)
        return f"nothing that was measured fits; the least, job {least.number}, needs {format_bytes(_needed(least))}."
    row, equal = found
    numbers = word_list([str(one.number) for one in sorted(equal, key=lambda one: one.number)])
    also = f"; {'jobs' if equal[1:] else 'job'} {numbers} {'are' if equal[1:] else 'is'} as fast" if equal else ""
    no_less = f" and {'need' if equal[1:] else 'needs'} no less" if equal else ""
    return (
        f"{job_list([row])}, {format_seconds(_seconds(row))} in total, needs {format_bytes(_needed(row))}"
        f"{also}{no_less}."
    )


def _is_slower(row: Row, fastest: Row) -> bool:
    new, old = row.spread(TOTAL_SECONDS), fastest.spread(TOTAL_SECONDS)
    return new is not None and old is not None and differ(new, old)


def _needed(row: Row) -> float:
    return row.needed_bytes() or 0.0


def _seconds(row: Row) -> float:
    return row.value(TOTAL_SECONDS) or 0.0
