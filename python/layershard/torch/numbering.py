# SPDX-License-Identifier: Apache-2.0
"""Which of the numbers in a module's name is the layer's.

Knows names, and which modules are alike by their parameters; nothing of ranks, series or the library.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .refusals import Refused

_NUMBER = re.compile(r"(?:^|[._])(\d+)(?=\.|$)")
_ENOUGH = 6  # layers alike: what two ranks save memory by, with the default prefetch
_SIBLINGS = 3  # from which on encoder_layer_0, encoder_layer_1, ... are numbered: linear_1 and linear_2 are not

Span = tuple[int, int]


@dataclass(frozen=True)
class Numbered:
    """A name and the number in it that is the layer's."""

    layer: int  # 3
    block: str  # "model.layers.3"
    template: str  # "model.layers.*.self_attn.q_proj"
    block_template: str  # "model.layers.*"

    @classmethod
    def at(cls, name: str, span: Span) -> Numbered:
        begin, end = span
        return cls(int(name[begin:end]), name[:end], f"{name[:begin]}*{name[end:]}", f"{name[:begin]}*")


def _spans(name: str) -> list[Span]:
    return [found.span(1) for found in _NUMBER.finditer(name)]


def _follows_underscore(name: str, span: Span) -> bool:
    return name[: span[0]].endswith("_")


def layer_number(name: str) -> tuple[int, str, str] | None:
    """The first integer among the parts of @name: (3, "model.layers.3", "model.layers.*.rest"); None without one."""
    for span in _spans(name):
        if not _follows_underscore(name, span):
            found = Numbered.at(name, span)
            return found.layer, found.block, found.template
    return None


def _structure(module: nn.Module) -> Hashable:
    return tuple((name, tuple(each.shape), each.dtype) for name, each in module.named_parameters())


def _expression(pattern: str) -> re.Pattern[str]:
    """Of "encoder.layer.*", anywhere in a name: the last * is the number."""
    before, star, after = pattern.rpartition("*")
    if not star:
        raise Refused(f"layer is '{pattern}': put a * where the layer's number is, such as 'encoder.layer.*'")
    before, after = (re.escape(part).replace(r"\*", ".*?") for part in (before, after))
    return re.compile(rf"(?:.*?\.)??{before}(\d+){after}(?=\.|$)")


class Numbering:
    """The numbers in the names of one model's modules. @layers: patterns that say which is the layer's; without any
    it is found by what is alike."""

    def __init__(self, modules: Mapping[str, nn.Module], layers: Sequence[str] = ()) -> None:
        self._modules = modules
        self._asked = [_expression(pattern) for pattern in layers]
        siblings: dict[Hashable, list[str]] = {}
        for name, module in modules.items():
            stem, sign, number = name.rpartition("_")
            if sign and number.isdecimal():
                siblings.setdefault((stem, type(module)), []).append(name)
        self._siblings = {name for names in siblings.values() if len(names) >= _SIBLINGS for name in names}

    def spans(self, name: str) -> list[Span]:
        """The numbers that may be the layer's."""
        if self._asked:
            return [found.span(1) for each in self._asked if (found := each.match(name))][:1]
        counted = self._siblings
        return [each for each in _spans(name) if not _follows_underscore(name, each) or name[: each[1]] in counted]

    def choose(self, names: Iterable[str]) -> dict[str, Numbered]:
        """Of all @names that differ by numbers only, the same one."""
        kinds: dict[str, dict[str, list[Span]]] = {}
        for name in names:
            spans = self.spans(name)
            kinds.setdefault(_starred(name, spans), {})[name] = spans
        found = {}
        for kind in kinds.values():
            position = self._position(kind)
            found.update({name: Numbered.at(name, spans[position]) for name, spans in kind.items()})
        return found

    def _position(self, kind: Mapping[str, list[Span]]) -> int:
        """The first by which enough of them are alike on average, else the one by which most are."""
        n_spans = len(next(iter(kind.values())))
        if n_spans == 1:
            return 0
        structures = {name: _structure(self._modules[name]) for name in kind}
        alike = []
        for position in range(n_spans):
            series = {(_starred(name, [spans[position]]), structures[name]) for name, spans in kind.items()}
            alike.append(len(kind) / len(series))
        return next((at for at, n_layers in enumerate(alike) if n_layers >= _ENOUGH), alike.index(max(alike)))


def _starred(name: str, spans: Iterable[Span]) -> str:
    for begin, end in sorted(spans, reverse=True):
        name = f"{name[:begin]}*{name[end:]}"
    return name
