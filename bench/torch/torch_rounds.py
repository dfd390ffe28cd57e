# SPDX-License-Identifier: Apache-2.0
"""Ways to run the same passes, compared: shuffled rounds, the statistics of ratios near one, and what is saved of them.

An arm is a function that enqueues one pass and returns its output. Every round runs each arm once in a new order, but
for the control arm, which comes first and last: what lies half way between the two is what the round had without
sharding, and how far they are apart over all rounds says whether the run means anything. A sample is several passes in
a row, so that what is fetched ahead for the next pass is neither free nor paid twice, and it follows warm passes of the
same arm: a GPU at its power cap needs a while to find its clock. All ranks walk through the same arms in the same order
and meet before each sample; the slowest rank counts, of those whose times an arm counts. Outputs of the first and the
last round are compared with the baseline's. Apart from the rounds: clocks and power, and how long the host takes to
enqueue a pass.

    meeting = torch_rounds.join(devices)                       # ranks of torchrun, or of torch_rounds.launch
    rounds = torch_rounds.Rounds(meeting, passes=4, rounds=31, warm_ms=200)
    table = rounds.run([Arm("replicated", model), Arm("layershard", sharded, rest=handle.prepare)])
    torch_rounds.save(path, meeting, {"tables": [table.as_json()]})

Knows torch, clocks, NVML; nothing of models or of layershard but its version.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
import random
import shlex
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

# ---- Ranks --------------------------------------------------------------------------------------------------------


def devices_of(text: str | None) -> list[torch.device]:
    """ "0,1", "0,0", "cpu,cpu", one a rank. By default all GPUs, or the only one twice, or the processor twice.
    ValueError, with what may be given: text is something else."""
    if text is None:
        count = torch.cuda.device_count()
        text = ",".join(map(str, range(count))) if count > 1 else "0,0" if count == 1 else "cpu,cpu"
    parts = text.split(",")
    if not all(part == "cpu" or part.isdecimal() for part in parts) or 0 < parts.count("cpu") < len(parts):
        raise ValueError(f"'{text}' is not one device a rank: GPUs such as 0,1, or cpu,cpu")
    return [torch.device("cpu") if part == "cpu" else torch.device("cuda", int(part)) for part in parts]


def launch(size: int) -> int | None:
    """Start this script again as @size ranks and wait for them: their status. None in a rank, also of torchrun's.

    When one rank fails the others are ended, since they would wait for it.
    """
    if "RANK" in os.environ:
        return None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(os.environ, WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    command = [sys.executable, *sys.argv]
    ranks = [
        subprocess.Popen(command, env=dict(environment, RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(size)
    ]
    try:
        while all(rank.poll() in (None, 0) for rank in ranks) and any(rank.poll() is None for rank in ranks):
            time.sleep(0.05)
        # The rank that failed first has said why; its peers may still have to say that they miss it.
        end = time.monotonic() + (10 if any(rank.poll() for rank in ranks) else 0)
        while time.monotonic() < end and any(rank.poll() is None for rank in ranks):
            time.sleep(0.05)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
        statuses = [rank.wait() for rank in ranks]
    return next((1 if status < 0 else status for status in statuses if status), 0)


@dataclasses.dataclass
class Meeting:
    """The ranks of a run and this one's place among them. Its own group, of host memory, never carries what is
    measured."""

    rank: int
    size: int
    devices: list[torch.device]
    group: Any
    _noted_s: float = -math.inf
    _NOTE_EVERY_S = 10.0

    @property
    def device(self) -> torch.device:
        return self.devices[self.rank]

    @property
    def on_gpus(self) -> bool:
        return self.device.type == "cuda"

    @property
    def shares_device(self) -> bool:
        """Two ranks on one GPU."""
        return self.on_gpus and len(set(self.devices)) < self.size

    def meet(self) -> None:
        dist.barrier(group=self.group)

    def gather(self, mine: Any) -> list[Any]:
        """What every rank gave, on all ranks."""
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, mine, group=self.group)
        return everyones

    def first(self, mine: Any) -> Any:
        """What rank 0 gave."""
        return self.gather(mine)[0]

    def agree(self, trouble: str | None) -> str | None:
        """The first trouble that any rank has: the same on all."""
        return next((each for each in self.gather(trouble) if each), None)

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def note(self, text: str) -> None:
        """Progress: for whoever looks on; in a file now and then."""
        if self.rank != 0:
            return
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif text and time.monotonic() - self._noted_s > self._NOTE_EVERY_S:
            self._noted_s = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def synchronize(self) -> None:
        if self.on_gpus:
            torch.cuda.synchronize(self.device)


def join(devices: Sequence[torch.device], timeout_s: float = 600) -> Meeting:
    """Meet the other ranks. The default group has gloo for the processor and, where each rank has a GPU of its own,
    NCCL for GPUs: NCCL refuses two ranks on one."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if len(devices) != size:
        raise SystemExit(f"{size} ranks were started for {len(devices)} devices: give as many with --devices")
    device = devices[rank]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    own_gpus = device.type == "cuda" and len(set(devices)) == size
    limit = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if own_gpus else "gloo", timeout=limit, device_id=device if own_gpus else None
    )
    return Meeting(rank, size, list(devices), dist.new_group(backend="gloo", timeout=limit))


def leave(meeting: Meeting) -> None:
    meeting.synchronize()
    meeting.meet()
    dist.destroy_process_group()


# ---- What a GPU says of itself ------------------------------------------------------------------------------------


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


# ---- Arms ---------------------------------------------------------------------------------------------------------


def _nothing() -> None:
    pass


@dataclasses.dataclass
class Arm:
    """One way to run passes.

    run       enqueues one pass on the current stream, returns the output (None: there is nothing to compare)
    begin     before the warm passes of each sample
    rest      after each sample: what is under way for a next pass that will not come at once must not run into the next
              arm's sample. The device is waited for after it
    baseline  the arm that ratio and output are compared with; None: the control arm. An arm that is not comparable in
              kind (graph to eager) names the resident arm that is run the same way
    check     "bits": equal, or the run fails. "close": within `tolerance` of the baseline by the norm of the
              difference; whether they are equal is noted. "none": not looked at
    details   goes into the row as it is: prefetch, windows, residents, ...
    counted   the ranks whose times are the arm's: others do something else, or nothing
    """

    name: str
    run: Callable[[], torch.Tensor | None]
    begin: Callable[[], None] = _nothing
    rest: Callable[[], None] = _nothing
    baseline: str | None = None
    check: str = "bits"
    tolerance: float = 0.02
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    counted: slice = dataclasses.field(default_factory=lambda: slice(None))


class WrongBits(Exception):
    """An arm computed something else than its baseline."""


# ---- Statistics ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ratio:
    median: float
    low: float
    high: float


def ratio_of(ratios: Sequence[float]) -> Ratio:
    """Their median with its 95 % interval, by the binomial distribution of how many lie below the median: that needs
    no shape of the rest."""
    values = sorted(ratios)
    reach, middle = 1.96 * math.sqrt(len(values)) / 2, (len(values) - 1) / 2
    low, high = max(0, math.floor(middle - reach)), min(len(values) - 1, math.ceil(middle + reach))
    return Ratio(statistics.median(values), values[low], values[high])


class Table:
    """What the rounds of one setting gave: times[arm][round], seconds a pass, of the slowest rank."""

    def __init__(self, arms: Sequence[Arm], margin_percent: float) -> None:
        self.arms = list(arms)
        self.control = arms[0].name
        self.margin_percent = margin_percent
        self.times: dict[str, list[float]] = {arm.name: [] for arm in arms}
        self.again: list[float] = []
        self.others: dict[str, list[float]] = {}  # of the slowest rank that an arm does not count
        self.metered: dict[str, dict[str, Any]] = {}
        self.equal: dict[str, bool] = {}
        self.not_run: dict[str, str] = {}

    @property
    def drift_percent(self) -> float:
        return 100 * abs(statistics.median(self.again) / statistics.median(self.times[self.control]) - 1)

    @property
    def conclusive(self) -> bool:
        return self.drift_percent <= self.margin_percent

    def rounds_of(self, name: str) -> list[float]:
        """Of the control arm what lies half way between first and last."""
        if name != self.control:
            return self.times[name]
        return [(first + last) / 2 for first, last in zip(self.times[name], self.again)]

    def ratio(self, name: str, other: str) -> Ratio | None:
        """Median of the rounds' own ratios; None where one of the two was not run."""
        if not self.times.get(name) or not self.times.get(other):
            return None
        return ratio_of([mine / its for mine, its in zip(self.times[name], self.rounds_of(other))])

    def _row(self, arm: Arm, times: Sequence[float], again: bool) -> dict[str, Any]:
        baseline = arm.baseline or self.control
        ratio = ratio_of([mine / its for mine, its in zip(times, self.rounds_of(baseline))])
        row: dict[str, Any] = {"variant": arm.name, "again": again, "baseline": baseline}
        row["pass_ns"] = {
            "median": 1e9 * statistics.median(times),
            "min": 1e9 * min(times),
            "max": 1e9 * max(times),
        }
        row["ratio"] = dataclasses.asdict(ratio)
        row["bits_equal"] = self.equal.get(arm.name)
        if arm.name in self.others:
            row["others_ns"] = 1e9 * statistics.median(self.others[arm.name])
        row.update(dict.fromkeys(("host_ns", "sm_mhz", "watts", "throttled")))
        row.update({} if again else self.metered.get(arm.name, {}))
        row.update(arm.details)
        row["rounds_ns"] = [round(1e9 * each) for each in times]
        return row

    def rows(self) -> list[dict[str, Any]]:
        made = [self._row(arm, self.times[arm.name], False) for arm in self.arms if self.times[arm.name]]
        return [made[0], self._row(self.arms[0], self.again, True), *made[1:]]

    def as_json(self, **more: Any) -> dict[str, Any]:
        """@more comes first: the setting's tokens and the like."""
        return more | {
            "control": self.control,
            "drift_percent": self.drift_percent,
            "conclusive": self.conclusive,
            "rows": self.rows(),
            "not_run": [{"variant": name, "reason": why} for name, why in self.not_run.items()],
        }

    def as_text(self) -> str:
        """For a person."""
        measured = "".join(f"{title:>8}" for title in ("host us", "SM MHz", "watts"))
        lines = [f"{'arm':<40}{'ms a pass':>11}{'ratio':>8}{'from':>8}{'to':>8} {measured}  bits"]
        for row in self.rows():
            name = row["variant"] + (", again" if row["again"] else "")
            numbers = f"{row['pass_ns']['median'] / 1e6:>11.3f}" + "".join(f"{row['ratio'][part]:>8.3f}" for part in
                                                                         ("median", "low", "high"))
            measured = (row["host_ns"] and row["host_ns"] / 1e3, row["sm_mhz"], row["watts"])
            meter = "".join(f"{'-' if value is None else f'{value:.0f}':>8}" for value in measured)
            bits = {None: "-", True: "equal", False: "close"}[row["bits_equal"]]
            lines.append(f"{name:<40}{numbers} {meter}  {bits}")
        verdict = "" if self.conclusive else f": MORE THAN {self.margin_percent} %, THE TABLE IS VOID"
        lines.append(f"{self.control} last differs from first by {self.drift_percent:.2f} %{verdict}")
        lines += [f"not run: {name}: {why}" for name, why in self.not_run.items()]
        return "\n".join(lines)


# ---- Rounds -------------------------------------------------------------------------------------------------------


class Rounds:
    """Runs arms. All ranks make the same one and give it the same arms."""

    METER_S = 1.0
    HOST_PASSES = 5
    MOST_WARM = 1000

    def __init__(
        self,
        meeting: Meeting,
        *,
        passes: int = 4,
        rounds: int = 31,
        warm_ms: float = 200,
        margin_percent: float = 0.5,
        meter: bool = True,
        seed: int = 1,
    ) -> None:
        self._meeting = meeting
        self._passes = passes
        self._rounds = rounds
        self._warm_s = warm_ms / 1e3
        self._margin_percent = margin_percent
        self._meter = Meter(meeting.device) if meter else None
        self._seed = seed
        self._outputs: dict[str, torch.Tensor] = {}
        self._pass_s: dict[str, float] = {}

    # ---- One sample ----

    def _seconds(self, arm: Arm, passes: int) -> tuple[float, torch.Tensor | None]:
        """A pass's, by events on the stream of the compute where there is one; and the last output."""
        output = None
        if not self._meeting.on_gpus:
            begin = time.perf_counter()
            for _ in range(passes):
                output = arm.run()
            return (time.perf_counter() - begin) / passes, output
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
        for _ in range(passes):
            output = arm.run()
        end_event.record()
        end_event.synchronize()
        return begin_event.elapsed_time(end_event) / 1e3 / passes, output

    def _sample(self, arm: Arm, warm: int, passes: int) -> tuple[float, torch.Tensor | None]:
        self._meeting.meet()
        arm.begin()
        for _ in range(warm):
            arm.run()
        sample = self._seconds(arm, passes)
        arm.rest()
        self._meeting.synchronize()
        return sample

    def _passes_in(self, arm: Arm, seconds: float) -> int:
        return min(self.MOST_WARM, int(seconds / self._pass_s[arm.name]) + 1)

    # ---- Before the rounds ----

    def _try(self, arm: Arm) -> str | None:
        """Two warm passes and two timed: how long they take, what comes out. The reason if they cannot be run."""
        trouble, seconds, output = None, 0.0, None
        try:
            seconds, output = self._sample(arm, 2, 2)
            if output is not None:
                self._outputs[arm.name] = output.clone()
        except Exception as error:  # of whatever library the arm uses
            trouble = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        trouble = self._meeting.agree(trouble)
        self._pass_s[arm.name] = max(self._meeting.gather(seconds)[arm.counted])
        return trouble

    def _try_all(self, table: Table) -> list[Arm]:
        good = []
        for arm in table.arms:
            self._meeting.note(f"trying {arm.name}")
            trouble = self._try(arm)
            if trouble is None and (arm.baseline or table.control) not in self._outputs:
                trouble = f"{arm.baseline or table.control} has no output to compare with"
            if trouble is None:
                good.append(arm)
                continue
            if arm is table.arms[0]:
                raise RuntimeError(f"{arm.name}, which everything is compared with, cannot be run: {trouble}")
            table.not_run[arm.name] = trouble
        for arm in good:
            self._compare(table, arm, self._outputs.get(arm.name))
            if arm.name not in {arm.baseline or table.control for arm in good}:
                self._outputs.pop(arm.name, None)
        return good

    def _differ(self, table: Table, arm: Arm, output: torch.Tensor) -> str | None:
        reference = self._outputs[arm.baseline or table.control]
        if arm.name == table.control and not _tells_apart(reference):
            return f"what {arm.name} computes is not finite or mostly zero: outputs cannot be compared"
        equal = torch.equal(output, reference)
        table.equal[arm.name] = equal and table.equal.get(arm.name, True)
        if equal:
            return None
        far = float((output.float() - reference.float()).norm() / reference.float().norm())
        if arm.check == "close" and far <= arm.tolerance:
            return None
        allowed = "not a bit" if arm.check == "bits" else f"{arm.tolerance:.2g} of its size"
        return f"{arm.name} is off {arm.baseline or table.control} by {far:.3g} of its size; allowed is {allowed}"

    def _compare(self, table: Table, arm: Arm, output: torch.Tensor | None) -> None:
        trouble = None if arm.check == "none" or output is None else self._differ(table, arm, output)
        if trouble is not None:
            trouble = f"rank {self._meeting.rank}: {trouble}"
        trouble = self._meeting.agree(trouble)
        if trouble is not None:
            raise WrongBits(trouble)
        equal = [each for each in self._meeting.gather(table.equal.get(arm.name)) if each is not None]
        if equal:
            table.equal[arm.name] = all(equal)

    # ---- The rounds ----

    def _timed(self, table: Table, arm: Arm, number: int) -> float:
        seconds, output = self._sample(arm, self._passes_in(arm, self._warm_s), self._passes)
        if number in (0, self._rounds - 1):
            self._compare(table, arm, output)
        return seconds

    def _run_rounds(self, table: Table, control: Arm, others: list[Arm], what: str) -> None:
        draw = random.Random(self._seed)
        for number in range(self._rounds):
            self._meeting.note(f"{what}round {number + 1} of {self._rounds}")
            draw.shuffle(others)
            order = [control, *others, control]
            everyones = list(zip(*self._meeting.gather([self._timed(table, arm, number) for arm in order])))
            table.again.append(max(everyones.pop()))
            for arm, times in zip(order, everyones):
                table.times[arm.name].append(max(times[arm.counted]))
                self._note_others(table, arm, times)

    def _note_others(self, table: Table, arm: Arm, times: Sequence[float]) -> None:
        counted = range(len(times))[arm.counted]
        if len(counted) < len(times):
            slowest = max(seconds for rank, seconds in enumerate(times) if rank not in counted)
            table.others.setdefault(arm.name, []).append(slowest)

    def _read_hosts(self, table: Table, arms: list[Arm]) -> None:
        """How long the host takes for a pass that finds the device idle; of a processor, the pass itself."""
        for arm in arms:
            taken = []
            self._meeting.meet()
            arm.begin()
            for _ in range(self.HOST_PASSES):
                self._meeting.synchronize()
                begin = time.perf_counter()
                arm.run()
                taken.append(time.perf_counter() - begin)
            arm.rest()
            self._meeting.synchronize()
            host_s = max(self._meeting.gather(statistics.median(taken))[arm.counted])
            table.metered[arm.name] = {"host_ns": 1e9 * host_s}

    def _read_meters(self, table: Table, arms: list[Arm]) -> None:
        """Apart from the rounds: what asks a driver every few milliseconds makes the program's launches wait for it."""
        for arm in arms:
            reading: dict[str, Any] = {}
            self._meeting.meet()
            arm.begin()
            for _ in range(self._passes_in(arm, self._warm_s)):
                arm.run()
            self._meeting.synchronize()
            with self._meter.reading(reading):  # type: ignore[union-attr]
                self._seconds(arm, self._passes_in(arm, self.METER_S))
            arm.rest()
            self._meeting.synchronize()
            table.metered[arm.name] |= _mean_of(self._meeting.gather(reading)[arm.counted])

    def run(self, arms: Sequence[Arm], what: str = "") -> Table:
        """@arms[0] is the control arm. An arm that raises when tried is left out, with its reason in the table; one
        whose output is wrong ends the run (WrongBits, on all ranks). @what comes before the notes of progress."""
        table = Table(arms, self._margin_percent)
        self._outputs.clear()
        good = self._try_all(table)
        self._run_rounds(table, good[0], good[1:], what)
        self._read_hosts(table, good)
        if self._meter is not None and self._meeting.on_gpus:
            self._read_meters(table, good)
        self._outputs.clear()
        # A table outlives what its arms hold: captured graphs, inputs.
        table.arms = [dataclasses.replace(arm, run=_nothing, begin=_nothing, rest=_nothing) for arm in table.arms]
        return table


def _tells_apart(output: torch.Tensor) -> bool:
    """Of numbers that are all zero or not finite wrong weights would make the same ones."""
    return bool(torch.isfinite(output).all()) and int((output == 0).sum()) < output.numel() / 2


def _mean_of(readings: Sequence[dict[str, Any]]) -> dict[str, Any]:
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


# ---- What is saved ------------------------------------------------------------------------------------------------


def _cpu() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _nccl() -> str | None:
    if not torch.cuda.is_available() or not dist.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _gpu(meeting: Meeting) -> dict[str, Any] | None:
    if not meeting.on_gpus:
        return None
    meter = Meter(meeting.device)
    name = torch.cuda.get_device_name(meeting.device)
    return {"rank": meeting.rank, "ordinal": meeting.device.index, "name": name, "bus": meter.bus,
            "driver": meter.driver}


def save(path: str | None, meeting: Meeting, result: dict[str, Any]) -> None:
    """Write @result with the machine, the date, the command and the versions, as `layershard-bench --save` does.
    Collective; without a path nothing is written."""
    import layershard._library

    gpus = [gpu for gpu in meeting.gather(_gpu(meeting)) if gpu]
    if path is None or meeting.rank != 0:
        return
    script = os.path.relpath(sys.argv[0], pathlib.Path(__file__).resolve().parents[2])
    saved = {
        "schema": "layershard-bench/2",
        "command": shlex.join([script, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "version": layershard._library.version(),
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "kernel": f"{platform.system()} {platform.release()}",
            "load": os.getloadavg()[0],
        },
        "gpus": gpus,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "nccl": _nccl(),
        },
        "result": result,
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(saved, file, indent=1)
        file.write("\n")
