# SPDX-License-Identifier: Apache-2.0
"""Modules and parameters that are registered on modules, anywhere in this process: torch tells of them here, for good,
and this tells those who asked to be told. One that raises refuses what is registered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

Listener = Callable[[nn.Module, str, Any], None]  # on which module, its name there, the module, parameter or None
_listeners: list[Listener] = []


def _tell(parent: nn.Module, name: str, new: Any) -> None:
    for each in _listeners:
        each(parent, name, new)


register_module_module_registration_hook(_tell)
register_module_parameter_registration_hook(_tell)


def on_registration(function: Listener) -> Listener:
    _listeners.append(function)
    return function
