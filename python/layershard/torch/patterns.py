# SPDX-License-Identifier: Apache-2.0
"""Which modules a pattern means: fnmatch on qualified names, the layer by the first integer in the name.

Knows names only; nothing of tensors, ranks or the library.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from .packed import is_packed, why_whole
from .refusals import Refused

_log = logging.getLogger("layershard")

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Unit:
    """A module that a pattern chose; all its tensors are shared."""

    name: str  # "model.layers.3.self_attn.q_proj"
    module: nn.Module
    layer: int  # 3
    block: str  # "model.layers.3"
    template: str  # "model.layers.*.self_attn.q_proj"

    @property
    def block_template(self) -> str:
        return self.block[: self.block.rfind(str(self.layer))] + "*"


def layer_number(name: str) -> tuple[int, str, str] | None:
    """The first integer among the parts of @name: (3, "model.layers.3", "model.layers.*.rest"); None without one."""
    found = _NUMBER.search(name)
    if not found:
        return None
    return int(found[1]), name[: found.end(1)], name[: found.start(1)] + "*" + name[found.end(1) :]


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


def _refuse_pattern(pattern: str, matched: Sequence[str], names: Sequence[str]) -> None:
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
        f"{argument} is a {type(patterns).__name__}: give names or patterns, such as '*.mlp.*' or "
        f"['*.q_proj', '*.o_proj']"
    )


def _refuse_packed(modules: dict[str, nn.Module], numbered: Sequence[str], pattern: str) -> None:
    """Where nothing that a pattern chose has weights that could be shared."""
    if numbered and all(is_packed(modules[name]) for name in numbered):
        raise Refused(
            f"pattern '{pattern}': {why_whole(numbered[0], modules[numbered[0]])}. Leave it out of the patterns, or "
            f"do not quantise what is to be shared"
        )


def select(model: nn.Module, patterns: str | Sequence[str]) -> list[Unit]:
    """The modules that @patterns choose, in the model's order.

    A module without a number in its name is passed over as long as its pattern chooses others that have one; so is one
    that has nothing to share but packed weights, of which the log says so.
    """
    modules = {
        name: module for name, module in model.named_modules() if name and (_holds_tensors(module) or is_packed(module))
    }
    names = list(modules)
    chosen: set[str] = set()
    for pattern in strings("modules", patterns):
        matched = [name for name in names if fnmatchcase(name, pattern)]
        numbered = [name for name in matched if layer_number(name)]
        if not numbered:
            _refuse_pattern(pattern, matched, names)
        _refuse_packed(modules, numbered, pattern)
        chosen.update(numbered)
    if not chosen:
        raise Refused("no pattern was given: name the modules to share, such as '*.mlp.*' or 'model.layers.*'")
    return list(_units(modules, _topmost([name for name in names if name in chosen])))


def _units(modules: dict[str, nn.Module], names: Iterable[str]) -> Iterator[Unit]:
    packed = []
    for name in names:
        if is_packed(modules[name]):
            packed.append(name)
            continue
        found = layer_number(name)
        assert found is not None
        yield Unit(name, modules[name], *found)
    if packed:
        _log.warning("%s; so does each of %d chosen modules", why_whole(packed[0], modules[packed[0]]), len(packed))
