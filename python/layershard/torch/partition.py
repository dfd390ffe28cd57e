# SPDX-License-Identifier: Apache-2.0
"""Inductor's graph partition without a fault that it has in torch 2.11 and 2.15.

torch.cat and torch.stack are no kernels to inductor: what they put together is computed into its place in the result.
Where the pieces are computed in several partitions, each of these allocates a result of its own, and all pieces but
those of the last one are lost, without an error. So what has pieces of one result is left out of graphs: it is run as
what lies between them is, in one function, which allocates the result once.

Knows inductor's scheduler; nothing of the library.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

_log = logging.getLogger("layershard")

_LEFT_OUT = (
    "%d of %d parts of a compiled program are not made CUDA graphs: they compute pieces of one torch.cat or "
    "torch.stack, of which inductor's graph partition would lose some. Results are right"
)


def mend() -> None:
    """Before inductor cuts up a program; nothing where it has not been imported yet."""
    module = sys.modules.get("torch._inductor.scheduler")
    scheduler: Any = getattr(module, "Scheduler", None)
    signatures = getattr(scheduler, "get_graph_partition_signature", None)
    if signatures is not None and not hasattr(signatures, "leaves_out_spread"):
        scheduler.get_graph_partition_signature = _mended(signatures)


def _mended(signatures: Callable[..., Any]) -> Callable[..., Any]:
    def mended(scheduler: Any, partitions: list[Any], skip_cudagraphs: list[bool]) -> Any:
        spread = {number for number in _spread(partitions) if not skip_cudagraphs[number]}
        if spread:
            _log.info(_LEFT_OUT, len(spread), skip_cudagraphs.count(False))
        skips = [skip or number in spread for number, skip in enumerate(skip_cudagraphs)]
        skip_cudagraphs[:] = skips  # the caller looks at it again
        return signatures(scheduler, partitions=partitions, skip_cudagraphs=skips)

    mended.leaves_out_spread = True  # type: ignore[attr-defined]
    return mended


def _spread(partitions: Iterable[Iterable[Any]]) -> set[int]:
    """The partitions that have a piece of what others have pieces of, or of what another one puts together."""
    found: dict[str, set[int]] = {}
    for number, partition in enumerate(partitions):
        for node in partition:
            for buffer in node.get_outputs():
                found.setdefault(_whole_of(buffer.node).get_name(), set()).add(number)
    return {number for numbers in found.values() if len(numbers) > 1 for number in numbers}


def _whole_of(buffer: Any) -> Any:
    """What it is computed into; itself where it has memory of its own."""
    ir: Any = sys.modules["torch._inductor.ir"]
    while isinstance(getattr(buffer, "layout", None), ir.NonOwningLayout):
        buffer = buffer.layout.view
        while not isinstance(buffer, ir.Buffer):  # through views and boxes
            buffer = buffer.data
    return buffer
