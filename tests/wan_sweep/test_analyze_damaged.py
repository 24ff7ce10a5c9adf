"""Files in which anything may stand in the place of anything: analyzed or refused, but never a traceback."""

import io
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.wan_sweep.made_up_traces import gpu_events
from tests.wan_sweep.test_analyze_run_files import document, made_up_run, peak
from tests.wan_sweep.test_analyze_snapshot import from_the_start
from wan_sweep.analyze import UnreadableFileError, analyze
from wan_sweep.analyze.finding import Analysis, Column, Section, Table
from wan_sweep.analyze.terminal import print_analysis

ANYTHING = (None, -1, 0, 1, 1e300, float("inf"), float("nan"), 2**80, "x", "", [], {}, [1], {"a": 1}, True)
SHARES = (0.003, 0.01, 0.03, 0.1)


def damaged(value: Any, chance: random.Random, share: float) -> Any:
    """The value with parts of it replaced or left out."""
    if chance.random() < share:
        return chance.choice(ANYTHING)
    if isinstance(value, dict):
        return {key: damaged(one, chance, share) for key, one in value.items() if chance.random() > share / 3}
    if isinstance(value, list):
        return [damaged(one, chance, share) for one in value]
    return value


def contents() -> dict[str, tuple[dict[str, Any], float]]:
    """An undamaged file of each kind, and how much of it is damaged: the larger, the less."""
    attribution = {"peaks": [peak("run", "denoise", 20)], "oom": peak("oom", "decode", 5, request_bytes=3)}
    return {
        "trace": ({"traceEvents": gpu_events(), "deviceProperties": [{"name": "H100"}]}, 1.0),
        "snapshot": (from_the_start(), 0.3),
        "memory events": (document(made_up_run()), 0.1),
        "attribution": ({"schema_version": 1, **attribution}, 1.0),
    }


@pytest.mark.parametrize("kind", contents())
def test_damage_anywhere_is_analyzed_or_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    whole, factor = contents()[kind]
    num_analyzed = 0
    for seed in range(60):
        chance = random.Random(seed)
        content = damaged(whole, chance, SHARES[seed % 4] * factor)
        path.write_bytes(pickle.dumps(content) if kind == "snapshot" else json.dumps(content).encode())
        try:
            found = analyze(path)
        except UnreadableFileError:
            continue
        json.dumps(found.to_json(), allow_nan=False)
        print_analysis(found, Console(file=io.StringIO(), width=90))
        num_analyzed += 1
    assert num_analyzed > 0


@pytest.mark.parametrize(("width", "told"), [(80, "1.0 MiB"), (20, "not enough room for rare; --json has them")])
def test_columns_without_room_are_named_below_the_table(width: int, told: str) -> None:
    columns = [Column(key="often", title="often", rank=9), Column(key="rare", title="rare", unit="bytes", rank=1)]
    table = Table(key="sizes", title="", columns=columns, rows=[("a kernel's name", 2**20)], num_rows=1)
    section = Section(key="one", title="One", tables=[table])
    console = Console(file=io.StringIO(), width=width)
    print_analysis(Analysis(kind="trace", title="t", path="p", headline=[], sections=[section]), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a kernel's name" in shown
    assert " ".join(shown.partition("a kernel's name")[2].split()) == told
