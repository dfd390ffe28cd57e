# SPDX-License-Identifier: Apache-2.0
"""From which elements of its operands each element of an operator's results is made.

Knows torch's operators; nothing of weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch

from ..containers import tensors_in
from .storages import Unclear

_OVERWRITES = frozenset(
    ["copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_"]
)
_MOVES = frozenset(
    """
    cat stack index index_select index_copy index_fill index_put _unsafe_index _unsafe_index_put gather scatter take put
    slice_scatter select_scatter diagonal_scatter masked_select masked_scatter embedding
    repeat flip roll tril triu constant_pad_nd block_diag index_add scatter_add
    _nested_tensor_from_tensor_list
    """.split()
)
_SUMS = frozenset(
    """
    sum mean prod amax amin var std var_mean std_mean norm linalg_vector_norm logsumexp cumsum cumprod
    _softmax _log_softmax mm bmm addmm baddbmm addbmm mv addmv dot linear convolution native_layer_norm
    """.split()
)
_LINES = frozenset("sort topk kthvalue median mode max min argmax argmin any all count_nonzero".split())
_LINES |= frozenset("cummax cummin _fft_r2c _fft_c2c _fft_c2r".split())
_MATRICES = frozenset(
    "_linalg_svd _linalg_eigh _linalg_det linalg_qr linalg_inv_ex linalg_cholesky_ex linalg_lu_factor_ex".split()
)
_PLACES = ("index", "indices", "mask")  # operands that say where elements are, by the schemas' names for them

Kind = Literal["each", "moves", "sums", "lines", "matrices", "other"]


class Rule(NamedTuple):
    """How an operator's results come from its operands.

    kind        each: every element from the operands' elements in the same place, broadcast; moves: elements are put
                elsewhere as they are; sums: by arithmetic that ends in NaN where an operand is NaN; lines: from all of
                the line along some dimensions in which it lies; matrices: from all of the matrix, of a batch
    is_composite  it is made of others; in inference mode it arrives whole, and says that it gives its operand's memory
                even where it copies
    passes      they have nothing but the operand's shape, or the operand is another view from then on
    written     position and name of the operands that are written
    overwritten  those of them that are not read
    by_index    an operator for each index of its lists
    """

    kind: Kind
    is_composite: bool = False
    passes: bool = False
    written: tuple[tuple[int, str], ...] = ()
    overwritten: tuple[tuple[int, str], ...] = ()
    by_index: bool = False


@functools.cache
def rule_of(func: Any) -> Rule:
    schema = func._schema
    name = schema.name.partition("::")[2] if func.namespace == "aten" else ""  # others may mean something else by it
    by_index = name.startswith("_foreach_") or (name.startswith("_fused_") and not schema.returns)  # optimizers' steps
    name = name.removeprefix("_foreach_")
    writes = [(i, each) for i, each in enumerate(schema.arguments) if each.alias_info and each.alias_info.is_write]
    is_own = func.namespace == "aten"  # there what can be written and is given by name only is for results
    outs = [(i, each) for i, each in writes if each.is_out and (is_own or each.name == "out")]
    return Rule(
        kind="each" if by_index else _kind(func, name),
        is_composite=func.namespace != "prim" and bool(func._can_decompose()),
        passes=torch.Tag.inplace_view in func.tags or name.startswith("new_") or name.endswith("_like"),
        written=tuple((index, each.name) for index, each in writes),
        overwritten=tuple((index, each.name) for index, each in (writes if name in _OVERWRITES else outs)),
        by_index=by_index,
    )


def _kind(func: Any, name: str) -> Kind:
    plain = name.removesuffix("_")
    if torch.Tag.pointwise in func.tags or plain in ("copy", "_to_copy", "clone"):
        return "each"
    kinds: dict[Kind, frozenset[str]] = {"moves": _MOVES, "sums": _SUMS, "lines": _LINES, "matrices": _MATRICES}
    return next((kind for kind, names in kinds.items() if plain in names), "other")


class Call(NamedTuple):
    """Of an operator, with what it was given."""

    func: Any
    rule: Rule
    args: Any
    kwargs: Any

    def written(self) -> list[torch.Tensor]:
        found = [self.kwargs.get(name, self.args[i] if i < len(self.args) else None) for i, name in self.rule.written]
        return list(tensors_in(found))

    def read(self) -> Iterator[torch.Tensor]:
        places = dict(self.rule.overwritten)
        yield from tensors_in([each for i, each in enumerate(self.args) if i not in places])
        yield from tensors_in([each for name, each in self.kwargs.items() if name not in places.values()])

    def _named(self) -> dict[str, Any]:
        arguments = self.func._schema.arguments
        given = {each.name: value for each, value in zip(arguments, self.args, strict=False)}
        return {**{each.name: each.default_value for each in arguments}, **given, **self.kwargs}

    def adds(self) -> bool:
        """Whether an operator that moves elements adds them to what lies there."""
        named = self._named()
        return bool(named.get("accumulate") or named.get("reduce")) or "_add" in self.func._schema.name

    def picks(self) -> torch.Tensor | None:
        """What says for each element of the result which one it is."""
        is_one = self.func._schema.name in ("aten::gather", "aten::take")
        return self._named()["index"] if is_one else None

    def dims(self) -> Any:
        """Along which its lines lie; () for all."""
        dims = self._named().get("dim")
        return () if dims is None else dims

    def run_on(self, instead: Callable[[torch.Tensor, bool], Any], zeros: bool) -> Any:
        """The operator's results on other tensors: instead(operand, whether it says places). @zeros: and with 0 instead
        of numbers that are elements."""
        types = {each.name: str(each.type) for each in self.func._schema.arguments}

        def put(name: str, value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return instead(value, name in _PLACES)
            if isinstance(value, (list, tuple)):
                return [put(name, each) for each in value]
            return 0 if zeros and types[name] == "number" else value

        args = [put(name, value) for name, value in zip(types, self.args, strict=False)]
        kwargs = {name: put(name, value) for name, value in self.kwargs.items()}
        try:
            return self.func(*args, **kwargs)
        except Exception as error:  # whatever it has against what it is run on instead
            raise Unclear from error


def each_index(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[int, Any, Any]]:
    """The operands of a list operator, one tensor of each list at a time."""

    def at(value: Any, index: int) -> Any:
        return value[index] if isinstance(value, (list, tuple)) and index < len(value) else value

    for index in range(max((len(each) for each in args if isinstance(each, (list, tuple))), default=0)):
        yield index, [at(each, index) for each in args], {name: at(each, index) for name, each in kwargs.items()}
