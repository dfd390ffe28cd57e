# SPDX-License-Identifier: Apache-2.0
"""Models sharded over two forked processes, layers fetched into poisoned windows, and compared bit for bit with a copy
that is not sharded.

Knows layershard and torch; nothing of where models come from.
"""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

RANKS = 2
_PATIENCE_MS = 600_000
_fork = multiprocessing.get_context("fork")
_jobs = itertools.count()
Result = dict[str, Any]


@dataclass
class Case:
    """A model to try. What a pass is given is made for each pass anew: some models write to it."""

    name: str
    model: torch.nn.Module
    inputs: Callable[[int], dict[str, Any]]  # of a seed
    shard: Callable[[torch.nn.Module], str]  # shards it in place; what was chosen, in words


def spread(model: torch.nn.Module, seed: int) -> None:
    """Give other values to parameters that are all the same, such as zeros, and to those that are not set at all: what
    is multiplied by them would count for nothing."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            noise = torch.randn(parameter.shape, generator=draw).to(parameter.dtype) * 0.1
            if not parameter.isfinite().all() or parameter.abs().max() > 1e3:
                parameter.copy_(noise)
            elif parameter.min() == parameter.max():
                parameter.add_(noise)


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.clone()]
    if isinstance(value, dict):
        value = list(value.values())
    return [each for part in value for each in tensors_of(part)] if isinstance(value, list | tuple) else []


def passes(run: Callable[..., Any], case: Case) -> list[torch.Tensor]:
    """What two passes give."""
    found = []
    with torch.no_grad():
        for seed in (1, 2):
            random.seed(seed), numpy.random.seed(seed), torch.manual_seed(seed)
            found += tensors_of(run(**case.inputs(seed)))
    return found


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def difference(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> str | None:
    if len(got) != len(want):
        return f"{len(got)} tensors, not {len(want)}"
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape or not torch.equal(_bits(a), _bits(b)):
            nans = int(a.isnan().sum()) if a.is_floating_point() else 0
            return f"tensor {number} of {len(want)} differs, {nans} of {a.numel()} elements are NaN"
    return None


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]


def _run_of(model: torch.nn.Module, backend: str | None) -> Callable[..., Any]:
    if backend is None:
        return model
    torch.compiler.reset()
    return torch.compile(model, backend=backend)


def _worth(model: torch.nn.Module, model_bytes: int) -> Result:
    """What sharing is worth: series, their windows, and the part of the model's bytes that a rank does not hold."""
    import layershard.torch as sharding

    series = [(each.series.stats(), len(each.plan.places)) for each in sharding.of(model).shared]
    saved = sum(s.layer_bytes * (n - s.windows) - s.shard_bytes - s.resident_bytes for s, n in series)
    return {"series": len(series), "windows": sum(s.windows for s, _ in series), "saved": saved / model_bytes}


OTHER_ROUNDING = "as the copy with operators at the same places; compiled without them it is rounded otherwise"


def _as_cut(case: Case, whole: torch.nn.Module, backend: str, got: Sequence[torch.Tensor]) -> bool:
    """Whether the bits are those of the unshared copy @whole compiled with operators at the same places."""
    import family_cut

    beside = family_cut.cut(whole, *family_cut.borders(case.model))
    return difference(got, passes(_run_of(beside, backend), case)) is None


def compare(case: Case, backend: str | None, computes: bool) -> Result:
    """What became of one model on this rank; a rank that does not compute only stores its layers."""
    import layershard.torch as sharding

    plain, again = copy.deepcopy(case.model), copy.deepcopy(case.model)
    size = sum(each.nbytes for each in plain.parameters())
    try:
        want = passes(_run_of(plain, backend), case) if computes else []
        if any(each.isnan().any() for each in want):
            return {"result": "not made", "reason": "unsharded, it computes NaN"}
    except Exception as error:
        return {"result": "not made", "reason": f"unsharded, {said(error)}"}
    try:
        chosen = case.shard(case.model)
    except sharding.Refused as refusal:
        return {"result": "refused", "reason": str(refusal)}
    except Exception as error:
        return {"result": "failed", "reason": said(error), "trace": traceback.format_exc()}
    found = {"modules": chosen, **_worth(case.model, size)}
    try:
        got = passes(_run_of(case.model, backend), case) if computes else []
        off = difference(got, want)
        if off and difference(passes(_run_of(again, backend), case), want):
            return {"result": "not made", "reason": "unsharded, it does not give the same bits twice"}
        if off and backend and _as_cut(case, again, backend, got):
            return {**found, "result": "equal", "reason": OTHER_ROUNDING}
        return {**found, "result": "wrong" if off else "equal", "reason": off}
    except (sharding.Refused, sharding.Guarded) as refusal:
        return {**found, "result": "refused", "reason": f"in a pass: {refusal}"}
    except Exception as error:
        return {**found, "result": "failed", "reason": said(error), "trace": traceback.format_exc()}
    finally:
        sharding.of(case.model).close()


def _work(sender: Any, rank: int, job: str, cases: Sequence[Case], backend: str | None) -> None:
    torch.set_num_threads(1)
    os.environ.update(LAYERSHARD_RANK=str(rank), LAYERSHARD_SIZE=str(RANKS), LAYERSHARD_JOB=job, LAYERSHARD_POISON="1")
    os.environ["LAYERSHARD_TIMEOUT_MS"] = str(_PATIENCE_MS)  # a rank that compiles comes late
    for case in cases:
        sender.send(compare(case, backend, computes=backend is None or rank == 0))


def _start(cases: Sequence[Case], backend: str | None) -> list[tuple[Any, Any]]:
    job, started = f"families-{os.getpid()}-{next(_jobs)}", []
    for rank in range(RANKS):
        receiver, sender = _fork.Pipe(duplex=False)
        process = _fork.Process(target=_work, args=(sender, rank, job, cases, backend), daemon=True)
        process.start()
        sender.close()
        started.append((process, receiver))
    return started


def _received(process: Any, receiver: Any, end: float) -> Result:
    try:
        if receiver.poll(max(0.0, end - time.monotonic())):
            return dict(receiver.recv())
        return {"result": "failed", "reason": "it takes too long"}
    except EOFError:
        process.join()
        return {"result": "failed", "reason": f"the process ended with status {process.exitcode}"}


_WORST = ("wrong", "failed", "refused", "not made", "equal")


def run(cases: Sequence[Case], backend: str | None = None, limit_s: float = 600) -> Iterator[Result]:
    """What became of each, on the rank where it went worse. Models are the caller's, so the ranks have the same bits.
    After one that did not end, or ended its process, there are no more. With a @backend one rank computes."""
    started = _start(cases, backend)
    try:
        for case in cases:
            begin = time.monotonic()
            found = []
            for each in started:
                found.append(_received(*each, begin + limit_s))
                if backend and found[-1]["result"] == "not made":
                    break  # the rank that computes: the others wait for it in vain
            worst = min(found, key=lambda each: _WORST.index(each["result"]))
            yield {"family": case.name, **worst, "seconds": round(time.monotonic() - begin, 1)}
            if len(found) < len(started) or not all(each.is_alive() or pipe.poll() for each, pipe in started):
                return
    finally:
        for process, _ in started:
            process.kill()
            process.join()
