# SPDX-License-Identifier: Apache-2.0
"""Which modules a pattern means: fnmatch on qualified names, the layer by a number in the name.

Knows names only; nothing of tensors, ranks or the library.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from .numbering import Numbering, layer_number
from .packed import is_packed, why_whole
from .refusals import Refused

_log = logging.getLogger("layershard")


@dataclass(frozen=True)
class Unit:
    """A module that a pattern chose; all its tensors are shared."""

    name: str  # "model.layers.3.self_attn.q_proj"
    module: nn.Module
    layer: int  # 3
    block: str  # "model.layers.3"
    template: str  # "model.layers.*.self_attn.q_proj"
    block_template: str  # "model.layers.*"


def _holds_tensors(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _topmost(names: Sequence[str]) -> Iterator[str]:
    """Of a module and its children that are both chosen, only the module."""
    chosen: set[str] = set()
    for name in names:  # parents come before children
        parts = name.split(".")
        if not any(".".join(parts[:length]) in chosen for length in range(1, len(parts))):
            chosen.add(name)
            yield name


def _near(pattern: str, names: Sequence[str]) -> str:
    numbered = [layer_number(name) for name in names]
    templates = dict.fromkeys(found[2] for found in numbered if found)
    candidates = list(dict.fromkeys([f"*.{t.rsplit('.', 1)[-1]}" for t in templates if not t.endswith("*")]))
    near = difflib.get_close_matches(pattern, candidates + list(templates), n=4, cutoff=0.5)
    return "near it: " + ", ".join(near) if near else "modules are named like: " + ", ".join(list(templates)[:6])


def _refuse_pattern(pattern: str, matched: Sequence[str], names: Sequence[str], layers: Sequence[str]) -> None:
    if matched and layers:
        raise Refused(
            f"pattern '{pattern}' matches {', '.join(matched[:3])}: layer={' or '.join(map(repr, layers))} finds no "
            f"number in such names; put a * where the layer's number is, such as 'encoder.layer.*'"
        )
    if matched:
        raise Refused(
            f"pattern '{pattern}' matches {', '.join(matched[:3])}: without a number in its name there is no telling "
            f"which layer a module is"
        )
    raise Refused(f"pattern '{pattern}' matches no module with tensors; {_near(pattern, names)}")


def strings(argument: str, patterns: str | Sequence[str]) -> list[str]:
    """One pattern or several, as a list; @argument is what the caller knows them as."""
    given = [patterns] if isinstance(patterns, str) else patterns
    if isinstance(given, list | tuple | set | frozenset) and all(isinstance(each, str) for each in given):
        return list(given)
    raise Refused(
        f"{argument} is of type {type(patterns).__name__}: give names or patterns, such as '*.mlp.*' or "
        f"['*.q_proj', '*.o_proj']"
    )


def _refuse_packed(modules: dict[str, nn.Module], numbered: Sequence[str], pattern: str) -> None:
    """Where nothing that a pattern chose has weights that could be shared."""
    if numbered and all(is_packed(modules[name]) for name in numbered):
        raise Refused(
            f"pattern '{pattern}': {why_whole(numbered[0], modules[numbered[0]])}. Leave it out of the patterns, or "
            f"do not quantise what is to be shared"
        )


def select(model: nn.Module, patterns: str | Sequence[str], layer: str | Sequence[str] = ()) -> list[Unit]:
    """The modules that @patterns choose, in the model's order. @layer: names with a * where the layer's number is.

    A module without a number in its name is passed over as long as its pattern chooses others that have one; so is one
    that has nothing to share but packed weights, of which the log says so.
    """
    modules = {
        name: module for name, module in model.named_modules() if name and (_holds_tensors(module) or is_packed(module))
    }
    names, layers = list(modules), strings("layer", layer)
    numbering = Numbering(modules, layers)
    chosen: set[str] = set()
    for pattern in strings("modules", patterns):
        matched = [name for name in names if fnmatchcase(name, pattern)]
        numbered = [name for name in matched if numbering.spans(name)]
        if not numbered:
            _refuse_pattern(pattern, matched, names, layers)
        _refuse_packed(modules, numbered, pattern)
        chosen.update(numbered)
    if not chosen:
        raise Refused("no pattern was given: name the modules to share, such as '*.mlp.*' or 'model.layers.*'")
    return _units(modules, list(_topmost([name for name in names if name in chosen])), numbering)


def _units(modules: dict[str, nn.Module], names: Sequence[str], numbering: Numbering) -> list[Unit]:
    packed = [name for name in names if is_packed(modules[name])]
    if packed:
        _log.warning("%s; so does each of %d chosen modules", why_whole(packed[0], modules[packed[0]]), len(packed))
    found = numbering.choose(name for name in names if name not in packed)
    return [Unit(name, modules[name], **vars(found[name])) for name in names if name in found]
