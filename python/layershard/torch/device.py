# SPDX-License-Identifier: Apache-2.0
"""A torch device for the transport "callback": memory, one stream of its own, events. See layershard.callbacks.Device.

Knows torch's streams and allocator; nothing of collectives or layers. Nothing here waits for the device but allocate
and copies between host and device, which are outside passes.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
from typing import Any

import torch

from ..errors import NotSupported
from .memory import zeros_at


def host_bytes(address: int, count: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * count).from_address(address), dtype=torch.uint8)


class TorchDevice:
    """Streams are handles (torch.cuda.Stream.cuda_stream); the processor, for tests, has one, 0, on which all is done
    at once. Other devices are refused: without the handle of a stream there is no order."""

    def __init__(self, device: torch.device) -> None:
        if device.type not in ("cpu", "cuda"):
            raise NotSupported(f"layers are in host memory or on NVIDIA's GPUs, and cannot be on {device}")
        self.device = device
        self._torch: Any = torch.cpu if device.type == "cpu" else torch.cuda
        self._own: Any = self._torch.Stream() if device.type == "cpu" else self._torch.Stream(device)
        self.stream: int = 0 if device.type == "cpu" else self._own.cuda_stream
        self._streams: dict[int, Any] = {self.stream: self._own}
        # What was allocated: the beginnings in order, and the tensors with them. Replaced as a whole.
        self._blocks: tuple[list[int], list[torch.Tensor]] = ([], [])

    # ---- Memory ----

    def allocate(self, count: int, alignment: int) -> int:
        block = zeros_at(count, alignment, self.device)
        self._torch.synchronize(self.device)  # the zeros, and what had used the memory before
        places, blocks = self._blocks
        at = bisect.bisect(places, block.data_ptr())
        self._blocks = (
            [*places[:at], block.data_ptr(), *places[at:]],
            [*blocks[:at], block, *blocks[at:]],
        )
        return block.data_ptr()

    def release(self, address: int) -> None:
        places, blocks = self._blocks
        at = places.index(address)
        self._blocks = (places[:at] + places[at + 1 :], blocks[:at] + blocks[at + 1 :])

    def bytes_at(self, address: int, count: int) -> torch.Tensor:
        """Of what was allocated here; else of the host's memory."""
        places, blocks = self._blocks
        at = bisect.bisect(places, address) - 1
        if at < 0 or address - places[at] >= blocks[at].numel():
            return host_bytes(address, count)
        first = address - places[at]
        return blocks[at][first : first + count]

    def copy(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        into = self.bytes_at(to, (rows - 1) * to_pitch + width).as_strided((rows, width), (to_pitch, 1))
        given = self.bytes_at(source, (rows - 1) * source_pitch + width).as_strided((rows, width), (source_pitch, 1))
        with self.current(), torch.inference_mode(False):
            into.copy_(given, non_blocking=into.device == given.device)

    # ---- Order ----

    def current(self) -> Any:
        """A context in which what is enqueued goes to the stream of the collectives."""
        return contextlib.nullcontext() if self.device.type == "cpu" else self._torch.stream(self._own)

    def _stream(self, handle: int) -> Any:
        found = self._streams.get(handle)
        if found is None:
            found = (
                self._torch.ExternalStream(handle, device=self.device)
                if handle
                else self._torch.default_stream(self.device)
            )
            self._streams[handle] = found
        return found

    def record(self, event: Any, stream: int) -> Any:
        if event is None:
            event = self._torch.Event()
        event.record(self._stream(stream))
        return event

    def wait(self, stream: int, event: Any) -> None:
        event.wait(self._stream(stream))

    def query(self, event: Any) -> bool:
        return bool(event.query())

    def capturing(self, stream: int) -> bool:
        if self.device.type == "cpu":
            return False
        if torch._C._cuda_getCurrentRawStream(self.device.index) == stream:
            return torch.cuda.is_current_stream_capturing()
        with torch.cuda.stream(self._stream(stream)):
            return torch.cuda.is_current_stream_capturing()
