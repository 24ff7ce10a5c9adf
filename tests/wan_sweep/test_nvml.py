import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from wan_sweep.environment import read_machine
from wan_sweep.nvml import GpuProcess, ProcessMemory, problem, read_gpu_states
from wan_sweep.units import MIB

Answers = dict[str, Any]


def process(pid: int, used: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


def ask(told: Answers, key: str) -> Callable[..., Any]:
    def answer(*arguments: object) -> Any:
        if key not in told:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return told[key]

    return answer


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """One H100 whose answers a test may change before it asks; a missing one is "not supported"."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    told: Answers = {
        "DeviceGetName": "NVIDIA H100",
        "DeviceGetMemoryInfo": SimpleNamespace(total=80 * 1024 * MIB, used=700 * MIB),
        "DeviceGetComputeRunningProcesses": [process(os.getpid(), 600 * MIB)],
        "DeviceGetGraphicsRunningProcesses": [],
        "DeviceGetComputeMode": 3,
        "DeviceGetMigMode": [0, 0],
        "DeviceGetEccMode": [1, 1],
        "DeviceGetPersistenceMode": 0,
        "DeviceGetCurrentClocksThrottleReasons": pynvml.nvmlClocksThrottleReasonGpuIdle,
        "DeviceGetTemperature": 31,
        "DeviceGetClockInfo": 345,
        "DeviceGetMaxClockInfo": 1980,
        "DeviceGetEnforcedPowerLimit": 700_000,
        "DeviceGetPowerManagementDefaultLimit": 700_000,
        "SystemGetDriverVersion": "580.159.04",
        "SystemGetCudaDriverVersion_v2": 13000,
        "SystemGetCudaDriverVersion": 12080,
    }
    for name in dir(pynvml):
        if name.startswith(("nvmlDeviceGet", "nvmlDeviceIs", "nvmlSystemGet")):
            monkeypatch.setattr(pynvml, name, ask(told, name.removeprefix("nvml")))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, name, lambda: None)
    return told


def test_the_state_of_a_gpu_is_what_the_driver_tells(answers: Answers) -> None:
    (state,) = read_gpu_states()
    assert (state.index, state.allocated_bytes) == (0, 700 * MIB)
    assert (state.compute_mode, state.is_split, state.has_ecc, state.is_persistent) == (
        "exclusive_process",
        False,
        True,
        False,
    )
    assert (state.sm_clock_mhz, state.max_sm_clock_mhz, state.temperature_c) == (345, 1980, 31)
    assert (state.power_limit_mw, state.default_power_limit_mw, state.slowdowns) == (700_000, 700_000, ())


def test_what_the_driver_does_not_tell_is_none_and_no_zero(answers: Answers) -> None:
    answers.clear()
    (state,) = read_gpu_states()
    assert (state.allocated_bytes, state.temperature_c, state.power_limit_mw, state.has_ecc) == (None,) * 4
    assert (state.compute_mode, state.processes, state.is_split) == (None, (), False)


def test_a_process_that_computes_and_draws_is_listed_once(answers: Answers) -> None:
    nobody = max(psutil.pids()) + 1_000_000
    answers["DeviceGetGraphicsRunningProcesses"] = [process(os.getpid(), None), process(nobody, 5)]
    (state,) = read_gpu_states()
    assert state.processes == (
        GpuProcess(pid=os.getpid(), name=psutil.Process().name(), used_bytes=600 * MIB),
        GpuProcess(pid=nobody, name="", used_bytes=5),
    )


def test_slowdowns_are_named_and_idling_is_none(answers: Answers) -> None:
    answers["DeviceGetCurrentClocksThrottleReasons"] = (
        pynvml.nvmlClocksThrottleReasonSwThermalSlowdown
        | pynvml.nvmlClocksThrottleReasonSwPowerCap
        | pynvml.nvmlClocksThrottleReasonGpuIdle
    )
    assert read_gpu_states()[0].slowdowns == ("temperature", "power limit")


@pytest.mark.parametrize("change", [{"DeviceGetMigMode": [1, 1]}, {"DeviceIsMigDeviceHandle": 1}])
def test_a_split_gpu_and_a_part_of_one_are_split(change: Answers, answers: Answers) -> None:
    answers |= change
    assert read_gpu_states()[0].is_split


@pytest.mark.parametrize(
    ("without", "version"),
    [
        ([], "13.0"),
        (["SystemGetCudaDriverVersion_v2"], "12.8"),
        (["SystemGetCudaDriverVersion_v2", "SystemGetCudaDriverVersion"], ""),
    ],
)
def test_the_cuda_of_the_driver_is_that_of_its_library_first(
    without: list[str], version: str, answers: Answers
) -> None:
    for key in without:
        del answers[key]
    machine = read_machine()
    assert (machine.driver, machine.driver_cuda) == ("580.159.04", version)


@pytest.mark.parametrize(
    ("code", "is_a_problem"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, False),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, False),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, True),
    ],
)
def test_a_driver_that_does_not_answer_is_told_from_one_that_is_not_there(
    code: int, monkeypatch: pytest.MonkeyPatch, *, is_a_problem: bool
) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(code)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert is_a_problem == bool(problem())
    assert read_machine().driver_problem == problem()
    assert read_gpu_states() == ()


def test_the_memory_of_this_process_is_read_as_often_as_one_likes(answers: Answers) -> None:
    memory = ProcessMemory()
    assert memory.read() == 600 * MIB
    answers["DeviceGetComputeRunningProcesses"] = [process(1, 5), process(os.getpid(), 700 * MIB)]
    assert memory.read() == 700 * MIB
    memory.close()
    assert memory.read() is None


@pytest.mark.parametrize("listed", [[], [process(1, 5)], [process(os.getpid(), None)], None])
def test_memory_that_the_driver_does_not_attribute_is_unknown(listed: list[Any] | None, answers: Answers) -> None:
    if listed is None:
        del answers["DeviceGetComputeRunningProcesses"]
    else:
        answers["DeviceGetComputeRunningProcesses"] = listed
    memory = ProcessMemory()
    assert memory.read() is None
    memory.close()


def test_nvml_stays_open_between_readings_and_is_closed_once(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: calls.append("open"))
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: calls.append("close"))
    memory = ProcessMemory(pid=1)
    memory.read()
    memory.read()
    assert calls == ["open"]
    memory.close()
    memory.close()
    assert calls == ["open", "close"]


def test_without_a_driver_the_memory_of_a_process_is_unknown() -> None:
    memory = ProcessMemory()
    if read_machine().gpus:
        pytest.skip("there is a driver here")
    assert memory.read() is None
    memory.close()
