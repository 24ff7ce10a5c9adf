"""What a reader has to know of estimates: what fits, on which card, and how much of each peak is a guess."""

from collections.abc import Mapping
from typing import Any

from wan_sweep.cards import CARDS
from wan_sweep.report.sheet import Row, Sheet, job_list, word_list
from wan_sweep.units import format_bytes, gib

FITS_TITLE = "What fits"
SURE_TITLE = "How sure the estimates are"
OUTCOME_WORDS = {"ok": "fits", "oom": "does not fit"}
"""What the outcomes of estimates are called in tables."""

_BASIS_WORDS = {"exact": "exact", "rule": "by rule", "table": "from a table", "guess": "guessed"}


def fits(sheet: Sheet) -> list[str]:
    """Return, for each card, which jobs fit, and the smallest card of those known that would do for each job."""
    rows = [row for row in sheet.measured if row.records[0].estimate]
    lines = []
    for name in dict.fromkeys(str(_told(row)["card"]) for row in rows):
        there = [row for row in rows if _told(row)["card"] == name]
        lines.append(_on_card(name, there))
    return lines + [words for row in rows if (words := _smallest_card(row))]


def certainty(sheet: Sheet) -> list[str]:
    """Return, for each job, how many percent of its peak come from where, and up to where the peak may go."""
    return [words for row in sheet.measured if (words := _certainty(row))]


def _told(row: Row) -> Mapping[str, Any]:
    return row.measured[0].estimate or {}


def _on_card(name: str, rows: list[Row]) -> str:
    fitting = [row for row in rows if row.records[0].outcome != "oom"]
    size = format_bytes(_told(rows[0])["card_bytes"])
    if len(fitting) == len(rows):
        return f"On the {name} ({size}) {'every job fits' if rows[1:] else 'the job fits'}."
    others = word_list(
        [f"{row.number} (needs {format_bytes(row.needed_bytes() or 0)})" for row in rows if row not in fitting]
    )
    which = f"{job_list(fitting)} {'fit' if fitting[1:] else 'fits'}" if fitting else "nothing fits"
    return f"On the {name} ({size}) {which}; not job{'s' if len(rows) - len(fitting) > 1 else ''} {others}."


def _smallest_card(row: Row) -> str:
    needed = row.needed_bytes()
    if needed is None:
        return ""
    large_enough = [card for card in CARDS.values() if card.device_bytes >= needed]
    smallest = min(large_enough, key=lambda card: card.device_bytes, default=None)
    named = (
        f"the smallest known card with that much is the {smallest.name}" if smallest else "no known card has that much"
    )
    return f"Job {row.number} ({row.label}) needs {format_bytes(needed)} of the device, context included; {named}."


def _certainty(row: Row) -> str:
    confidence = _told(row).get("confidence", {})
    if not confidence:
        return ""
    phase, one = max(confidence.items(), key=lambda pair: pair[1]["allocated_bytes"])
    peak = one["allocated_bytes"]
    shares = [
        f"{100 * num_bytes / peak:.3g} % {_BASIS_WORDS[basis]}"
        for basis, num_bytes in one["by_basis_bytes"].items()
        if num_bytes
    ]
    words = f"Job {row.number} ({row.label}): of the peak in {phase} {word_list(shares)}"
    most = max((other["at_most_bytes"] for other in confidence.values()), default=peak)
    if most > peak:
        words += f"; with kernels that nobody measured between {gib(peak):.2f} and {format_bytes(most)}"
    return f"{words}."
