"""A device that holds tensors without memory: CUDA where torch can be led to believe in it, else a second meta device.

FakeTensorMode asks torch for a device guard of CUDA. A build with CUDA and no visible GPU has one that does nothing. A
build for CPUs has none; a throw-away guard is registered there, which torch, when FakeTensorMode asks it to, replaces
by its own one that does nothing. Where that cannot be done, a meta device plays the GPU.
"""

import ctypes
import sys
from pathlib import Path

import torch

from wan_sweep.errors import SweepError

STAND_IN = torch.device("meta", 1)
"""Not the plain meta device, on which modules are built before they get their weights."""

_CUDA_INDEX = 1  # of DeviceType, which torch numbers for good
_NUM_DEVICE_TYPES = 20
_NUM_VIRTUAL_METHODS = 64  # more than the guard's interface has
_LIBRARIES = {"linux": "libc10.so", "darwin": "libc10.dylib"}
_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
_REGISTER = "_ZN3c104impl19registerDeviceGuardENS_10DeviceTypeEPKNS0_24DeviceGuardImplInterfaceE"

_registered: list[object] = []  # what torch may point to until the process ends


class GuardError(SweepError):
    """This build of torch takes no guard from outside."""


def fake_device() -> torch.device:
    """The device to run on, inside FakeTensorMode."""
    try:
        ensure_cuda_guard()
    except GuardError:
        return STAND_IN
    return torch.device("cuda", 0)


def ensure_cuda_guard() -> None:
    """Makes fake CUDA tensors usable in this process, which must not use a real GPU afterwards.

    Raises:
        GuardError: it cannot be done with this build or on this system.
    """
    is_cuda_build = torch.version.cuda is not None
    if is_cuda_build or _registered:
        torch._C._ensureCUDADeviceGuardSet()  # noqa: SLF001
        return
    path = Path(torch.__file__).parent / "lib" / _LIBRARIES.get(sys.platform, "")
    try:
        library = ctypes.CDLL(str(path))
        registry = (ctypes.c_void_p * _NUM_DEVICE_TYPES).in_dll(library, _REGISTRY)
        register = getattr(library, _REGISTER)
    except (OSError, ValueError, AttributeError) as error:
        raise GuardError(f"{path} shows no registry of device guards: {error}") from error
    # An object whose every method returns 0: zero devices is what torch asks for before it puts its own guard in place.
    method = ctypes.CFUNCTYPE(ctypes.c_int64)(lambda: 0)
    address = ctypes.cast(method, ctypes.c_void_p).value
    methods = (ctypes.c_void_p * _NUM_VIRTUAL_METHODS)(*[address] * _NUM_VIRTUAL_METHODS)
    guard = (ctypes.c_void_p * 2)(ctypes.addressof(methods), 0)
    _registered.extend((method, methods, guard))
    register.argtypes = (ctypes.c_int8, ctypes.c_void_p)
    register.restype = None
    register(_CUDA_INDEX, ctypes.addressof(guard))
    torch._C._ensureCUDADeviceGuardSet()  # noqa: SLF001
    if registry[_CUDA_INDEX] == ctypes.addressof(guard):
        raise GuardError(f"torch {torch.__version__} did not put its own guard in place of the one registered")
