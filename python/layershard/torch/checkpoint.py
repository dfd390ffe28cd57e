# SPDX-License-Identifier: Apache-2.0
"""Weights from safetensors files: each rank reads the layers that it is source of, and what is not shared.

Knows names in a checkpoint and in a model; how bytes get to other ranks is the library's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from .filling import Filling, Prepared, refuse_lost, unshared
from .handle import Handle, of
from .matching import Matching
from .memory import release_freed_memory
from .refusals import refuse_no_module
from .tensor_files import Checkpoint


@contextmanager
def empty_weights() -> Iterator[None]:
    """Models built inside have their parameters on the meta device, which costs no memory; buffers are computed."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _own(model: nn.Module, handle: Handle) -> Iterator[tuple[str, torch.Tensor]]:
    """What this rank will ask for."""
    yield from ((place.name, place.tensor) for place in handle.own_places())
    yield from ((places[0].name, tensor) for tensor, places in unshared(model, handle))


def load(
    model: nn.Module,
    checkpoint_dir: str | os.PathLike[str],
    *,
    variant: str | None = None,
    files: str | Sequence[str] | None = None,
) -> nn.Module:
    """Fill a sharded model from safetensors files: exactly this rank's layers, and what is not shared. Collective.

    checkpoint_dir  a directory, one of the Hub's cache (models--ORGANISATION--NAME), an index, or a file
    variant         which of several in the directory: "fp16" is model.fp16.safetensors, or the index of that name
    files           which files of the directory: an index, or files that together are the checkpoint

    Values are converted to the model's dtypes. On a model that has weights they are replaced, in place. All names,
    and the shapes of what this rank reads, are compared before anything is written: what is refused then leaves the
    model as it was. What fails on one rank is an error on all; it may be called again then. Returns the model.
    """
    refuse_no_module(model, "load(model, checkpoint_dir)")
    handle = of(model)
    inner = handle.model
    with ExitStack() as ends:
        ends.callback(release_freed_memory)

        def open_checkpoint() -> Prepared:
            refuse_lost(inner)
            found = Checkpoint(Path(checkpoint_dir), variant, files)
            ends.callback(found.close)
            made = Matching(inner, handle, found)
            made.refuse_missing()
            for name, tensor in _own(inner, handle):
                made.refuse_unlike(name, tensor)
            if handle.group.rank == 0:
                made.leftover.tell()
            return Prepared(made.make, made.digest())

        Filling(inner, handle, open_checkpoint, everything=True).run()
    return model
