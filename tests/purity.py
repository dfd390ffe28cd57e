#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Hold the borders between the parts of the code that a compiler does not hold.

    purity.py includes SOURCE_DIR            who includes whom; file names are unique; no file is left out of the build
    purity.py base SOURCE_DIR OBJECT...      what the base's objects ask of the world: nothing
    purity.py core SOURCE_DIR OBJECT...      what the core's objects, given with the base's, ask of it: outside.h
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
FREESTANDING = {"inttypes.h", "limits.h", "stdarg.h", "stdatomic.h", "stdbool.h", "stddef.h", "stdint.h", "stdio.h",
                "stdlib.h", "string.h"}

PURE = {"base", "core"}

# Folders outside of src with a CMakeLists.txt of their own.
OUTSIDE = ("examples/llama", "tools/support")

# Of a directory's files: the quoted headers they may include besides their own directory's, and the public ones.
BORDERS = {
    "base": (set(), PUBLIC),
    "core": ({"base/*"}, PUBLIC),
    "host": ({"base/*"}, PUBLIC),
    "transport": ({"base/*", "host/*"}, PUBLIC),
    "cli": ({"tools/support/*"}, PROGRAMS),
    "tools/support": (set(), PROGRAMS),
    "examples/llama": ({"tools/support/*"}, PROGRAMS),
}

# Bytes, text and the default allocator: all that base and core may use of the C library.
LIBC = {"memchr", "memcmp", "memcpy", "memmove", "memset", "strchr", "strcmp", "strcpy", "strlen", "strncmp", "strnlen",
        "strtoull", "snprintf", "vsnprintf", "calloc", "free", "malloc"}

# What compilers and linkers add of their own accord (stack protector, fortified variants of LIBC).
COMPILER = re.compile(r"_GLOBAL_OFFSET_TABLE_|__stack_chk_fail|__(%s)_chk" % "|".join(LIBC))


def names(path, *options):
    output = subprocess.run(["nm", "-P", *options, str(path)], check=True, capture_output=True, text=True).stdout
    return {line.split()[0].split("@")[0] for line in output.splitlines() if len(line.split()) > 1}


def folder_of(source, part):
    return source / part if part in OUTSIDE else source / "src" / part


def headers_of(source, part):
    return {path.name for path in folder_of(source, part).glob("*.h")}


def check_includes(source):
    own = {part: headers_of(source, part) for part in BORDERS}
    for part, (foreign, public) in BORDERS.items():
        allowed = own[part] | {name for name in foreign if "/" not in name}
        for pattern in foreign:
            allowed |= own.get(pattern.rpartition("/")[0], set()) if pattern.endswith("/*") else set()
        files = sorted(folder_of(source, part).glob("*.[ch]"))
        if not files:
            yield f"{folder_of(source, part)}: no files; is this the right directory?"
        for path in files:
            yield from check_file(path, path.relative_to(source), allowed, public, part in PURE)
    yield from check_unique(source)
    for top in ("src", "tests", *OUTSIDE):
        yield from check_listed(source, top)


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
            yield f"{shown}:{number}: <{header}>: src/{shown.parts[1]} uses no operating system"


def check_unique(source):
    places = collections.defaultdict(list)
    for top in ("include", "src", "tests", "examples", "tools", "bench"):
        for path in (source / top).rglob("*"):
            if path.suffix in (".c", ".h", ".cc"):
                places[path.name].append(str(path.relative_to(source)))
    places.pop("main.c", None)  # each program has one
    for name, paths in sorted(places.items()):
        if len(paths) > 1:
            yield f"{name}: more than one file has this name: {', '.join(sorted(paths))}"


def check_listed(source, top):
    listed = (source / top / "CMakeLists.txt").read_text()
    for path in sorted((source / top).rglob("*.c")):
        name = str(path.relative_to(source / top))
        if not name.startswith("consumer/") and not re.search(r"(?<![\w/])" + re.escape(name), listed):
            yield f"{top}/{name}: not in {top}/CMakeLists.txt"


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
    for path, found in ((shared, names(shared, "-D", "--defined-only") - {"LAYERSHARD_0"}),
                        (archive, names(archive, "-g", "--defined-only"))):
        for name in sorted(expected - found):
            yield f"{path}: {name} is declared LSHARD_API but not there"
        for name in sorted(found - expected):
            yield f"{path}: {name} is visible but not declared LSHARD_API in a public header"


def main():
    checks = {"includes": check_includes, "base": check_base, "core": check_core, "exports": check_exports}
    if len(sys.argv) < 3 or sys.argv[1] not in checks:
        sys.exit(__doc__)
    violations = list(checks[sys.argv[1]](pathlib.Path(sys.argv[2]), *sys.argv[3:]))
    for violation in violations:
        print(violation)
    sys.exit(1 if violations else 0)


main()
