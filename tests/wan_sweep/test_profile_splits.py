"""scripts/profile_splits.py: where the time of a made-up trace went."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("profile_splits")


def test_messages_count_as_exposed_only_where_nothing_else_runs(script: ModuleType) -> None:
    def kernel(name: str, start: float, end: float) -> dict[str, object]:
        return {"cat": "kernel", "name": name, "ts": start * 1e6, "dur": (end - start) * 1e6}

    events = [
        kernel("nvjet_tst_128x256", 0, 4),
        kernel("ncclDevKernel_SendRecv", 1, 3),  # hidden
        kernel("ncclDevKernel_SendRecv", 3.5, 6),  # two seconds of it alone
        kernel("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 7, 9),  # after a second of nothing
        kernel("vectorized_elementwise_kernel", 9, 10),
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 2e7},
    ]
    found = script.account(events, 1)
    assert found.pop("top") == [{"name": "ncclDevKernel_SendRecv", "calls": 2, "seconds": pytest.approx(4.5)}]
    assert found == pytest.approx(
        {
            "span_s": 10,
            "idle_s": 1,
            "num_kernels": 5,
            "messages_s": 4.5,
            "prompt_s": 0,
            "attention_s": 2,
            "products_s": 4,
            "ours_s": 0,
            "copies_s": 0,
            "rest_s": 1,
            "exposed_messages_s": 2,
        }
    )


def test_every_preset_of_several_gpus_is_a_split(script: ModuleType, repository: Path) -> None:
    assert {path.stem for path in (repository / "conf/parallel").glob("*.yaml")} == set(script.SPLITS)
