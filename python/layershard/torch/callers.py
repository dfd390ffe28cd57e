# SPDX-License-Identifier: Apache-2.0
"""Who called: for the few functions of other libraries in which what is refused elsewhere is right."""

from __future__ import annotations

import sys
from collections.abc import Container
from types import CodeType


def is_within(package: str) -> bool:
    """Whether this thread is running a function of that package."""
    frame = sys._getframe()
    while frame.f_back is not None and not frame.f_globals.get("__name__", "").startswith(package):
        frame = frame.f_back
    return bool(frame.f_globals.get("__name__", "").startswith(package))


def is_inside(functions: Container[CodeType]) -> bool:
    """Whether one of @functions is being run by this thread."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code not in functions:
        frame = frame.f_back
    return frame.f_code in functions
