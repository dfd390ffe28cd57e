#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Hold the borders between the parts of the code that a compiler does not hold.

    purity.py includes SOURCE_DIR            who includes whom; no file is left out of the build
    purity.py base SOURCE_DIR OBJECT...      what the base's objects ask of the world: nothing
    purity.py core SOURCE_DIR OBJECT...      what the core's objects, given with the base's, ask of it: outside.h
    purity.py circles SOURCE_DIR OBJECT...   no file of the library needs what, by way of others, needs that file
    purity.py exports SOURCE_DIR SO ARCHIVE  both libraries show what the public headers declare, and nothing else

Prints every violation and exits 1 if there is one.
"""

import collections
import pathlib
import re
import subprocess
import sys

# What programs include; writers of transports include transport.h as well.
PROGRAMS = {"layershard/callbacks.h", "layershard/layershard.h", "layershard/plan.h"}
PUBLIC = PROGRAMS | {"layershard/transport.h"}

# Headers of C11 that need no operating system.
FREESTANDING = {
    "inttypes.h",
    "limits.h",
    "stdarg.h",
    "stdatomic.h",
    "stdbool.h",
    "stddef.h",
    "stdint.h",
    "stdio.h",
    "stdlib.h",
    "string.h",
}

PURE = {"src/base", "src/core"}

# Of a folder: the folders whose headers it may include besides its own, and the public headers. "src/transport/*" is
# each transport, and the wrappers: none of them sees another.
BORDERS = {
    "src/base": ((), PUBLIC),
    "src/core": (("src/base",), PUBLIC),
    "src/host": (("src/base",), PUBLIC),
    "src/transport": (("src/base", "src/host"), PUBLIC),
    "src/transport/*": (("src/base", "src/host", "src/transport"), PUBLIC),
    "tools/support": ((), PROGRAMS),
    "tools/layershard": (("tools/support",), PROGRAMS),
    "examples/llama": (("tools/support",), PROGRAMS),
    "bench/c": (("tools/support",), PROGRAMS),
}

# The one arrow past those lines: what `layershard-bench link` copies without the library, it asks of the same driver.
ARROWS = {"bench/c/bench_link_gpu.h": {"cuda_driver.h"}}

# Where no folder is without a line in BORDERS.
BORDERED = ("src", "tools", "examples/llama", "bench/c")

# Bytes, text and the default allocator: all that base and core may use of the C library.
LIBC = {
    "memchr",
    "memcmp",
    "memcpy",
    "memmove",
    "memset",
    "strchr",
    "strcmp",
    "strcpy",
    "strlen",
    "strncmp",
    "strnlen",
    "strtoull",
    "snprintf",
    "vsnprintf",
    "calloc",
    "free",
    "malloc",
}

# What compilers and linkers add of their own accord (stack protector, fortified variants of LIBC).
COMPILER = re.compile(rf"_GLOBAL_OFFSET_TABLE_|__stack_chk_fail|__({'|'.join(LIBC)})_chk")


def names(path, *options):
    output = subprocess.run(["nm", "-P", *options, str(path)], check=True, capture_output=True, text=True).stdout
    return {line.split()[0].split("@")[0] for line in output.splitlines() if len(line.split()) > 1}


def headers_of(folder):
    return {path.name for path in folder.glob("*.h")}


def check_includes(source):
    files = [path for top in BORDERED for path in (source / top).rglob("*.[ch]")]
    folders = {str(path.parent.relative_to(source)) for path in files}
    for missing in sorted({name for name in BORDERS if not name.endswith("*")} - folders):
        yield f"{missing}: no files; is this the right directory?"
    for folder in sorted(folders):
        yield from check_folder(source, folder)
    for top in (*BORDERED, "tests"):
        yield from check_listed(source, top)


def check_folder(source, folder):
    border = BORDERS.get(folder) or BORDERS.get(folder.rpartition("/")[0] + "/*")
    if not border:
        yield f"{folder}: no line of BORDERS says what it may include"
        return
    sees, public = border
    visible = collections.Counter(name for each in (folder, *sees) for name in headers_of(source / each))
    for name in sorted(name for name, count in visible.items() if count > 1):
        yield f'{folder}: "{name}" is in more than one of the folders that it sees'
    for path in sorted((source / folder).glob("*.[ch]")):
        shown = path.relative_to(source)
        yield from check_file(path, shown, {*visible, *ARROWS.get(str(shown), ())}, public, folder in PURE)


def check_file(path, shown, quoted_allowed, public, pure):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        match = re.match(r'\s*#\s*include\s*(["<])([^">]+)[">]', line)
        if not match:
            continue
        quoted, header = match[1] == '"', match[2]
        if header.startswith("layershard/"):
            if header not in public:
                yield f"{shown}:{number}: <{header}> is not for this directory"
        elif quoted and header not in quoted_allowed:
            yield f'{shown}:{number}: "{header}" is not for this directory'
        elif not quoted and pure and header not in FREESTANDING | public:
            yield f"{shown}:{number}: <{header}>: {shown.parent} uses no operating system"


def check_listed(source, top):
    """By name in the nearest CMakeLists.txt above it; tests/consumer and tests/outside are projects of their own."""
    for path in sorted((source / top).rglob("*.c")):
        if {source / "tests/consumer", source / "tests/outside"} & set(path.parents):
            continue
        lists = next(each / "CMakeLists.txt" for each in path.parents if (each / "CMakeLists.txt").is_file())
        name = re.escape(str(path.relative_to(lists.parent)))
        if not re.search(r"(?<![\w/])" + name, lists.read_text()):
            yield f"{path.relative_to(source)}: not in {lists.relative_to(source)}"


def check_base(_, *objects):
    yield from check_objects(set(), *objects)


def check_core(source, *objects):
    outside = set(re.findall(r"\b(lshard__\w+)\(", (source / "src/base/outside.h").read_text()))
    yield from check_objects(declared(source) | outside, *objects)


def check_objects(allowed, *objects):
    if not objects:
        yield "no objects given"
    defined, undefined = set(), {}
    for path in objects:
        defined |= names(path, "-g", "--defined-only")
        for name in names(path, "-u"):
            undefined.setdefault(name, pathlib.Path(path).name)
    for name in sorted(set(undefined) - defined - LIBC - allowed):
        if not COMPILER.fullmatch(name):
            yield f"{undefined[name]}: needs {name}, which is neither in these objects nor what they may use of others"


def check_circles(_, *objects):
    """By what objects need of each other: the header that declares it is one for several files at times."""
    if not objects:
        yield "no objects given"
    owners = {name: path for path in objects for name in names(path, "-g", "--defined-only")}
    needs = {path: {} for path in objects}
    for path in objects:
        for name in sorted(names(path, "-u") & owners.keys()):
            needs[path].setdefault(owners[name], name)
    in_circles = set()
    for path in sorted(objects, key=file_of):
        circle = None if path in in_circles else shortest_circle(needs, path)
        if circle:
            in_circles |= set(circle)
            steps = (
                f"{file_of(one)} needs {needs[one][other]} of" for one, other in zip(circle, circle[1:] + circle[:1])
            )
            yield f"a circle of files: {' '.join(steps)} {file_of(path)}"


def file_of(path):
    return pathlib.Path(path).stem


def shortest_circle(needs, start):
    """The files from start to the last one, which needs start again; None where no way leads back."""
    ways = {start: [start]}
    ends = [start]
    for end in ends:
        if start in needs[end]:
            return ways[end]
        for other in sorted(needs[end].keys() - ways.keys()):
            ways[other] = [*ways[end], other]
            ends.append(other)
    return None


def declared(source):
    found = set()
    for header in PUBLIC:
        text = (source / "include" / header).read_text()
        found |= set(re.findall(r"^LSHARD_API\b[^;(]*?\b(\w+)\(", text, re.MULTILINE))
    return found


def check_exports(source, shared, archive):
    expected = declared(source)
    if len(expected) < 20:
        yield f"only {len(expected)} declarations found in the public headers; has their form changed?"
    for path, found in (
        (shared, names(shared, "-D", "--defined-only") - {"LAYERSHARD_0"}),
        (archive, names(archive, "-g", "--defined-only")),
    ):
        for name in sorted(expected - found):
            yield f"{path}: {name} is declared LSHARD_API but not there"
        for name in sorted(found - expected):
            yield f"{path}: {name} is visible but not declared LSHARD_API in a public header"


def main():
    checks = {
        "includes": check_includes,
        "base": check_base,
        "core": check_core,
        "circles": check_circles,
        "exports": check_exports,
    }
    if len(sys.argv) < 3 or sys.argv[1] not in checks:
        sys.exit(__doc__)
    violations = list(checks[sys.argv[1]](pathlib.Path(sys.argv[2]), *sys.argv[3:]))
    for violation in violations:
        print(violation)
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    main()
