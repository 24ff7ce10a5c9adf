"""Reasons that a person can act on, from what torch says."""

import errno

import pytest
import torch

from wan_sweep.measure.failure import explain, request_bytes

CUDA = (
    "CUDA out of memory. Tried to allocate 878.00 MiB. GPU 0 has a total capacity of 79.18 GiB of which 70.50 GiB is "
    "free. Including non-PyTorch memory, this process has 8.67 GiB memory in use."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "26542080 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("message", "expected"),
    [(CUDA, 878 * 2**20), (CPU, 26_542_080), ("Tried to allocate 1.50 GiB.", 3 * 2**29), ("no figure", None)],
)
def test_the_size_of_the_request_is_read_from_the_message(message: str, expected: int | None) -> None:
    assert request_bytes(message) == expected


def test_out_of_memory_says_where_how_much_and_the_limit() -> None:
    where = {"phase": "denoise", "step": 2, "num_steps": 50, "allocated_bytes": 5 * 2**30}
    told = explain(torch.OutOfMemoryError(CUDA), where, 8 * 2**30)
    assert told["outcome"] == "oom"
    assert told["reason"] == (
        "out of memory in denoise, step 3 of 50: 878.0 MiB more were asked for with 5.00 GiB allocated "
        "and a limit of 8.00 GiB"
    )
    assert told["failure"]["request_bytes"] == 878 * 2**20


def test_memory_of_the_host_counts_too() -> None:
    assert explain(RuntimeError(CPU), {"phase": "load", "component": "t5"}, None)["reason"].startswith(
        "out of memory in load, t5: 25.3 MiB more were asked for"
    )
    assert explain(MemoryError(), None, None)["reason"] == "out of memory"
    assert explain(OSError(errno.ENOMEM, "Cannot allocate memory"), None, None)["outcome"] == "oom"


@pytest.mark.parametrize(
    "message", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"]
)
def test_libraries_run_out_of_memory_in_their_own_words(message: str) -> None:
    assert explain(RuntimeError(message), None, None)["outcome"] == "oom"


def test_a_kernel_that_gets_no_memory_under_a_limit_is_out_of_memory_and_a_failure_without_one() -> None:
    error = RuntimeError("could not create a primitive")
    assert explain(error, None, 2**29)["outcome"] == "oom"
    assert explain(error, None, None)["outcome"] == "failed"


def test_anything_else_is_a_failure_with_its_first_line() -> None:
    told = explain(RuntimeError("could not create a primitive\nat line 3"), {"phase": "decode"}, None)
    assert told["outcome"] == "failed"
    assert told["reason"] == "RuntimeError in decode: could not create a primitive"
