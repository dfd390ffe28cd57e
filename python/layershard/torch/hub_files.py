# SPDX-License-Identifier: Apache-2.0
"""Which files a checkpoint is: by the Hub's rules for names, or as the caller says. Where there is no telling which of
several is meant, they are named and nothing is guessed.

Knows names of files, and what an index says; nothing of tensors or models.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from .refusals import Refused

_log = logging.getLogger("layershard")
_PLAIN = ("model", "diffusion_pytorch_model")  # what transformers and diffusers read unless told otherwise
_PART = re.compile(r"-\d+-of-(\d+)(?=\.|$)")
_INDEX = re.compile(r"(?P<stem>.+?)\.safetensors(?P<before>\.[^.]+)?\.index(?P<variant>\.[^.]+)?\.json")


@dataclass(frozen=True)
class Files:
    """One checkpoint: an index, or the files that are all of it. @stem: model, model.fp16, consolidated, ...;
    empty where it was not by such a name that they were chosen."""

    stem: str
    files: tuple[Path, ...]
    is_index: bool = False
    parts: int = 1  # as many as their names say

    def __str__(self) -> str:
        return self.files[0].name + (f" and {len(self.files) - 1} more of its parts" if len(self.files) > 1 else "")


def find(path: Path, variant: str | None, files: str | Sequence[str] | None) -> Files:
    """The checkpoint at @path: a directory, one of the Hub's cache, an index or a file."""
    if variant is not None and files is not None:
        raise Refused("variant= and files= both say which files are meant: give one of them")
    if path.is_file():
        if variant is not None or files is not None:
            raise Refused(f"{path} is a file, which says itself what is meant: leave out variant= and files=")
        return _one(path)
    if not path.is_dir():
        raise Refused(f"{path} is neither a directory nor a file{_hint_of_hub(path)}")
    directory = _snapshot(path)
    if files is not None:
        return _asked([directory / each for each in ([files] if isinstance(files, str) else files)])
    return _choose(directory, variant)


def read_index(index: Path) -> dict[str, Path]:
    """Where the index says that each tensor is. Files are links to elsewhere in the Hub's cache; what names they have
    is the index's to say, and may not lead out of its directory."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{index} cannot be read as JSON: {type(error).__name__}: {error}") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise Refused(f'{index} has no "weight_map", which says what file each tensor is in: it is no index')
    for name, file in places.items():
        if not isinstance(file, str) or not _is_inside(file):
            raise Refused(f"{index} places {name} in {file!r}, which is no file in its own directory")
    return {name: index.parent / file for name, file in places.items()}


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a name that is there twice json would take the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in content if names.count(name) > 1)} is there twice")
    return content


def _is_inside(file: str) -> bool:
    path = PurePosixPath(file)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in file


def _hint_of_hub(path: Path) -> str:
    if path.is_absolute() or len(path.parts) != 2:
        return ""
    return f"; if it is a name on the Hub, load(model, huggingface_hub.snapshot_download({str(path)!r}))"


# ---- What the caller says ----


def _one(path: Path) -> Files:
    return Files("", (path,), is_index=path.suffix == ".json")


def _asked(paths: list[Path]) -> Files:
    gone = [path for path in paths if not path.is_file()]
    if gone or not paths:
        raise Refused(f"files= names {gone[0]}, which is not there" if gone else "files= names no file")
    if len(paths) == 1:
        return _one(paths[0])
    indexes = [path.name for path in paths if path.suffix == ".json"]
    if indexes:
        raise Refused(f"files= names the index {indexes[0]} and others: an index stands alone, it names its files")
    return Files("", tuple(paths))


def _snapshot(path: Path) -> Path:
    """The directory itself; of models--ORGANISATION--NAME in the Hub's cache the snapshot that "main" is."""
    snapshots = path / "snapshots"
    if not snapshots.is_dir() or any(path.glob("*.safetensors*")):
        return path
    names = sorted(each.name for each in snapshots.iterdir() if each.is_dir())
    main = path / "refs" / "main"
    said = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else None
    if said is None and len(names) == 1:
        return snapshots / names[0]
    if said not in names:
        what = "there is no refs/main" if said is None else f"refs/main is {said!r}, which is not there"
        raise Refused(f"{path} has {len(names)} snapshots ({', '.join(names[:4])}), and {what}: give the path of one")
    return snapshots / said


# ---- What there is ----


def _choose(directory: Path, variant: str | None) -> Files:
    found = list(_candidates(directory))
    if not found:
        raise Refused(f"there are no safetensors files in {directory}{_what_else(directory)}")
    plain = [f"{name}.{variant}" if variant else name for name in _PLAIN]
    wanted = [each for each in found if each.stem in plain]
    wanted = wanted or [each for each in found if variant is not None and _is_of_variant(each.stem, variant)]
    if variant is not None and not wanted:
        raise Refused(f"nothing in {directory} is of variant {variant!r}; there are {_listed(found)}")
    if len(wanted) > 1:
        raise Refused(f"{directory} has {_listed(wanted)}: say which is meant by files=")
    if not wanted:
        wanted = [_only(directory, found)]
    chosen = wanted[0]
    if len(chosen.files) < chosen.parts:
        count = f"{len(chosen.files)} of the {chosen.parts} parts"
        raise Refused(f"{directory} has only {count} of {chosen.stem}: {chosen}")
    _tell_others(chosen, found)
    return chosen


def _only(directory: Path, found: list[Files]) -> Files:
    """No file has the Hub's plain name. Files of any names are one checkpoint if no tensor is in two of them."""
    if len(found) == 1:
        return replace(found[0], stem="")
    if any(each.is_index or len(each.files) > 1 for each in found):
        raise Refused(f"{directory} has {_listed(found)}: say which is meant by variant= or files=")
    return Files("", tuple(file for each in found for file in each.files))


def _tell_others(chosen: Files, found: list[Files]) -> None:
    others = [each for each in found if not set(each.files) & set(chosen.files)]
    if others:
        _log.info("load reads %s; not read are %s (variant= and files= say otherwise)", chosen, _listed(others))


def _is_of_variant(stem: str, variant: str) -> bool:
    return stem == variant or stem.endswith((f".{variant}", f"_{variant}", f"-{variant}"))


def _candidates(directory: Path) -> Iterator[Files]:
    """Every checkpoint in the directory. What an index names, and the parts of what has an index, are none."""
    indexes = {path: match for path in sorted(directory.glob("*.json")) if (match := _INDEX.fullmatch(path.name))}
    named = {file for index in indexes for file in _named_by(index)}
    indexed = set()
    for index, match in indexes.items():
        stem = match["stem"] + (match["before"] or match["variant"] or "")
        indexed.add(stem)
        yield Files(stem, (index,), is_index=True)
    parts: dict[tuple[str, int], list[Path]] = {}
    for file in sorted(set(directory.glob("*.safetensors")) - named):
        part = _PART.search(file.stem)
        if part is None:
            yield Files(file.stem, (file,))
        else:
            parts.setdefault((_PART.sub("", file.stem), int(part[1])), []).append(file)
    for (stem, count), files in parts.items():
        if stem not in indexed:
            yield Files(stem, tuple(files), parts=count)


def _named_by(index: Path) -> set[Path]:
    try:
        return set(read_index(index).values())
    except Refused:  # told if it is the one that is read
        return set()


def _listed(found: Sequence[Files]) -> str:
    return ", ".join(map(str, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")


def _what_else(directory: Path) -> str:
    """Where somebody who sees this may have wanted to go."""
    below = sorted({each.parent.name for each in directory.glob("*/*.safetensors")})
    others = sorted(each.name for end in ("bin", "pth", "pt", "gguf") for each in directory.glob(f"*.{end}"))
    if below:
        return f"; its folders {', '.join(below[:8])} have some: give the path of one"
    if others:
        return f", only {others[0]}: load it by the library that wrote it, and save it as safetensors"
    return ""
