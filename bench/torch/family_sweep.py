#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Every language model of transformers and every transformer of diffusers, made tiny, shared by two ranks and
compared, bit for bit, with a copy that is not shared.

    PYTHONPATH=python LAYERSHARD_LIBRARY=build/liblayershard.so bench/torch/family_sweep.py --save FILE
    ... bench/torch/family_sweep.py --save FILE --resume --mode compiled     adds the compiled ones to the file

Layers are fetched into poisoned windows, and the arguments are left as they are: of a language model the longest list
of modules is sharded with scope="block"; for diffusers it is apply_layer_sharding's to choose. A model is

equal      two passes give the bits that the copy gives, run in the same way: eager, or compiled by --backend (then one
           rank computes, and the other one stores its layers). A compiled model may be rounded otherwise than the copy
           compiled as a whole, see family_cut: it is equal then only if it gives the bits of the unshared copy compiled
           with operators at the same places, and its reason says so
refused    with a reason, by shard or in a pass
wrong      they give other bits; compiled, other ones than that copy, too
failed     there was an exception that is no refusal, or a rank was lost
not made   the copy cannot be made or does not run, or does not give the same bits twice

--resume leaves out what is in the file, which is written after each model. Exit status 1 where one is wrong or failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import family_ranks
import torch
import torch_save
from family_ranks import Result

LIBRARIES = {"transformers": "family_language", "diffusers": "family_diffusion"}
RESULTS = ("equal", "refused", "wrong", "failed", "not made")


def case_of(module: Any, name: str) -> family_ranks.Case:
    torch.manual_seed(0)
    model = module.build(name).eval()
    family_ranks.spread(model, seed=0)
    return family_ranks.Case(name, model, lambda seed: module.inputs(name, model, seed), module.shard)


def tried(module: Any, names: Sequence[str], backend: str | None) -> Iterator[Result]:
    """One pair of processes for each, so that none is in another's way."""
    for name in names:
        try:
            case = case_of(module, name)
        except Exception as error:
            yield {"family": name, "result": "not made", "reason": family_ranks.said(error)}
            continue
        yield from family_ranks.run([case], backend)


def import_compiler() -> None:
    """Seconds of imports, before ranks are forked."""
    import torch._inductor.config as config

    config.compile_threads = 1  # else it starts a process that imports torch
    config.cpp.simdlen = 1  # less for the C++ compiler: it matters what is put in which order, not how fast that runs
    config.cpp_cache_precompile_headers = True
    with torch.no_grad():
        torch.compile(torch.nn.ReLU(), backend="aot_eager")(torch.ones(1))
    torch.compiler.reset()


def counts(rows: Sequence[Result]) -> list[Result]:
    """How many models of each library became what, in each mode."""
    found = []
    for library, mode in dict.fromkeys((row["library"], row["mode"]) for row in rows):
        results = [row["result"] for row in rows if (row["library"], row["mode"]) == (library, mode)]
        found.append({"library": library, "mode": mode, "models": len(results)})
        found[-1].update({result.replace(" ", "_"): results.count(result) for result in RESULTS})
    return found


def reasons(rows: Sequence[Result]) -> list[Result]:
    """Which models are not equal, or rounded otherwise, by the kind of their reason: its text without names and
    numbers."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row in (row for row in rows if row["reason"]):
        said = re.sub(r"^(in a pass|unsharded, \w+|\w+): ", "", row["reason"])
        kind = re.sub(r"[\w.*]*[.*\d_][\w.*]*", "...", re.split(r"[:.] ", said)[0])
        found.setdefault((row["result"], row["library"], row["mode"], kind), []).append(row["family"])
    heads = "result", "library", "mode", "reason"
    return [
        {**dict(zip(heads, head, strict=True)), "models": len(names), "names": ", ".join(names)}
        for head, names in found.items()
    ]


def save(path: str | None, rows: Sequence[Result]) -> None:
    if path is None:
        return
    versions = {name: importlib.import_module(name).__version__ for name in LIBRARIES}
    what = {
        "bench": "families",
        "libraries": versions,
        "counts": counts(rows),
        "reasons": reasons(rows),
        "rows": rows,
    }
    unfinished = f"{path}.new"
    torch_save.write(unfinished, what, gpus=[])
    os.replace(unfinished, path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all")
    parser.add_argument("--library", choices=LIBRARIES, action="append", help="default: both")
    parser.add_argument("--mode", choices=("eager", "compiled"), default="eager")
    parser.add_argument("--backend", default="inductor", help="that compiles (default: %(default)s)")
    parser.add_argument("--save", metavar="FILE", help="where the results go")
    parser.add_argument("--resume", action="store_true", help="leave out what is in FILE already")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows: list[Result] = []
    if options.resume and options.save and pathlib.Path(options.save).exists():
        rows = json.loads(pathlib.Path(options.save).read_text())["result"]["rows"]
    backend = options.backend if options.mode == "compiled" else None
    if backend:
        import_compiler()
    known = {(row["library"], row["mode"], row["family"]) for row in rows}
    for library in options.library or LIBRARIES:
        module = importlib.import_module(LIBRARIES[library])
        names = [name for name in module.families() if not options.families or name in options.families]
        names = [name for name in names if (library, options.mode, name) not in known]
        for found in tried(module, names, backend):
            rows.append({"library": library, "mode": options.mode, **found})
            print(f"{library} {found['family']}: {found['result']}  {found.get('reason') or ''}", flush=True)
            save(options.save, rows)
    save(options.save, rows)
    for each in counts(rows):
        print(", ".join(f"{name} {value}" for name, value in each.items()))
    return int(any(row["result"] in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
