"""scripts/planner_table.py: rows and commands, from answers made up."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from wan_sweep.store import write_json
from wan_sweep.units import GIB

CARD, WORKLOAD = "RTX4060-8GB", "t2v-14B-720p"


def choice(needed_gib: float, seconds: float, **knobs: Any) -> dict[str, Any]:
    num_bytes = int(needed_gib * GIB)
    return {
        "knobs": knobs,
        "needed_bytes": num_bytes,
        "allocated_bytes": num_bytes - GIB // 2,
        "pinned_bytes": 0,
        "least_seconds": seconds,
        "limited_by": "denoise needs most, so much",
    }


ANSWER = {
    "best": choice(7.5, 100, offload=True, resident_gib=3.0),
    "others": [choice(7.2, 101, offload=True, resident_gib=2.5)],
    "refused": [
        choice(40, 90),
        choice(9.7, 99, offload=True, resident_gib=4.0),
        choice(7.9, 99, offload=True, resident_gib=3.5),  # into the card, and not into what is kept free of it
        choice(8.4, 99, offload=True, resident_gib=3.8),  # live tensors would fit
        choice(9, 120, offload=True, load_strategy="part"),  # slower
    ],
}


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("planner_table")


def test_what_must_not_fit_is_the_smallest_no_slower_whose_tensors_are_more_than_the_card(script: ModuleType) -> None:
    fits, does_not = script.commands(CARD, WORKLOAD, ANSWER)
    assert "offload=true resident_gib=3 " in fits
    assert "offload=true resident_gib=4 " in does_not
    for command in (fits, does_not):
        assert "model=t2v-14B 'size=1280*720' precision=bf16 kernels=fused" in command
        assert "memory_limit_gib=7.324" in command  # 8188 MiB without the context
        assert "sample_steps=2" in command


def test_an_answer_is_asked_once_and_nothing_is_an_answer_too(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def ask(job: object, *_: object, **__: object) -> dict[str, Any]:
        asked.append(job)
        return {"best": None, "others": [], "refused": []}

    monkeypatch.setattr(script, "ask", ask)
    write_json(tmp_path / f"{CARD}_{WORKLOAD}.json", ANSWER)
    found = {(CARD, load): script.answer(tmp_path, CARD, load) for load in (WORKLOAD, "t2v-14B-480p", "t2v-14B-480p")}
    assert len(asked) == 1
    first, runner_up, refused, second = script.table(found)[-4:]
    assert "| fastest | offload=true resident_gib=3 | 7.50 | denoise |" in first
    assert "| runner-up | offload=true resident_gib=2.5 | 7.20 |" in runner_up
    assert "| refused | offload=true resident_gib=3.5 | 7.90 |" in refused
    assert "| nothing |" in second
