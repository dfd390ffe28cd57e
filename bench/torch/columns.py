#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How fast column stripes come, and by which copies: on two GPUs over their link, on one inside it.

    bench/torch/columns.py [--devices 0,1] [--rounds 7] [--save columns.json]

A rank keeps its columns of a matrix as a dense matrix of their own, so a fetch reads one run and writes rows of a
window that lie a whole row apart: a 2-D copy whose destination alone is pitched. Beside it: the same bytes as one run
(what a stripe of rows is), the pitch on the other side and on both, rows split over several streams, one run into a
staging buffer and from there to the rows inside the GPU (by the driver's copy or a kernel), and a kernel that reads the
peer itself. Each way is checked once. All ways are timed in shuffled rounds, by events; medians are told.

Then the same while matrices are multiplied on the reading GPU (needs torch): how fast, and by how much the products
take longer. Inside one GPU copies are made by kernels of the driver's, not by engines: that says what unpacking costs,
and nothing of the link. Knows the driver's interface alone; --save needs layershard and torch. Less than a minute.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import statistics
import sys
from collections.abc import Callable
from typing import Any

# What a row has: bytes of the matrix's whole row; the stripe is a half. Of a 70B Llama's shape in bfloat16.
MATRICES = {"o_proj": (8192, 16384), "down_proj": (8192, 57344)}

COPY_ROWS = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry copy_rows(
.param .u64 p0, .param .u32 p1, .param .u64 p2, .param .u32 p3, .param .u32 p4, .param .u32 p5)
{
.reg .pred %p<2>;
.reg .u32 %r<20>;
.reg .u64 %d<10>;
ld.param.u64 %d0, [p0];
ld.param.u32 %r0, [p1];
ld.param.u64 %d1, [p2];
ld.param.u32 %r1, [p3];
ld.param.u32 %r2, [p4];
ld.param.u32 %r3, [p5];
mov.u32 %r4, %ctaid.x;
mov.u32 %r5, %ntid.x;
mov.u32 %r6, %tid.x;
mad.lo.u32 %r7, %r4, %r5, %r6;
mov.u32 %r8, %nctaid.x;
mul.lo.u32 %r9, %r8, %r5;
WORD:
setp.ge.u32 %p0, %r7, %r3;
@%p0 bra DONE;
div.u32 %r10, %r7, %r2;
rem.u32 %r11, %r7, %r2;
shl.b32 %r11, %r11, 4;
cvt.u64.u32 %d2, %r11;
mad.wide.u32 %d3, %r10, %r1, %d2;
mad.wide.u32 %d4, %r10, %r0, %d2;
add.u64 %d3, %d3, %d1;
add.u64 %d4, %d4, %d0;
ld.global.v4.u32 {%r12, %r13, %r14, %r15}, [%d3];
st.global.v4.u32 [%d4], {%r12, %r13, %r14, %r15};
add.u32 %r7, %r7, %r9;
bra WORD;
DONE:
ret;
}
"""

THREADS, SLICE = 1024, 16 << 20
PRODUCTS, PRODUCTS_S = 120, 0.05  # products of 2048 x 8192 and 8192 x 8192, and about how long they take


class Copy2D(ctypes.Structure):
    _fields_ = [("from_x", ctypes.c_size_t), ("from_y", ctypes.c_size_t), ("from_kind", ctypes.c_int)]
    _fields_ += [("from_host", ctypes.c_void_p), ("source", ctypes.c_uint64), ("from_array", ctypes.c_void_p)]
    _fields_ += [("from_pitch", ctypes.c_size_t), ("to_x", ctypes.c_size_t), ("to_y", ctypes.c_size_t)]
    _fields_ += [("to_kind", ctypes.c_int), ("to_host", ctypes.c_void_p), ("to", ctypes.c_uint64)]
    _fields_ += [("to_array", ctypes.c_void_p), ("to_pitch", ctypes.c_size_t), ("width", ctypes.c_size_t)]
    _fields_ += [("rows", ctypes.c_size_t)]


UNIFIED = 4


class Driver:
    """The calls, each of which ends the program where it fails."""

    def __init__(self) -> None:
        try:
            self.library = ctypes.CDLL(os.environ.get("LAYERSHARD_CUDA_SO_PATH") or "libcuda.so.1")
        except OSError as error:
            sys.exit(f"there is no NVIDIA driver: {error}")
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            sys.exit(f"{name}: error {code} of the driver")

    def made(self, name: str, *arguments: Any, kind: Any = ctypes.c_void_p) -> Any:
        """What a call writes to its first argument."""
        found = kind()
        self.call(name, ctypes.byref(found), *arguments)
        return found


class Gpu:
    """One device's primary context; current only while it is entered."""

    def __init__(self, driver: Driver, ordinal: int) -> None:
        self.driver, self.ordinal = driver, ordinal
        self.device = driver.made("cuDeviceGet", ordinal, kind=ctypes.c_int)
        self.context = driver.made("cuDevicePrimaryCtxRetain", self.device)
        name = ctypes.create_string_buffer(96)
        driver.call("cuDeviceGetName", name, len(name), self.device)
        self.name = name.value.decode()

    def __enter__(self) -> Gpu:
        self.driver.call("cuCtxPushCurrent_v2", self.context)
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.made("cuCtxPopCurrent_v2")

    def memory(self, size: int) -> int:
        with self:
            found = self.driver.made("cuMemAlloc_v2", ctypes.c_size_t(size), kind=ctypes.c_uint64)
        return int(found.value)


class Reader:
    """Streams and copies of the GPU that reads."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.driver = gpu, gpu.driver
        with gpu:
            self.streams = [self.driver.made("cuStreamCreateWithPriority", 1, 0) for _ in range(5)]
            self.events = [self.driver.made("cuEventCreate", 0) for _ in range(64)]
            self.kernel = self._kernel()

    def _kernel(self) -> Any:
        """None where the driver takes no such text (a stub)."""
        module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
        if self.driver.library.cuModuleLoadData(ctypes.byref(module), COPY_ROWS):
            return None
        found = self.driver.library.cuModuleGetFunction(ctypes.byref(kernel), module, b"copy_rows")
        return None if found else kernel

    def run(self, stream: Any, to: int, source: int, size: int) -> None:
        at = ctypes.c_uint64(to), ctypes.c_uint64(source)
        self.driver.call("cuMemcpyAsync", *at, ctypes.c_size_t(size), stream)

    def rows(self, stream: Any, to: tuple[int, int], source: tuple[int, int], width: int, rows: int) -> None:
        """`to` and `source`: address and pitch."""
        copy = Copy2D(from_kind=UNIFIED, source=source[0], from_pitch=source[1])
        copy.to_kind, copy.to, copy.to_pitch, copy.width, copy.rows = UNIFIED, to[0], to[1], width, rows
        self.driver.call("cuMemcpy2DAsync_v2", ctypes.byref(copy), stream)

    def launch(
        self, blocks: int, stream: Any, to: tuple[int, int], source: tuple[int, int], width: int, rows: int
    ) -> None:
        words = width // 16
        values = [ctypes.c_uint64(to[0]), ctypes.c_uint32(to[1]), ctypes.c_uint64(source[0])]
        values += [ctypes.c_uint32(source[1]), ctypes.c_uint32(words), ctypes.c_uint32(words * rows)]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        shape = (blocks, 1, 1, THREADS, 1, 1, 0)
        self.driver.call("cuLaunchKernel", self.kernel, *shape, stream, places, None)

    def follow(self, stream: Any, other: Any, event: Any) -> None:
        self.driver.call("cuEventRecord", event, other)
        self.driver.call("cuStreamWaitEvent", stream, event, 0)

    def finish(self) -> None:
        for stream in self.streams:
            self.driver.call("cuStreamSynchronize", stream)

    def timed(self, way: Callable[[], None], times: int) -> float:
        """Seconds of one."""
        begin, end = self.events[:2]
        self.driver.call("cuEventRecord", begin, self.streams[0])
        for _ in range(times):
            way()
        self.driver.call("cuEventRecord", end, self.streams[0])
        self.finish()
        return float(self.driver.made("cuEventElapsedTime", begin, end, kind=ctypes.c_float).value) / 1e3 / times


class Stripe:
    """One matrix's: memory on both sides, and the ways to bring it."""

    def __init__(self, reader: Reader, source: Gpu, rows: int, row_bytes: int) -> None:
        self.reader, self.n_rows, self.pitch, self.width = reader, rows, row_bytes, row_bytes // 2
        self.bytes = rows * self.width
        self.dense = source.memory(self.bytes)
        self.matrix = source.memory(rows * row_bytes)
        self.window = reader.gpu.memory(rows * row_bytes)
        self.staging = reader.gpu.memory(self.bytes)

    def free(self) -> None:
        for address in (self.dense, self.matrix, self.window, self.staging):
            self.reader.driver.call("cuMemFree_v2", ctypes.c_uint64(address))

    def one_run(self) -> None:
        self.reader.run(self.reader.streams[0], self.staging, self.dense, self.bytes)

    def pitched_destination(self) -> None:
        self.part(self.reader.streams[0], 0, self.n_rows)

    def pitched_source(self) -> None:
        to, source = (self.staging, self.width), (self.matrix, self.pitch)
        self.reader.rows(self.reader.streams[0], to, source, self.width, self.n_rows)

    def pitched_both(self) -> None:
        to, source = (self.window, self.pitch), (self.matrix, self.pitch)
        self.reader.rows(self.reader.streams[0], to, source, self.width, self.n_rows)

    def part(self, stream: Any, first: int, rows: int) -> None:
        to = (self.window + first * self.pitch, self.pitch)
        self.reader.rows(stream, to, (self.dense + first * self.width, self.width), self.width, rows)

    def split(self, streams: int, size: int | None = None) -> Callable[[], None]:
        """Rows over so many streams, each stream's in slices of `size` bytes."""

        def go() -> None:
            reader = self.reader
            slices = self.slices(size or self.bytes // streams)
            for i in range(1, streams):
                reader.follow(reader.streams[i], reader.streams[0], reader.events[2])
            for number, (first, rows) in enumerate(slices):
                self.part(reader.streams[number % streams], first, rows)
            for i in range(1, streams):
                reader.follow(reader.streams[0], reader.streams[i], reader.events[2 + i])

        return go

    def slices(self, size: int) -> list[tuple[int, int]]:
        rows = max(1, size // self.width)
        return [(first, min(rows, self.n_rows - first)) for first in range(0, self.n_rows, rows)]

    def unpack(self, blocks: int, stream: Any, first: int = 0, rows: int | None = None) -> None:
        """From the staging buffer to the window: by the driver's copy (0), or a kernel of so many blocks."""
        to, source = (self.window + first * self.pitch, self.pitch), (self.staging + first * self.width, self.width)
        count = self.n_rows if rows is None else rows
        if blocks:
            self.reader.launch(blocks, stream, to, source, self.width, count)
        else:
            self.reader.rows(stream, to, source, self.width, count)

    def staged(self, blocks: int) -> Callable[[], None]:
        def go() -> None:
            reader = self.reader
            come, placed = reader.streams[:2]
            reader.follow(placed, come, reader.events[2])
            for number, (first, rows) in enumerate(self.slices(SLICE)):
                at = first * self.width
                reader.run(come, self.staging + at, self.dense + at, rows * self.width)
                reader.follow(placed, come, reader.events[3 + number])
                self.unpack(blocks, placed, first, rows)
            reader.follow(come, placed, reader.events[2])

        return go

    def kernel(self, blocks: int) -> Callable[[], None]:
        to, source = (self.window, self.pitch), (self.dense, self.width)
        return lambda: self.reader.launch(blocks, self.reader.streams[0], to, source, self.width, self.n_rows)

    def ways(self) -> dict[str, Callable[[], None]]:
        found: dict[str, Callable[[], None]] = {
            "one run": self.one_run,
            "pitched destination": self.pitched_destination,
            "pitched source": self.pitched_source,
            "both pitched": self.pitched_both,
            "pitched destination, slices of 16 MiB": self.split(1, SLICE),
            "pitched destination, 2 streams": self.split(2),
            "pitched destination, 3 streams": self.split(3),
            "pitched destination, 4 streams": self.split(4),
            "pitched destination, 2 streams, slices of 16 MiB": self.split(2, SLICE),
            "staged, unpacked by the driver": self.staged(0),
            "only unpacked by the driver": lambda: self.unpack(0, self.reader.streams[0]),
        }
        if self.reader.kernel:
            for blocks in (8, 16, 32):
                found[f"staged, unpacked by {blocks} blocks"] = self.staged(blocks)
                found[f"only unpacked by {blocks} blocks"] = lambda n=blocks: self.unpack(n, self.reader.streams[0])
            for blocks in (16, 32, 132):
                found[f"a kernel of {blocks} blocks reads the source"] = self.kernel(blocks)
        return found

    # ---- right bytes ----

    def fill(self) -> None:
        reader, count = self.reader, self.n_rows * self.pitch
        noise = ctypes.create_string_buffer(random.Random(1).randbytes(min(count, 1 << 20)), min(count, 1 << 20))
        for address, size in ((self.dense, self.bytes), (self.matrix, count)):
            for at in range(0, size, len(noise)):
                reader.run(reader.streams[0], address + at, ctypes.addressof(noise), min(len(noise), size - at))
        reader.finish()

    def read(self, address: int, size: int) -> bytes:
        found = ctypes.create_string_buffer(size)
        self.reader.run(self.reader.streams[0], ctypes.addressof(found), address, size)
        self.reader.finish()
        return found.raw

    def soil(self) -> None:
        """What a way before has brought is no longer there."""
        stream = self.reader.streams[0]
        self.reader.run(stream, self.window, self.matrix + 16, self.n_rows * self.pitch - 16)
        self.reader.run(stream, self.staging, self.matrix + 16, self.bytes - 16)
        self.reader.finish()

    def check(self, name: str, way: Callable[[], None]) -> None:
        if name.startswith("only"):  # of what another has staged
            return
        self.soil()
        way()
        self.reader.finish()
        rows, width = min(self.n_rows, 512), self.width
        from_matrix, into_window = name in ("pitched source", "both pitched"), name not in ("one run", "pitched source")
        source, pitch = (self.matrix, self.pitch) if from_matrix else (self.dense, width)
        to, step = (self.window, self.pitch) if into_window else (self.staging, width)
        for first in (0, self.n_rows - rows):
            want, got = self.read(source + first * pitch, rows * pitch), self.read(to + first * step, rows * step)
            for row in range(rows):
                if got[row * step : row * step + width] != want[row * pitch : row * pitch + width]:
                    sys.exit(f"{name}: wrong bytes in row {first + row}")


def measure(stripe: Stripe, rounds: int) -> dict[str, float]:
    """GB/s, the median of the rounds."""
    ways, seconds = stripe.ways(), {name: [] for name in stripe.ways()}  # type: dict[str, Any], dict[str, list[float]]
    for name, way in ways.items():
        stripe.check(name, way)
        stripe.reader.timed(way, 2)
    shuffled = random.Random(2)
    for _ in range(rounds):
        for name in shuffled.sample(list(ways), len(ways)):
            seconds[name].append(stripe.reader.timed(ways[name], 5))
    return {name: stripe.bytes / statistics.median(found) / 1e9 for name, found in seconds.items()}


def tell(title: str, found: dict[str, float]) -> None:
    bare = found["one run"]
    print(f"{title}, GB/s and part of one run's")
    for name, speed in found.items():
        print(f"  {name:50} {speed:8.1f} {speed / bare:6.2f}")


# ---- beside products ------------------------------------------------------------------------------------------------


def beside_products(stripe: Stripe, ordinal: int, rounds: int, speeds: dict[str, float]) -> dict[str, dict[str, float]]:
    """Per way: GB/s, and how much longer the products take, for about as long as they do. Nothing without torch."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    device = torch.device("cuda", ordinal)
    torch.cuda.set_device(device)  # whose context is current here
    left = torch.randn(2048, 8192, device=device, dtype=torch.bfloat16)
    right = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    compute = torch.cuda.Stream(device)
    ways = {name: way for name, way in stripe.ways().items() if not name.startswith("only")}
    chosen: list[str | None] = [None, *(name for name in ways if "source" not in name or "kernel" in name)]
    found: dict[str | None, list[tuple[float, float]]] = {name: [] for name in chosen}
    times = {name: max(1, round(PRODUCTS_S * speeds[name] * 1e9 / stripe.bytes)) for name in ways}

    def products(name: str | None) -> tuple[float, float]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(compute):
            begin.record()
            for _ in range(PRODUCTS):
                left @ right
            end.record()
        took = stripe.reader.timed(ways[name], times[name]) if name else 0.0
        end.synchronize()
        return begin.elapsed_time(end), took

    for name in chosen:
        products(name)
    shuffled = random.Random(3)
    for _ in range(rounds):
        for name in shuffled.sample(chosen, len(chosen)):
            found[name].append(products(name))
    alone = statistics.median(took for took, _ in found[None])
    return {
        name: {
            "GB/s": stripe.bytes / statistics.median(copy for _, copy in pairs) / 1e9,
            "products": statistics.median(took for took, _ in pairs) / alone,
            "lost ms per GB": (statistics.median(took for took, _ in pairs) - alone)
            / (stripe.bytes * times[name] / 1e9),
        }
        for name, pairs in found.items()
        if name
    }


def ordinals_of(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=ordinals_of, default="0", help="the GPU that reads, and its source")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, help="of the matrices; 8192")
    parser.add_argument("--save", metavar="FILE")
    options = parser.parse_args()
    if options.save:  # what cannot be saved is said before it is measured
        import torch_save

        torch_save.version()
    ordinals = options.devices
    driver = Driver()
    gpu = Gpu(driver, ordinals[0])
    source = Gpu(driver, ordinals[-1]) if ordinals[-1] != ordinals[0] else gpu
    print(f"{gpu.name} reads " + ("inside itself" if source is gpu else f"from {source.name}"))
    result: dict[str, Any] = {"bench": "columns", "config": {"devices": ordinals, "rounds": options.rounds}}
    with gpu:
        if source is not gpu:
            driver.call("cuCtxEnablePeerAccess", source.context, 0)
        reader = Reader(gpu)
        for name, (rows, row_bytes) in MATRICES.items():
            stripe = Stripe(reader, source, options.rows or rows, row_bytes)
            stripe.fill()
            result[name] = measure(stripe, options.rounds)
            tell(f"{name}: rows of {row_bytes} bytes, {stripe.bytes / 1e6:.0f} MB of columns", result[name])
            if name == "down_proj":
                rounds = max(3, options.rounds // 2)
                result["beside products"] = beside_products(stripe, ordinals[0], rounds, result[name])
                print("beside products: GB/s, products' time by their own, what they lose per GB brought, ms")
                for way, both in result["beside products"].items():
                    print(f"  {way:50} {both['GB/s']:8.1f} {both['products']:6.3f} {both['lost ms per GB']:6.3f}")
            stripe.free()
    if options.save:
        gpus = [{"ordinal": ordinal, "name": each.name} for ordinal, each in zip(ordinals, (gpu, source), strict=False)]
        torch_save.write(options.save, result, gpus)
    return 0


if __name__ == "__main__":
    sys.exit(main())
