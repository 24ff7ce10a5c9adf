"""What an analysis says, as values: the terminal, the JSON file and the pictures all show the same ones.

An analysis has sections; a section has facts and tables. What a file does not hold is a section with `missing`, never
a number that is zero. Keys of bytes end in `_bytes` and keys of seconds in `_seconds`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from wan_sweep.analyze.panels import Panel

ANALYSIS_SCHEMA_VERSION = 1

Unit = Literal["text", "count", "bytes", "seconds", "percent", "bytes_per_second"]
Value = str | int | float | None


def _check(value: Value, unit: Unit) -> None:
    """Values come from files, which can hold anything."""
    is_number = isinstance(value, int | float) and math.isfinite(value)
    if value is not None and not is_number and not (isinstance(value, str) and unit == "text"):
        raise ValueError(f"{value!r} cannot be shown as {unit}")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One number or text with its name.

    Raises:
        ValueError: the value does not go with the unit.
    """

    key: str
    label: str
    value: Value
    unit: Unit = "text"

    def __post_init__(self) -> None:
        _check(self.value, self.unit)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table.

    Attributes:
        rank: How important it is; a narrow terminal leaves out those with the lowest rank first.
    """

    key: str
    title: str
    unit: Unit = "text"
    rank: int = 5


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of values, the most important first.

    Attributes:
        num_rows: How many there were before the rest was left out.
    """

    key: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[tuple[Value, ...]]
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class Section:
    """One subject.

    Attributes:
        missing: Why there is nothing to say, and how to record it.
        notes: How the numbers were got, where that is not evident.
    """

    key: str
    title: str
    missing: str = ""
    facts: Sequence[Fact] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """All that a file says.

    Attributes:
        headline: The few sentences that matter most.
        warnings: Each with code, text and advice.
        panels: Parts of the picture.
    """

    kind: str
    title: str
    path: str
    headline: Sequence[str]
    sections: Sequence[Section]
    warnings: Sequence[Mapping[str, str]] = field(default=())
    panels: Sequence[Panel] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """As it is written to a file."""
        return {
            "schema_version": ANALYSIS_SCHEMA_VERSION,
            "kind": self.kind,
            "path": self.path,
            "headline": list(self.headline),
            "sections": {section.key: _section_json(section) for section in self.sections},
            "warnings": [dict(warning) for warning in self.warnings],
        }


def _section_json(section: Section) -> dict[str, Any]:
    return {
        "title": section.title,
        "missing": section.missing,
        "notes": list(section.notes),
        "facts": {fact.key: fact.value for fact in section.facts},
        "tables": {
            table.key: {
                "num_rows": table.num_rows,
                "rows": [dict(zip((c.key for c in table.columns), row, strict=True)) for row in table.rows],
            }
            for table in section.tables
        },
    }


def warning(code: str, text: str, advice: str) -> Mapping[str, str]:
    """Why a number may not hold, and what to do."""
    return {"code": code, "text": text, "advice": advice}


def top_table(key: str, title: str, columns: Sequence[Column], rows: Sequence[tuple[Value, ...]], *, top: int) -> Table:
    """A table of the first rows of sorted ones; columns in which nothing is known are left out.

    Raises:
        ValueError: a value does not go with the unit of its column.
    """
    for row in rows[:top]:
        for value, column in zip(row, columns, strict=True):
            _check(value, column.unit)
    known = [index for index in range(len(columns)) if any(row[index] is not None for row in rows)]
    return Table(
        key=key,
        title=title,
        columns=[columns[index] for index in known],
        rows=[tuple(row[index] for index in known) for row in rows[:top]],
        num_rows=len(rows),
    )
