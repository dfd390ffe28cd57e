# SPDX-License-Identifier: Apache-2.0
"""What stands for a shared weight in a state_dict that peft takes an adapter out of.

peft asks the whole model for its state_dict and keeps the adapter's tensors. This rank does not hold all the others:
in their place is what nobody can read, so that an adapter with a shared weight among its tensors is not saved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .callers import is_inside
from .refusals import Guarded

_PEFT = "peft.utils.save_and_load"
_FUNCTIONS = ("get_peft_model_state_dict", "set_peft_model_state_dict")


class Withheld(torch.Tensor):
    """Nothing can be done with it."""

    weight: str

    @classmethod
    def named(cls, weight: str) -> Withheld:
        withheld: Withheld = torch.Tensor._make_subclass(cls, torch.empty(0, device="meta"))
        withheld.weight = weight
        return withheld

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], _types: Any, args: Iterable[Any] = (), _kwargs: Any = None
    ) -> Any:
        names = [each.weight for each in args if isinstance(each, Withheld)]
        raise Guarded(
            f"{', '.join(names) or 'a weight'} is shared by layershard and would be saved with the adapter, but this "
            f"rank does not hold all layers: leave it out of the adapter (LoraConfig(bias='none'), modules_to_save), "
            f"or detach() first"
        )


def is_for_an_adapter() -> bool:
    """Whether it is peft that asks for a state_dict, to keep an adapter's part of it."""
    module = sys.modules.get(_PEFT)
    functions = [getattr(module, name, None) for name in _FUNCTIONS]
    return module is not None and is_inside({each.__code__ for each in functions if each is not None})
