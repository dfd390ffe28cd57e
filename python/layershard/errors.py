# SPDX-License-Identifier: Apache-2.0
"""One exception for each status of the library, all of them layershard.Error.

Knows statuses; knows no group. Where Python has a word of its own for what happened (TimeoutError, IndexError), the
exception is that as well.
"""

from __future__ import annotations

from ._declarations import STATUS


class Error(Exception):
    """A call of the library failed.

    status  the status as the header writes it, "LSHARD_ERR_TIMEOUT"
    code    its number, -7
    text    the cause in the library's words: ranks, layers, amounts
    rank    the rank on which the call failed, None before there is one
    layer   the layer that the call was about, None where it was about none
    """

    code: int = 0
    status: str = "LSHARD_UNKNOWN"

    def __init__(self, text: str, *, rank: int | None = None, layer: int | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.rank = rank
        self.layer = layer

    def __str__(self) -> str:
        return f"{self.status}: {self.text}"

    def __reduce__(self) -> tuple[type[Error], tuple[str], dict[str, object]]:
        return type(self), (self.text,), self.__dict__


class Invalid(Error, ValueError):
    """An argument makes no sense; the text names it."""


class OutOfRange(Error, IndexError):
    """There is no such layer, tensor or index."""


class NoMemory(Error, MemoryError):
    """Out of memory: free some, or shard over more ranks."""


class NotSupported(Error):
    """The transport cannot do that: choose another transport or option."""


class WrongState(Error):
    """Not allowed in this state: something must come before it, or the object is closed."""


class Busy(Error):
    """Something still uses it: release the layer, or close the series first."""


class Timeout(Error, TimeoutError):
    """The deadline passed: look at the ranks that the text names."""


class Aborted(Error):
    """The group was aborted: close it."""


class PeerFailed(Error):
    """A rank is gone."""


class TransportFailed(Error):
    """The transport failed; the text holds its own words."""


class Mismatch(Error):
    """The ranks disagree: give all of them the options that the text names."""


class OutOfStep(Error):
    """The ranks of a collective transport made different calls: rewind."""


class NotPeriodic(Error):
    """The captured region does not end as it began: prepare before it, join at its end."""


class Corrupt(Error):
    """Bytes differ from what their source stored: do not use the results."""


class CallbackFailed(Error):
    """A callback failed: __cause__ holds its exception on the rank where it was raised."""


class SystemFailed(Error):
    """The operating system refused; the text holds its words."""


class LibraryError(Error, ImportError):
    """The shared library is not there, or is another version's."""

    status = "LAYERSHARD_LIBRARY"


_CLASSES: dict[str, type[Error]] = {
    "ERR_INVALID": Invalid,
    "ERR_RANGE": OutOfRange,
    "ERR_NO_MEMORY": NoMemory,
    "ERR_NOT_SUPPORTED": NotSupported,
    "ERR_STATE": WrongState,
    "ERR_BUSY": Busy,
    "ERR_TIMEOUT": Timeout,
    "ERR_ABORTED": Aborted,
    "ERR_PEER_FAILED": PeerFailed,
    "ERR_TRANSPORT": TransportFailed,
    "ERR_MISMATCH": Mismatch,
    "ERR_OUT_OF_STEP": OutOfStep,
    "ERR_NOT_PERIODIC": NotPeriodic,
    "ERR_CORRUPT": Corrupt,
    "ERR_CALLBACK": CallbackFailed,
    "ERR_SYSTEM": SystemFailed,
}
for _name, _class in _CLASSES.items():
    _class.status = f"LSHARD_{_name}"
    _class.code = STATUS[_name]
_BY_CODE = {each.code: each for each in _CLASSES.values()}


def error_of(code: int, text: str, *, rank: int | None = None, layer: int | None = None) -> Error:
    """The exception for a status; a status that a newer library may have made is a plain Error."""
    error = _BY_CODE.get(code, Error)(text, rank=rank, layer=layer)
    error.code = code
    return error
