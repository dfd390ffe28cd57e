# SPDX-License-Identifier: Apache-2.0
"""The calls of a pass as this rank makes them, written as a trace that ui.perfetto.dev shows.

Knows series and clocks. It stands in for the fast calls of a series while it records, and steps aside afterwards.
Hooks hold the calls they were made with, so they are made anew at both ends.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ..group import Group
from ..series import Series


def _path_of_rank(path: str | os.PathLike[str], group: Group) -> Path:
    """As the transport's trace=FILE: pass.json of rank 2 is pass.2.json; of a rank alone it is as given."""
    given = Path(path)
    return given if group.size == 1 else given.with_name(f"{given.stem}.{group.rank}{given.suffix}")


class Trace:
    """with handle.trace(path): the file is written at the end, also after an exception. It is there from the beginning,
    so that one that cannot be written is told before the pass."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        group: Group,
        series: Sequence[Series],
        install_hooks: Callable[[], None],
    ) -> None:
        self._path = _path_of_rank(path, group)
        self._file: IO[str]
        self._rank = group.rank
        self._series = series
        self._install_hooks = install_hooks
        self._events: list[dict[str, Any]] = []
        self._before: list[tuple[Series, str, Callable[..., None]]] = []

    def _timed(self, thread: int, word: str, call: Callable[..., None]) -> Callable[..., None]:
        def timed(layer: int, stream: int = 0) -> None:
            begin = time.perf_counter_ns()
            try:
                call(layer, stream)
            finally:
                end = time.perf_counter_ns()
                event = {"name": f"{word} {layer}", "ph": "X", "ts": begin / 1e3, "dur": (end - begin) / 1e3}
                self._events.append(event | {"pid": self._rank, "tid": thread})

        return timed

    def __enter__(self) -> Trace:
        self._file = open(self._path, "w", encoding="utf-8")  # noqa: SIM115  # until __exit__
        for thread, series in enumerate(self._series):
            self._events.append(
                {"name": "thread_name", "ph": "M", "pid": self._rank, "tid": thread, "args": {"name": series.name}}
            )
            for word in ("reach", "wait"):
                call = getattr(series, f"{word}_fast")
                self._before.append((series, f"{word}_fast", call))
                setattr(series, f"{word}_fast", self._timed(thread, word, call))
        self._install_hooks()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for series, name, call in self._before:
            setattr(series, name, call)
        self._before.clear()
        self._install_hooks()
        with self._file as file:
            json.dump({"schema": "layershard-torch-trace/1", "traceEvents": self._events}, file)
