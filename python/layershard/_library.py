# SPDX-License-Identifier: Apache-2.0
"""Finds the shared library, loads it once, and gives its functions their types.

Looked for in this order: the file that LAYERSHARD_LIBRARY names; inside the package, where a wheel has it (an editable
installation has a folder of its own for it, which is part of the package's path); build/ of the source tree that this
package lies in; wherever the system's loader finds it. Loaded at the first use, so that importing the package needs
nothing.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

from ._declarations import FUNCTIONS, VERSION
from .errors import LibraryError

PACKAGE = Path(__file__).resolve().parent
# While the major version is 0, a minor one may change the interface.
SYSTEM_NAME = "liblayershard.so." + (str(VERSION[0]) if VERSION[0] else f"0.{VERSION[1]}")


def _tree_build() -> Path | None:
    """build/ of the source tree that this package lies in; None where it lies in none."""
    tree = PACKAGE.parent.parent
    in_tree = PACKAGE.parent.name == "python" and (tree / "include" / "layershard" / "layershard.h").is_file()
    return tree / "build" if in_tree else None


def _in_package(folder: str) -> list[Path]:
    """Where the package may have a folder of this name."""
    return [Path(place, folder) for place in sys.modules[__name__.rpartition(".")[0]].__path__]


def _candidates() -> list[str]:
    """The files to try, best first; the last is a name for the loader. A file named by the user is the only one."""
    named = os.environ.get("LAYERSHARD_LIBRARY")
    if named:
        return [named]
    found = [folder / "liblayershard.so" for folder in [*_in_package("lib"), _tree_build()] if folder]
    return [str(path) for path in found if path.exists()] + [SYSTEM_NAME]


def _version_of(library: ctypes.CDLL) -> str:
    library.lshard_version.restype = ctypes.c_char_p
    version: bytes = library.lshard_version()
    return version.decode()


def _open(path: str) -> ctypes.CDLL:
    named = " (LAYERSHARD_LIBRARY)" if os.environ.get("LAYERSHARD_LIBRARY") else ""
    wanted = ".".join(map(str, VERSION))
    places = ", ".join(str(folder) for folder in [*_in_package("lib"), _tree_build()] if folder)
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise LibraryError(
            f"cannot load the shared library {path}{named}: {error}. Install layershard's wheel, build the library "
            "(make), or set LAYERSHARD_LIBRARY to the file liblayershard.so. Looked for in LAYERSHARD_LIBRARY, "
            f"{places}, and by the loader as {SYSTEM_NAME}"
        ) from None
    try:
        version = _version_of(library)
    except AttributeError:
        raise LibraryError(f"{path}{named} is not layershard's library: it has no function lshard_version") from None
    # Version 0: a minor version may change the interface.
    if version.split(".")[:2] != wanted.split(".")[:2]:
        raise LibraryError(f"{path}{named} is version {version} of the library; this package needs {wanted}")
    return library


@functools.cache
def library() -> ctypes.CDLL:
    """The library, its functions typed. Its calls let other Python threads run."""
    path = library_path()
    loaded = _open(path)
    for name, (result, arguments) in FUNCTIONS.items():
        try:
            function = getattr(loaded, name)
        except AttributeError:
            raise LibraryError(f"{path} lacks the function {name}: it is not the library of this package") from None
        function.restype = result
        function.argtypes = arguments
    return loaded


def library_path() -> str:
    """The file that library() loads, or a name for the system's loader."""
    return _candidates()[0]


def get_include() -> str:
    """The folder to give a C compiler with -I."""
    inside = [folder for folder in _in_package("include") if folder.is_dir()]
    return str(inside[0] if inside else PACKAGE.parent.parent / "include")


def version() -> str:
    """The version of the shared library, "0.1.0"."""
    return str(library().lshard_version().decode())
