# SPDX-License-Identifier: Apache-2.0
"""The public headers in ctypes' words: structures, enumerations, and one table of functions.

Knows nothing but callbacks.h, layershard.h and plan.h in include/layershard; tests/python/test_declarations.py holds
both sides together. A plain table, because generated bindings would need a generator wherever the package is built.
"""

from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, POINTER, c_char, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any

VERSION = (0, 1, 0)

STATUS = {
    "OK": 0,
    "IN_PROGRESS": 1,
    "ERR_INVALID": -1,
    "ERR_RANGE": -2,
    "ERR_NO_MEMORY": -3,
    "ERR_NOT_SUPPORTED": -4,
    "ERR_STATE": -5,
    "ERR_BUSY": -6,
    "ERR_TIMEOUT": -7,
    "ERR_ABORTED": -8,
    "ERR_PEER_FAILED": -9,
    "ERR_TRANSPORT": -10,
    "ERR_MISMATCH": -11,
    "ERR_OUT_OF_STEP": -12,
    "ERR_NOT_PERIODIC": -13,
    "ERR_CORRUPT": -14,
    "ERR_CALLBACK": -15,
    "ERR_SYSTEM": -16,
}
LOG_LEVEL = {"error": 0, "warn": 1, "info": 2, "debug": 3}
MEMORY = {"host": 1, "cuda": 2}
PLACEMENT = {"whole": 0, "striped": 1}
POISON = {"off": 0, "ready": 1, "on": 2}
PURPOSE = {"shard": 1, "windows": 2}
LARGE_PAGES = {"auto": 0, "never": 1, "require": 2}
REJOIN = {"auto": 0, "never": 1, "allow": 2}
NUMA = {"auto": 0, "none": 1, "interleave": 2, "source": 3, "copy": 4}
STRIPE = {"bytes": 0, "rows": 1, "columns": 2}
BELOW_K_NAMED = 16

Status = c_int  # an enum
ALLOCATE = CFUNCTYPE(c_void_p, c_void_p, c_size_t)
RELEASE = CFUNCTYPE(None, c_void_p, c_void_p)
ALLOCATE_FOR = CFUNCTYPE(c_void_p, c_void_p, c_int, c_size_t, c_size_t)
RELEASE_FOR = CFUNCTYPE(None, c_void_p, c_int, c_void_p)
ALLGATHER = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_size_t)
BROADCAST = CFUNCTYPE(Status, c_void_p, c_void_p, c_size_t, c_int32, POINTER(c_void_p), c_void_p, c_size_t)
ALLGATHER_START = CFUNCTYPE(Status, c_void_p, c_void_p, c_void_p, c_size_t, POINTER(c_void_p), c_void_p, c_size_t)
FINISH = CFUNCTYPE(Status, c_void_p, c_void_p, c_uint32, c_void_p, c_size_t)
STOP = CFUNCTYPE(None, c_void_p)
DEVICE_ALLOCATE = CFUNCTYPE(c_void_p, c_void_p, c_size_t, c_size_t)
RECORD = CFUNCTYPE(Status, c_void_p, POINTER(c_void_p), c_void_p, c_void_p, c_size_t)
WAIT_EVENT = CFUNCTYPE(Status, c_void_p, c_void_p, c_void_p, c_void_p, c_size_t)
QUERY = CFUNCTYPE(Status, c_void_p, c_void_p, c_void_p, c_size_t)
COPY = CFUNCTYPE(Status, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_size_t, c_size_t, c_void_p, c_size_t)
CAPTURING = CFUNCTYPE(c_int, c_void_p, c_void_p)
LOG = CFUNCTYPE(None, c_void_p, c_int, c_char_p)
POST_PROCESS = CFUNCTYPE(c_int, c_void_p, c_uint32, POINTER(c_void_p))


class Sized(ctypes.Structure):
    """A structure whose first member is its size, so that a library may have a longer one."""

    def __init__(self, **members: Any) -> None:
        super().__init__(struct_size=ctypes.sizeof(self), **members)


class Allocator(Sized):
    _fields_ = [("struct_size", c_size_t), ("allocate", ALLOCATE), ("release", RELEASE), ("user", c_void_p)]


class MemorySource(Sized):
    _fields_ = [("struct_size", c_size_t), ("allocate", ALLOCATE_FOR), ("release", RELEASE_FOR), ("user", c_void_p)]


class Bootstrap(Sized):
    _fields_ = [("struct_size", c_size_t), ("allgather", ALLGATHER), ("user", c_void_p)]


class DeviceCallbacks(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("stream", c_void_p),
        ("allocate", DEVICE_ALLOCATE),
        ("release", RELEASE),
        ("record", RECORD),
        ("wait", WAIT_EVENT),
        ("query", QUERY),
        ("drop", RELEASE),
        ("copy", COPY),
        ("capturing", CAPTURING),
    ]


class Callbacks(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("broadcast", BROADCAST),
        ("allgather", ALLGATHER_START),
        ("finish", FINISH),
        ("stop", STOP),
        ("user", c_void_p),
        ("device", POINTER(DeviceCallbacks)),
        ("roll_calls", c_int32),
    ]


class GroupOptions(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("rank", c_int32),
        ("size", c_int32),
        ("transport", c_char_p),
        ("custom_transport", c_void_p),
        ("job", c_char_p),
        ("timeout_ms", c_uint32),
        ("memory", c_int),
        ("device", c_int32),
        ("bootstrap", POINTER(Bootstrap)),
        ("allocator", POINTER(Allocator)),
        ("log", LOG),
        ("log_user", c_void_p),
        ("log_level", c_int),
        ("error", c_void_p),
        ("error_bytes", c_size_t),
        ("callbacks", POINTER(Callbacks)),
        ("large_pages", c_int),
        ("numa", c_int),
        ("rejoin", c_int),
    ]

    def __init__(self, **members: Any) -> None:
        defaults = {"rank": -1, "size": -1, "memory": MEMORY["host"], "log_level": LOG_LEVEL["info"]}
        super().__init__(**{**defaults, **members})


class TensorDescription(ctypes.Structure):
    _fields_ = [
        ("name", c_char_p),
        ("bytes", c_uint64),
        ("alignment", c_uint32),
        ("stripe", c_int),
        ("rows", c_uint64),
        ("column_bytes", c_uint32),
    ]


class PoisonPattern(ctypes.Structure):
    _fields_ = [("pattern", c_void_p), ("bytes", c_uint32)]


class SeriesOptions(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("name", c_char_p),
        ("first_layer", c_uint32),
        ("layer_count", c_uint32),
        ("tensors", POINTER(TensorDescription)),
        ("tensor_struct_size", c_size_t),
        ("tensor_count", c_uint32),
        ("prefetch", c_uint32),
        ("placement", c_int),
        ("resident_bytes", c_uint64),
        ("memory_source", POINTER(MemorySource)),
        ("poison", c_int),
        ("poison_patterns", POINTER(PoisonPattern)),
        ("poison_pattern_struct_size", c_size_t),
    ]

    def __init__(self, **members: Any) -> None:
        sizes = {
            "tensor_struct_size": ctypes.sizeof(TensorDescription),
            "poison_pattern_struct_size": ctypes.sizeof(PoisonPattern),
        }
        super().__init__(**{"prefetch": 1, **sizes, **members})


class Range(Sized):
    _fields_ = [("struct_size", c_size_t), ("begin", c_uint64), ("end", c_uint64), ("row_bytes", c_uint64)]


class StatsResult(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("layer_bytes", c_uint64),
        ("shard_bytes", c_uint64),
        ("window_bytes", c_uint64),
        ("resident_bytes", c_uint64),
        ("windows", c_uint32),
        ("residents", c_uint32),
        ("fetched_layers", c_uint32),
        ("below_k_count", c_uint32),
        ("below_k", c_uint32 * BELOW_K_NAMED),
        ("generation", c_uint64),
        ("reaches", c_uint64),
        ("waits", c_uint64),
        ("stalls", c_uint64),
        ("misses", c_uint64),
        ("fetches", c_uint64),
        ("fetched_bytes", c_uint64),
        ("blocked_ns", c_uint64),
        ("max_blocked_ns", c_uint64),
        ("link_busy_ns", c_uint64),
        ("numa_copy_bytes", c_uint64),
    ]


class PlanInput(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("rank", c_int32),
        ("size", c_int32),
        ("collective", c_int32),
        ("direct", c_int32),
        ("granule_bytes", c_uint64),
        ("compute_ns", c_uint64),
        ("link_bytes_per_s", c_uint64),
        ("large_page_bytes", c_uint64),
    ]

    def __init__(self, **members: Any) -> None:
        super().__init__(**{"size": 1, **members})


class PlanResult(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("layer_bytes", c_uint64),
        ("replicated_bytes", c_uint64),
        ("shard_bytes", c_uint64),
        ("window_bytes", c_uint64),
        ("resident_bytes", c_uint64),
        ("windows", c_uint32),
        ("residents", c_uint32),
        ("fetched_layers", c_uint32),
        ("shortest_distance", c_uint32),
        ("below_k_count", c_uint32),
        ("below_k", c_uint32 * BELOW_K_NAMED),
        ("pass_ns", c_uint64),
        ("exposed_ns", c_uint64),
        ("transfer_ns", c_uint64),
        ("captured_pass_ns", c_uint64),
    ]


class TransportDescription(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("name", c_char_p),
        ("summary", c_char_p),
        ("available", c_int),
        ("reason", c_char * 160),
        ("collective", c_int),
        ("caller_memory", c_int),
        ("memory", c_int),
    ]

    def __init__(self, **members: Any) -> None:
        super().__init__(**{"memory": MEMORY["host"], **members})


class VariableDescription(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("name", c_char_p),
        ("value", c_char_p),
        ("default_value", c_char_p),
        ("help", c_char_p),
    ]


class NodeDescription(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("number", c_int32),
        ("usable", c_int),
        ("here", c_int),
        ("memory_bytes", c_uint64),
        ("free_bytes", c_uint64),
        ("processors", c_char * 128),
    ]


class DiscoveredDescription(Sized):
    _fields_ = [
        ("struct_size", c_size_t),
        ("rank", c_int32),
        ("size", c_int32),
        ("local_rank", c_int32),
        ("source", c_char_p),
        ("job", c_char * 256),
    ]


# The header's name of each structure.
STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "lshard_allocator": Allocator,
    "lshard_memory_source": MemorySource,
    "lshard_bootstrap": Bootstrap,
    "lshard_device_callbacks": DeviceCallbacks,
    "lshard_callbacks": Callbacks,
    "lshard_group_options": GroupOptions,
    "lshard_tensor": TensorDescription,
    "lshard_poison_pattern": PoisonPattern,
    "lshard_series_options": SeriesOptions,
    "lshard_range": Range,
    "lshard_stats": StatsResult,
    "lshard_plan_input": PlanInput,
    "lshard_plan_result": PlanResult,
    "lshard_transport_information": TransportDescription,
    "lshard_variable": VariableDescription,
    "lshard_node": NodeDescription,
    "lshard_discovered": DiscoveredDescription,
}

GROUP = c_void_p  # lshard_group *
SERIES = c_void_p  # lshard_series *
ADDRESS = POINTER(c_void_p)  # void **

# name: (what it returns, what it takes)
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "lshard_status_name": (c_char_p, [Status]),
    "lshard_status_text": (c_char_p, [Status]),
    "lshard_status_remedy": (c_char_p, [Status]),
    "lshard_version": (c_char_p, []),
    "lshard_group_create": (Status, [POINTER(GroupOptions), POINTER(GROUP)]),
    "lshard_group_flush": (Status, [GROUP]),
    "lshard_group_destroy": (Status, [GROUP]),
    "lshard_group_abort": (None, [GROUP]),
    "lshard_group_rank": (c_int32, [GROUP]),
    "lshard_group_size": (c_int32, [GROUP]),
    "lshard_group_transport": (c_char_p, [GROUP]),
    "lshard_group_returned": (c_int, [GROUP]),
    "lshard_group_error": (c_char_p, [GROUP]),
    "lshard_series_create": (Status, [GROUP, POINTER(SeriesOptions), POINTER(SERIES)]),
    "lshard_series_destroy": (Status, [SERIES]),
    "lshard_series_is_filled": (c_int, [SERIES]),
    "lshard_series_is_source": (c_int, [SERIES, c_uint32]),
    "lshard_series_address": (Status, [SERIES, c_uint32, c_uint32, ADDRESS]),
    "lshard_series_storage": (Status, [SERIES, c_uint32, c_uint32, ADDRESS]),
    "lshard_series_stripe": (Status, [SERIES, c_uint32, c_uint32, ADDRESS, POINTER(Range)]),
    "lshard_series_commit": (Status, [SERIES, POST_PROCESS, c_void_p]),
    "lshard_reach": (Status, [SERIES, c_uint32, c_void_p]),
    "lshard_wait": (Status, [SERIES, c_uint32, c_void_p]),
    "lshard_release": (Status, [SERIES, c_uint32, c_void_p]),
    "lshard_series_prepare": (Status, [SERIES, c_void_p]),
    "lshard_series_join": (Status, [SERIES, c_void_p]),
    "lshard_series_rewind": (Status, [SERIES]),
    "lshard_series_poison": (Status, [SERIES, c_int, c_void_p]),
    "lshard_series_update_begin": (Status, [SERIES]),
    "lshard_series_update_end": (Status, [SERIES, POST_PROCESS, c_void_p]),
    "lshard_series_stats": (Status, [SERIES, POINTER(StatsResult)]),
    "lshard_series_error": (c_char_p, [SERIES]),
    "lshard_series_verify": (Status, [SERIES, POINTER(c_uint64)]),
    "lshard_plan": (Status, [POINTER(SeriesOptions), POINTER(PlanInput), POINTER(PlanResult)]),
    "lshard_transport_info": (Status, [c_uint32, POINTER(TransportDescription)]),
    "lshard_variable_info": (Status, [c_uint32, POINTER(VariableDescription)]),
    "lshard_node_info": (Status, [c_uint32, POINTER(NodeDescription)]),
    "lshard_discover": (Status, [POINTER(DiscoveredDescription), c_void_p, c_size_t]),
}
