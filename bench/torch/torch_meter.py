# SPDX-License-Identifier: Apache-2.0
"""Clock and power of a GPU, as the driver tells them.

Knows NVML; nothing of what runs meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch


class _Field(ctypes.Structure):  # nvmlFieldValue_t
    _fields_ = [("id", ctypes.c_uint), ("scope", ctypes.c_uint), ("timestamp", ctypes.c_longlong)]
    _fields_ += [("latency", ctypes.c_longlong), ("type", ctypes.c_int), ("result", ctypes.c_int)]
    _fields_ += [("value", ctypes.c_ulonglong)]


_CLOCK_SM, _POWER_NOW = 1, 186
_REASONS = {0x1: "idle", 0x2: "set clocks", 0x4: "power cap", 0x8: "hardware", 0x20: "thermal", 0x40: "thermal"}


class Meter:
    """Clock and power of one GPU, read every few milliseconds while `reading` lasts; nothing where there is no NVML."""

    INTERVAL_S = 0.005

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        self._handle = ctypes.c_void_p()
        self.driver = ""
        self.bus = ""
        if device.type != "cuda":
            return
        found = torch.cuda.get_device_properties(device)
        if not hasattr(found, "pci_domain_id"):  # an older torch
            return
        self.bus = f"{found.pci_domain_id:08x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
        try:
            nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByPciBusId_v2(self.bus.encode(), ctypes.byref(self._handle)):
            return
        text = ctypes.create_string_buffer(96)
        if nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0:
            self.driver = text.value.decode()
        self._nvml = nvml

    def _mhz(self) -> float | None:
        value = ctypes.c_uint()
        return None if self._nvml.nvmlDeviceGetClockInfo(self._handle, _CLOCK_SM, ctypes.byref(value)) else value.value

    def _watts(self) -> float | None:
        """What is drawn now, where the driver tells that: the other figure is the mean of the last second."""
        field, power = _Field(id=_POWER_NOW), ctypes.c_uint()
        if self._nvml.nvmlDeviceGetFieldValues(self._handle, 1, ctypes.byref(field)) == 0 and field.result == 0:
            return (field.value & 0xFFFFFFFF) / 1e3
        return None if self._nvml.nvmlDeviceGetPowerUsage(self._handle, ctypes.byref(power)) else power.value / 1e3

    def _throttled(self) -> int:
        reasons = ctypes.c_ulonglong()
        self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle, ctypes.byref(reasons))
        return reasons.value

    def _watch(self, readings: list[tuple[float | None, float | None, int]], stop: threading.Event) -> None:
        while True:
            readings.append((self._mhz(), self._watts(), self._throttled()))
            if stop.wait(self.INTERVAL_S):
                return

    @contextlib.contextmanager
    def reading(self, into: dict[str, Any]) -> Iterator[None]:
        """Puts sm_mhz and watts (medians) and throttled (all reasons seen) into @into at the end."""
        if self._nvml is None:
            yield
            return
        readings: list[tuple[float | None, float | None, int]] = []
        stop = threading.Event()
        thread = threading.Thread(target=self._watch, args=(readings, stop))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        for index, name in enumerate(("sm_mhz", "watts")):
            values = [reading[index] for reading in readings if reading[index] is not None]
            if values:
                into[name] = statistics.median(values)
        seen = {name for bit, name in _REASONS.items() if any(reading[2] & bit for reading in readings)}
        into["throttled"] = ", ".join(sorted(seen)) or "none"


def mean_of(readings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of all ranks' meters."""
    found: dict[str, Any] = {}
    for name in ("sm_mhz", "watts"):
        values = [reading[name] for reading in readings if name in reading]
        if values:
            found[name] = statistics.mean(values)
    reasons = {part for reading in readings for part in reading.get("throttled", "").split(", ") if part}
    if reasons:
        found["throttled"] = ", ".join(sorted(reasons - {"none"})) or "none"
    return found
