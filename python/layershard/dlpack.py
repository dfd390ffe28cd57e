# SPDX-License-Identifier: Apache-2.0
"""Memory of a series for other array libraries, by DLPack: numpy.from_dlpack, torch.from_dlpack, cupy, jax.

Knows DLPack's structures (versions 0 and 1) and that something must live as long as the memory is shown; needs no array
library. What is exported holds the series: its memory goes when the last array that shows it has gone. Bytes are not
ordered with any stream here: that is what wait is for.
"""

from __future__ import annotations

import atexit
import ctypes
import math
from ctypes import c_char_p, c_int, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p, py_object
from typing import Any

from ._handles import SeriesHandle
from .errors import Invalid, WrongState

_VERSION = (1, 0)
_READ_ONLY = 1  # flag
_NAMES = {False: b"dltensor", True: b"dltensor_versioned"}  # of a capsule; C keeps a pointer to them

_INT, _UINT, _FLOAT, _BFLOAT, _COMPLEX, _BOOL = 0, 1, 2, 4, 5, 6

# name: DLPack's code, bits, lanes. A name of torch or numpy; float4 comes as pairs.
_DATA_TYPES: dict[str, tuple[int, int, int]] = {
    **{f"int{bits}": (_INT, bits, 1) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": (_UINT, bits, 1) for bits in (8, 16, 32, 64)},
    **{f"float{bits}": (_FLOAT, bits, 1) for bits in (16, 32, 64)},
    **{f"complex{bits}": (_COMPLEX, bits, 1) for bits in (64, 128)},
    "bfloat16": (_BFLOAT, 16, 1),
    "bool": (_BOOL, 8, 1),
    "float8_e3m4": (7, 8, 1),
    "float8_e4m3": (8, 8, 1),
    "float8_e4m3b11fnuz": (9, 8, 1),
    "float8_e4m3fn": (10, 8, 1),
    "float8_e4m3fnuz": (11, 8, 1),
    "float8_e5m2": (12, 8, 1),
    "float8_e5m2fnuz": (13, 8, 1),
    "float8_e8m0fnu": (14, 8, 1),
    "float4_e2m1fn_x2": (17, 4, 2),
}


class _Device(ctypes.Structure):
    _fields_ = [("device_type", c_int32), ("device_id", c_int32)]


class _DataType(ctypes.Structure):
    _fields_ = [("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16)]


class _Array(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device", _Device),
        ("ndim", c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(c_int64)),
        ("strides", ctypes.POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


_DELETER = ctypes.CFUNCTYPE(None, c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = [("dl_tensor", _Array), ("manager_ctx", c_void_p), ("deleter", _DELETER)]


class _ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("manager_ctx", c_void_p),
        ("deleter", _DELETER),
        ("flags", c_uint64),
        ("dl_tensor", _Array),
    ]


# Prototypes of our own: those of ctypes.pythonapi are shared by everything in the process. A capsule under destruction
# must not become a Python object again, so there it is an address.
_DESTRUCTOR = ctypes.PYFUNCTYPE(None, c_void_p)
_capsule_new = ctypes.PYFUNCTYPE(py_object, c_void_p, c_char_p, _DESTRUCTOR)(("PyCapsule_New", ctypes.pythonapi))
_capsule_is_valid = ctypes.PYFUNCTYPE(c_int, c_void_p, c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_capsule_pointer = ctypes.PYFUNCTYPE(c_void_p, c_void_p, c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
_keep_for_ever = ctypes.PYFUNCTYPE(None, py_object)(("Py_IncRef", ctypes.pythonapi))

# Address of a managed structure: what must live until its consumer calls the deleter.
_exported: dict[int, _Export] = {}


class _Export:
    """One array that shows a view: the structures that its consumer reads, and its hold on the series."""

    def __init__(self, view: View, versioned: bool) -> None:
        n = len(view.shape)
        self._handle = view.handle
        self._dimensions = (c_int64 * (2 * n or 1))(*view.shape, *view.strides)
        self.managed = _ManagedVersioned(*_VERSION) if versioned else _Managed()
        self.managed.deleter = _deleter
        if versioned and view.read_only:
            self.managed.flags = _READ_ONLY
        array = self.managed.dl_tensor
        array.data = view.address
        array.device = _Device(*view.device)
        array.ndim = n
        array.dtype = _DataType(*view.dtype)
        array.shape = ctypes.cast(self._dimensions, ctypes.POINTER(c_int64))
        array.strides = ctypes.cast(ctypes.addressof(self._dimensions) + 8 * n, ctypes.POINTER(c_int64))
        self._handle.hold(self)

    def let_go(self) -> None:
        self._handle.let_go(self)


def _delete(address: int) -> None:
    """Called by the consumer, in any thread, once."""
    export = _exported.pop(address, None)
    if export is not None:
        export.let_go()


_deleter = _DELETER(_delete)


def _drop_capsule(capsule: int) -> None:
    """A capsule that no consumer took still has its first name, and is ours to delete."""
    for name in _NAMES.values():
        if _capsule_is_valid(capsule, name):
            _delete(_capsule_pointer(capsule, name))


_destructor = _DESTRUCTOR(_drop_capsule)


@atexit.register
def _leave_to_the_system() -> None:
    """Arrays may outlive the interpreter, which their deleter needs: the system frees what is left."""
    for export in list(_exported.values()):
        export.managed.deleter = _DELETER()
        _keep_for_ever(export)


def data_type(dtype: object) -> tuple[int, int, int]:
    """DLPack's code, bits and lanes of a name, or of a dtype of numpy or torch."""
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    found = _DATA_TYPES.get(str(name).rpartition(".")[2])
    if found is None:
        raise Invalid(f"dtype {dtype!r} is not known; known are {', '.join(_DATA_TYPES)}")
    return found


class View:
    """A tensor's memory, C-contiguous; made by Series.view. What is made from it keeps the series' memory alive."""

    def __init__(
        self,
        handle: SeriesHandle,
        address: int,
        shape: tuple[int, ...],
        dtype: tuple[int, int, int],
        device: tuple[int, int],
        read_only: bool,
    ) -> None:
        if any(extent < 0 for extent in shape):
            raise Invalid(f"shape {shape} has a negative extent")
        self.handle = handle
        self.address = address
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.read_only = read_only

    @property
    def nbytes(self) -> int:
        _, bits, lanes = self.dtype
        return math.prod(self.shape) * bits * lanes // 8

    @property
    def strides(self) -> tuple[int, ...]:
        """In elements."""
        return tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A capsule; a consumer of version 1 is told that the memory is read-only, an older one cannot be."""
        if dl_device is not None and tuple(dl_device) != self.device:
            raise BufferError(f"the memory is on device {self.device}; nothing here moves it to {tuple(dl_device)}")
        if copy:
            raise BufferError("a view is not copied here: copy the array that is made from it")
        if self.handle.closed:
            raise WrongState("the series of this view is closed", rank=self.handle.group.rank)
        versioned = max_version is not None and max_version[0] >= 1
        export = _Export(self, versioned)
        address = ctypes.addressof(export.managed)
        _exported[address] = export
        return _capsule_new(address, _NAMES[versioned], _destructor)
