"""What a table does not say by itself, in sentences that are computed from the records and nothing else."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from wan_sweep.record import Record
from wan_sweep.report.advice import TITLE as ADVICE_TITLE
from wan_sweep.report.advice import advice
from wan_sweep.report.bottleneck import bottlenecks, oom_contents
from wan_sweep.report.change import change_of, differ, noise_pct, noise_words
from wan_sweep.report.effects import effects
from wan_sweep.report.estimates import FITS_TITLE, SURE_TITLE, certainty, fits
from wan_sweep.report.fidelity import fidelity
from wan_sweep.report.ranks import TITLE as RANKS_TITLE
from wan_sweep.report.ranks import rank_lines
from wan_sweep.report.sheet import PEAK_ALLOCATED, TOTAL_SECONDS, Row, Sheet, Spread, job_list, word_list
from wan_sweep.report.workloads import by_workload, differing
from wan_sweep.units import format_bytes, format_seconds

# Closer than this, two peaks are named together.
_MEMORY_TIE_PCT = 0.5
_NOTABLE_FLUCTUATION_PCT = 3.0

CHECKS_TITLE = "Checks before the start"
_BOTTLENECKS_TITLE = "Where the peaks come from"
_FIDELITY_TITLE = "Fidelity"
_FOR_EACH_JOB = frozenset({_BOTTLENECKS_TITLE, RANKS_TITLE, _FIDELITY_TITLE, FITS_TITLE, SURE_TITLE})


@dataclass(frozen=True, kw_only=True)
class Section:
    """Sentences under a title.

    Args:
        title: empty for the first section of a report.
        lines: the sentences.
        may_be_cut: whether a terminal shows the first of many and leaves the others to the report.
    """

    title: str
    lines: tuple[str, ...]
    may_be_cut: bool = False


def sections(sheet: Sheet) -> list[Section]:
    """Return the findings of a sheet of one mode; those without anything to say are left out, but for the first."""
    found = [
        (FITS_TITLE, fits(sheet)),
        (_BOTTLENECKS_TITLE, bottlenecks(sheet)),
        (RANKS_TITLE, rank_lines(sheet)),
        (ADVICE_TITLE, advice(sheet)),
        ("What each knob changes", [effect.sentence() for effect in effects(sheet) if not effect.is_nothing]),
        ("Without effect", without_effect(sheet)),
        (_FIDELITY_TITLE, fidelity(sheet)),
        (SURE_TITLE, certainty(sheet)),
        ("Not measured here", unmeasured(sheet)),
        ("Warnings", warnings(sheet)),
        (CHECKS_TITLE, checks(sheet.records)),
    ]
    rest = [
        Section(title=title, lines=tuple(lines), may_be_cut=title in _FOR_EACH_JOB) for title, lines in found if lines
    ]
    return [Section(title="", lines=tuple(headline(sheet))), *rest]


def headline(sheet: Sheet) -> list[str]:
    """Return which jobs are references, and which ones of each workload are best by memory and by time."""
    measured = sheet.measured
    verb = "measured" if sheet.mode == "measure" else "estimated"
    if not measured:
        return [f"No job was {verb}, so there is nothing to compare."]
    if len(measured) == 1:
        return [f"One job was {verb}: {job_list(measured)}."]
    workloads = by_workload(sheet)
    compared = [(name, part) for name, part in workloads if part.rows[1:]]
    lines = _references(sheet, [part for _, part in compared], verb) if compared else []
    for name, part in compared:
        best = _best_ones(part)
        lines += best if len(workloads) == 1 else [f"{name}: {' '.join(best)}"]
    lines += _not_compared(measured, [part.rows[0] for _, part in workloads if not part.rows[1:]])
    if sheet.mode == "estimate":
        lines.append("Times are lower bounds: operations over the card's peak rate, bytes over its bandwidths.")
    return lines


def _references(sheet: Sheet, parts: list[Sheet], verb: str) -> list[str]:
    """Return the line on who is compared with whom."""
    changes = [change_of(sheet.step_metric, row, part.rows[0]) for part in parts for row in part.rows[1:]]
    noise = " ~ marks times that are not told from noise." if any(one and not one.is_clear for one in changes) else ""
    first = f"{'each ' if parts[1:] else ''}the first that was {verb}"
    of_what = " of those that generate the same" if len(sheet.measured) > len(parts[0].rows) else ""
    jobs = job_list([part.rows[0] for part in parts])
    return [f"* Reference for the differences: {jobs}, {first}{of_what}.{noise}"]


def _not_compared(measured: list[Row], alone: list[Row]) -> list[str]:
    """Return the line on jobs that generate something that no other job does."""
    if not alone:
        return []
    if len(alone) == len(measured):
        knobs = differing(measured)
        what = f"{word_list(knobs)} {'differ' if knobs[1:] else 'differs'}"
        return [f"Each job generates something else ({what}), so none is compared with another."]
    generate, compared = ("generate", "they are") if alone[1:] else ("generates", "it is")
    return [f"No other job generates what {job_list(alone)} {generate}, so {compared} not compared."]


def _best_ones(sheet: Sheet) -> list[str]:
    """Return who is best, in a sheet of one workload."""
    lines = []
    measured = sheet.measured
    least = _best(measured, PEAK_ALLOCATED, _are_peaks_apart)
    if least:
        peak = f"peak {format_bytes(least[0].value(PEAK_ALLOCATED) or 0)} allocated"
        lines.append(f"Least memory: {job_list(least[:1])}, {peak}{_ties(least, f'within {_MEMORY_TIE_PCT:g} %')}.")
    if sheet.mode == "estimate":  # whose times are no more than bounds
        return lines
    shortest = _best(measured, TOTAL_SECONDS, differ)
    if shortest:
        total = f"{format_seconds(shortest[0].value(TOTAL_SECONDS) or 0)} in total"
        lines.append(f"Shortest: {job_list(shortest[:1])}, {total}{_ties(shortest, _noise(shortest, TOTAL_SECONDS))}.")
    fastest = _best(measured, sheet.step_metric, differ)
    if fastest and fastest != shortest:
        step = f"{format_seconds(fastest[0].value(sheet.step_metric) or 0)} a step"
        lines.append(
            f"Fastest step: {job_list(fastest[:1])}, {step}{_ties(fastest, _noise(fastest, sheet.step_metric))}."
        )
    return lines


def unmeasured(sheet: Sheet) -> list[str]:
    """Return outcome and reason of each job without numbers of its own, and of those that took over older ones."""
    lines = [f"{_capital(job_list([row]))}{words}" for row in sheet.rows for words in unmeasured_row(row)]
    return lines + [f"A file cannot be read: {damage}" for damage in sheet.damaged]


def unmeasured_row(row: Row) -> list[str]:
    """Return outcome and reason of each run of a configuration that left no numbers of its own, and failed passes."""
    runs: dict[str, list[str]] = {}
    for record in row.records:
        words = []
        if record.outcome != "ok":
            reason = _one_line(record.reason) or "no reason was recorded"
            words.append(f"{record.outcome}: {reason}{_filled_by(row, record)}")
        # Running out of memory is what a pass may have to look into.
        words += [
            f"its {name} pass: {one['outcome']}: {_one_line(str(one.get('reason') or ''))}"
            for name, one in record.passes.items()
            if one["outcome"] not in {"ok", "oom"}
        ]
        for told in words:
            runs.setdefault(told, []).append(str(record.repeat + 1))
    has_repeats = len(row.records) > 1
    return [
        f", {'runs' if numbers[1:] else 'run'} {word_list(numbers)}: {told}" if has_repeats else f": {told}"
        for told, numbers in runs.items()
    ]


def warnings(sheet: Sheet) -> list[str]:
    """Return the warnings of the measurements with their advice, equal ones once."""
    said = _Once()
    for row in sheet.rows:
        for record in row.records:
            for words in record_warnings(record):
                said.add(row, words)
    return [f"{_capital(job_list(rows))}: {words}" for (words,), rows in said.rows.items()]


def record_warnings(record: Record) -> list[str]:
    """Return the warnings of one measurement with their advice."""
    return [_with_advice(warning) for warning in (*record.warnings, *_from_numbers(record))]


def without_effect(sheet: Sheet) -> list[str]:
    """Return the knobs that did nothing: declared by the jobs with the reason, and found in pairs of jobs."""
    said = _Once()
    declared = set()
    for row in sheet.rows:
        for record in row.records:
            for knob, reason in record.idle_knobs.items():
                declared.add((knob, row.number))
                said.add(row, knob, reason)
    found = [
        effect.sentence()
        for effect in effects(sheet)
        if effect.is_nothing and not all((effect.knob, row.number) in declared for row, _ in effect.pairs)
    ]
    return [
        f"{knob} changed nothing in {job_list(rows)}, because {reason}." for (knob, reason), rows in said.rows.items()
    ] + found


def checks(records: Iterable[Record]) -> list[str]:
    """Return what the checks before the sweep said: those with trouble in full, the others by name, each once."""
    told = checks_in_full(records)
    passed = list(dict.fromkeys(name for name, state, _ in told if state == "ok"))
    lines = [f"{name}: {state}: {words}" for name, state, words in told if state != "ok"]
    return lines + ([f"In order: {word_list(passed)}."] if passed else [])


def checks_in_full(records: Iterable[Record]) -> list[tuple[str, str, str]]:
    """Return name, state and words of each check, each once."""
    return list(
        dict.fromkeys((one["name"], one["state"], _with_advice(one)) for record in records for one in record.checks)
    )


class _Once:
    """Collects words, and for which rows they hold."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, ...], list[Row]] = {}

    def add(self, row: Row, *words: str) -> None:
        """Note that these words hold for a row, too."""
        rows = self.rows.setdefault(words, [])
        if row not in rows:
            rows.append(row)


def _from_numbers(record: Record) -> list[Mapping[str, str]]:
    """Return warnings that follow from a record's metrics and passes, unless the job itself has given them."""
    found: list[Mapping[str, str]] = []
    retries = record.metrics.get("memory/num_alloc_retries", 0)
    if retries > 0:
        times = "once" if retries == 1 else f"{retries:g} times"
        found.append(
            {
                "code": "alloc_retries",
                "text": f"the allocator ran into the card's limit {times}, gave memory back and tried again",
                "advice": "its reserved peak is capped by the card and not comparable with others, its time is longer",
            }
        )
    fluctuation = record.metrics.get("memory/fluctuation_pct", 0.0)
    if fluctuation > _NOTABLE_FLUCTUATION_PCT:
        found.append(
            {
                "code": "fluctuation",
                "text": f"the peaks of the steps after the first differ by {fluctuation:.1f} %",
                "advice": "steps do the same work, so see in steps.png whether something is kept from step to step",
            }
        )
    left_out = str(record.passes.get("trace", {}).get("stopped") or "")
    if left_out and record.passes["trace"]["outcome"] == "ok":
        found.append({"code": "trace_cut", "text": f"its trace does not hold all that it could: {left_out}"})
    given = {warning.get("code") for warning in record.warnings}
    return [warning for warning in found if warning["code"] not in given]


def _best(rows: list[Row], metric: str, are_apart: Callable[[Spread, Spread], bool]) -> list[Row]:
    """Return the row with the smallest value first, then those that are as good as it."""
    spreads = [(row, spread) for row in rows if (spread := row.spread(metric))]
    if not spreads:
        return []
    best, smallest = min(spreads, key=lambda pair: pair[1].middle)
    return [best, *(row for row, spread in spreads if row is not best and not are_apart(spread, smallest))]


def _are_peaks_apart(new: Spread, old: Spread) -> bool:
    return new.middle > old.middle * (1 + _MEMORY_TIE_PCT / 100)


def _noise(rows: list[Row], metric: str) -> str:
    if any(len(row.measured) > 1 for row in rows):
        return "as fast within the spread of repeats"
    return f"within {noise_words(noise_pct(*(spread for row in rows if (spread := row.spread(metric)))))}"


def _ties(rows: list[Row], how: str) -> str:
    """Return who is as good as the first of the rows."""
    if not rows[1:]:
        return ""
    numbers = [str(row.number) for row in rows[1:]]
    return f"; {'jobs' if rows[2:] else 'job'} {word_list(numbers)} {'are' if rows[2:] else 'is'} {how}"


def _filled_by(row: Row, record: Record) -> str:
    """Return what lay on the device when a job ran out of memory: by name if a pass looked into it, else weights."""
    if record.outcome == "oom" and row.attribution and row.attribution.oom:
        return f"; run again to look into it: {oom_contents(row.attribution.oom)}"
    residents = (record.failure or {}).get("resident_components_bytes")
    if not isinstance(residents, dict) or not residents:
        return ""
    parts = ", ".join(f"{part} {format_bytes(value)}" for part, value in residents.items())
    return f" (weights on the device then: {parts})"


def _with_advice(told: Mapping[str, str]) -> str:
    """Return text and advice of a warning or a check as sentences."""
    advised = f" {_capital(_sentence(told['advice']))}" if told.get("advice") else ""
    return f"{_sentence(told['text'])}{advised}"


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _sentence(words: str) -> str:
    found = _one_line(words)
    return found if found.endswith((".", "!", "?")) else f"{found}."


def _one_line(words: str) -> str:
    return " ".join(words.split())
