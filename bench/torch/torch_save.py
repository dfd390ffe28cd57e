# SPDX-License-Identifier: Apache-2.0
"""What a bench in PyTorch saves, under the head that `layershard-bench --save` writes too: machine, date, command,
versions.

Knows the machine and layershard's version; nothing of what was measured.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import platform
import shlex
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch_launch import Ranks
from torch_meter import Meter


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


def _gpu(ranks: Ranks) -> dict[str, Any] | None:
    if not ranks.on_gpus:
        return None
    meter = Meter(ranks.device)
    name = torch.cuda.get_device_name(ranks.device)
    return {"rank": ranks.rank, "ordinal": ranks.device.index, "name": name, "bus": meter.bus, "driver": meter.driver}


def save(path: str | None, ranks: Ranks, result: dict[str, Any]) -> None:
    """What write does, with the GPUs of all ranks. Collective; without a path nothing is written."""
    gpus = [gpu for gpu in ranks.gather(_gpu(ranks)) if gpu]
    if path is not None and ranks.rank == 0:
        write(path, result, gpus)


def version() -> str:
    """Of the library."""
    import layershard._library

    return layershard._library.version()


def write(path: str, result: dict[str, Any], gpus: list[dict[str, Any]]) -> None:
    """Write @result with the machine, the date, the command and the versions, as `layershard-bench --save` does."""
    script = os.path.relpath(sys.argv[0], pathlib.Path(__file__).resolve().parents[2])
    saved = {
        "schema": "layershard-bench/2",
        "command": shlex.join([script, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "version": version(),
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
