import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from wan_sweep import environment
from wan_sweep.environment import (
    Gpu,
    Machine,
    code_version,
    describe,
    device_used_bytes,
    fingerprint,
    host_available_bytes,
    read_machine,
    torch_build,
    version_numbers,
)

H100 = Gpu(name="NVIDIA H100", total_bytes=80 * 2**30, used_bytes=2**30)


class MadeUpNvml:
    """Two GPUs, as NVML's binding shows them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("nvmlInit", "nvmlShutdown"):
            monkeypatch.setattr(pynvml, name, lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", self._by_index)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", self._by_uuid)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: f"GPU {handle}")
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", lambda _: (9, 0))
        monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "580.1")
        monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda handle: [object()] * handle)
        monkeypatch.setattr(
            pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(total=100, used=10 + handle)
        )

    def _by_index(self, index: int) -> int:
        if index not in {0, 1}:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return index

    def _by_uuid(self, uuid: str) -> int:
        if uuid != "GPU-b":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return 1


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    MadeUpNvml(monkeypatch)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["GPU 0", "GPU 1"]),
        ("", []),
        ("-1", []),
        ("1", ["GPU 1"]),
        ("1,0", ["GPU 1", "GPU 0"]),
        ("GPU-b", ["GPU 1"]),
        ("0,7,1", ["GPU 0"]),
    ],
)
def test_gpus_are_those_that_cuda_would_see(
    visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert names == [gpu.name for gpu in read_machine().gpus]


@pytest.mark.usefixtures("two_gpus")
def test_used_memory_is_told_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_used_bytes() == [10, 11]


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert read_machine().gpus == ()
    assert read_machine().driver_problem == ""
    assert device_used_bytes() == []


def test_a_cpu_build_of_torch_uses_no_gpu() -> None:
    assert Machine(gpus=(H100,), torch_version="2.13.0+cpu").num_gpus == 0
    assert Machine(gpus=(H100,), torch_version="2.13.0+cu130").num_gpus == 1


@pytest.mark.parametrize(("torch_cuda", "num_gpus"), [("13.0", 1), ("", 0)])
def test_what_torch_is_built_for_is_believed_before_its_version(torch_cuda: str, num_gpus: int) -> None:
    assert Machine(gpus=(H100,), torch_version="2.13.0", torch_cuda=torch_cuda).num_gpus == num_gpus


@pytest.mark.parametrize(
    ("source", "build"),
    [
        ("__version__ = '2.11.0+cu130'\ndebug = False\ncuda: Optional[str] = '13.0'\n", ("2.11.0+cu130", "13.0")),
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip = '7.0'\n", ("2.13.0+cpu", "")),
        ('__version__ = "2.6.0a0+git12"\ncuda = "12.6"\n', ("2.6.0a0+git12", "12.6")),
        ("__version__ = '2.6.0'\n", ("2.6.0", None)),
    ],
)
def test_torch_tells_its_build_without_being_imported(
    source: str, build: tuple[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(source)
    monkeypatch.setattr(environment, "package_folder", lambda _: tmp_path)
    assert torch_build() == build


def test_a_torch_that_is_not_there_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Path:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(environment, "package_folder", missing)
    monkeypatch.setattr(environment, "package_version", lambda _: "")
    assert torch_build() == ("", None)


@pytest.mark.parametrize(
    ("version", "numbers"), [("2.13.0+cu130", (2, 13, 0)), ("2.6.0a0+git12", (2, 6, 0)), ("13.0", (13, 0)), ("", ())]
)
def test_the_numbers_of_a_version_are_its_leading_ones(version: str, numbers: tuple[int, ...]) -> None:
    assert version_numbers(version) == numbers


@pytest.mark.parametrize(
    ("limit", "used", "folder"),
    [("memory.max", "memory.current", "."), ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory")],
)
def test_available_memory_is_within_the_limit_of_the_container(
    limit: str, used: str, folder: str, tmp_path: Path
) -> None:
    group = tmp_path / "sys/fs/cgroup" / folder
    group.mkdir(parents=True)
    (group / used).write_text("5000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 3000\n")
    (group / limit).write_text("8000\n")
    assert host_available_bytes(tmp_path) == 8000 - 5000 + 3000
    (group / limit).write_text("max\n")
    assert host_available_bytes(tmp_path) > 2**20


def test_the_environment_is_flat_text_without_gaps() -> None:
    values = describe(Machine(gpus=(H100,), driver="580.1", torch_version="2.13.0"))
    assert all(isinstance(value, str) and value for value in values.values())
    assert {"gpu", "driver", "torch", "python", "platform", "cpu", "ram_bytes", "fingerprint"} <= set(values)


@pytest.mark.parametrize(
    ("change", "is_same"),
    [({"host": "b"}, True), ({"git_commit": "b"}, True), ({"gpu": "A100"}, False), ({"torch": "2.14"}, False)],
)
def test_the_fingerprint_follows_what_numbers_depend_on(change: Mapping[str, str], *, is_same: bool) -> None:
    before = {"host": "a", "gpu": "H100", "torch": "2.13", "git_commit": "a"}
    assert is_same == (fingerprint(before) == fingerprint({**before, **change}))


def test_the_code_version_follows_measuring_code_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wan21/a.py", "wan_sweep/worker.py", "wan_sweep/report/plot.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(environment, "package_folder", lambda name: tmp_path / name)

    def version() -> Any:
        code_version.cache_clear()
        return code_version()

    first = version()
    (tmp_path / "wan_sweep/report/plot.py").write_text("2")
    assert first == version()
    (tmp_path / "wan_sweep/worker.py").write_text("2")
    assert first != version()
    code_version.cache_clear()


def test_the_parent_imports_neither_torch_nor_matplotlib(child_environment: dict[str, str]) -> None:
    code = (
        "import sys, wan_sweep.cli, wan_sweep.environment as e; e.describe(e.read_machine()); e.code_version();"
        "print(sorted({'torch', 'matplotlib', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
