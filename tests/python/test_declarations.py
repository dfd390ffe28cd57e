# SPDX-License-Identifier: Apache-2.0
"""The ctypes table against the headers: a C parser says what they declare, a compiled program what that amounts to."""

import ctypes
import os
import pathlib
import shutil
import subprocess

import pytest

from layershard import _declarations as c

pycparser = pytest.importorskip("pycparser", reason="pycparser is not installed: scripts/python_env.sh installs it")
from pycparser import c_ast  # noqa: E402

TREE = pathlib.Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
INCLUDE = ["-I", str(TREE / "include")]
HEADERS = "#include <layershard/callbacks.h>\n#include <layershard/plan.h>\n"

INTEGERS = {
    "int": ctypes.c_int,
    "char": ctypes.c_char,
    "size_t": ctypes.c_size_t,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
}


@pytest.fixture(scope="module")
def header():
    """What the headers declare themselves: functions, structures with members, enumerators; by name."""
    source = subprocess.run(
        [COMPILER, "-E", "-P", "-D__attribute__(x)=", "-D__extension__=", *INCLUDE, "-x", "c", "-"],
        input=HEADERS,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = {"functions": {}, "structures": {}, "enumerations": set(), "enumerators": [], "callbacks": {}}
    for each in pycparser.CParser().parse(source).ext:
        sort(each, found)
    return found


def sort(each, found):
    if isinstance(each, c_ast.Decl) and each.name and each.name.startswith("lshard_"):
        found["functions"][each.name] = each.type
    if not isinstance(each, c_ast.Typedef) or not each.name.startswith("lshard_"):
        return
    inner = each.type.type if isinstance(each.type, (c_ast.TypeDecl, c_ast.PtrDecl)) else None
    if isinstance(inner, c_ast.Struct) and inner.decls:
        found["structures"][each.name] = inner.decls
    elif isinstance(inner, c_ast.Enum):
        found["enumerations"].add(each.name)
        found["enumerators"] += [one.name for one in inner.values.enumerators]
    elif isinstance(inner, c_ast.FuncDecl):
        found["callbacks"][each.name] = inner


class Comparison:
    """Whether a C type and a ctypes type are the same to the machine, and the same structure."""

    def __init__(self, header):
        self._header = header

    def same(self, declared, given):
        if isinstance(declared, c_ast.ArrayDecl):
            length = ctypes.sizeof(given) // ctypes.sizeof(given._type_)
            return self._length(declared) in (length, None) and self.same(declared.type, given._type_)
        if isinstance(declared, c_ast.PtrDecl):
            return self._same_pointer(declared.type, given)
        if isinstance(declared, c_ast.FuncDecl):
            return self.same_function(declared, given._restype_, given._argtypes_)
        return self._same_name(declared.type, given)

    @staticmethod
    def _length(declared):
        return int(declared.dim.value) if isinstance(declared.dim, c_ast.Constant) else None

    def _same_name(self, declared, given):
        if isinstance(declared, c_ast.Struct):
            return given is c.STRUCTURES.get(declared.name)
        if not isinstance(declared, c_ast.IdentifierType):
            return False
        name = declared.names[-1]
        if name == "void":
            return given is None
        if name in self._header["enumerations"]:
            return given is ctypes.c_int
        if name in self._header["callbacks"]:
            return self.same_function(self._header["callbacks"][name], given._restype_, given._argtypes_)
        if name in c.STRUCTURES:
            return given is c.STRUCTURES[name]
        return given is INTEGERS[name]

    def _same_pointer(self, target, given):
        if isinstance(target, c_ast.FuncDecl):
            return self.same_function(target, given._restype_, given._argtypes_)
        if given is ctypes.c_void_p:  # may stand for any pointer to data
            return True
        if isinstance(target, c_ast.TypeDecl) and isinstance(target.type, c_ast.IdentifierType):
            if target.type.names == ["char"]:
                return given is ctypes.c_char_p
        return hasattr(given, "_type_") and not isinstance(given._type_, str) and self.same(target, given._type_)

    def same_function(self, declared, result, arguments):
        parameters = declared.args.params if declared.args else []
        if len(parameters) == 1 and getattr(parameters[0].type.type, "names", None) == ["void"]:
            parameters = []
        return (
            self.same(declared.type, result)
            and len(parameters) == len(arguments)
            and all(self.same(each.type, given) for each, given in zip(parameters, arguments))
        )


def test_every_function_is_there_and_nothing_else(header):
    assert set(c.FUNCTIONS) == set(header["functions"])


def test_functions_have_the_headers_types(header):
    comparison = Comparison(header)
    for name, (result, arguments) in c.FUNCTIONS.items():
        assert comparison.same_function(header["functions"][name], result, arguments), name


def test_every_structure_is_there_with_its_members_in_order(header):
    assert set(c.STRUCTURES) == set(header["structures"])
    for name, members in header["structures"].items():
        assert [member.name for member in members] == [field[0] for field in c.STRUCTURES[name]._fields_], name


def test_members_have_the_headers_types(header):
    comparison = Comparison(header)
    for name, members in header["structures"].items():
        for member, (_, given) in zip(members, c.STRUCTURES[name]._fields_):
            assert comparison.same(member.type, given), f"{name}.{member.name}"


def test_the_comparison_sees_a_difference(header):
    """Without this one, the tests above could pass whatever the table says."""
    comparison = Comparison(header)
    reach = header["functions"]["lshard_reach"]
    assert not comparison.same_function(reach, c.Status, [c.SERIES, ctypes.c_uint64, ctypes.c_void_p])
    assert not comparison.same_function(reach, c.Status, [c.SERIES, ctypes.c_uint32])
    assert not comparison.same_function(header["functions"]["lshard_version"], ctypes.c_int, [])
    create = header["functions"]["lshard_group_create"]
    assert not comparison.same_function(create, c.Status, [ctypes.POINTER(c.SeriesOptions), ctypes.POINTER(c.GROUP)])


# ---- What the compiler says ----

SIZED_BY_MACRO = {name: f"{name.upper()}_INIT" for name, each in c.STRUCTURES.items() if issubclass(each, c.Sized)}
PROBE = (
    HEADERS
    + """
#include <stdio.h>
static void hex(const char *name, const void *at, size_t n)
{
	printf("%s=", name);
	for (size_t i = 0; i < n; i++)
		printf("%02x", ((const unsigned char *)at)[i]);
	printf("\\n");
}
int main(void)
{
"""
)


def probe_text(header):
    lines = []
    for name in ("MAJOR", "MINOR", "PATCH"):
        lines.append(f'printf("{name}=%d\\n", LSHARD_VERSION_{name});')
    for name in [*header["enumerators"], "LSHARD_BELOW_K_NAMED"]:
        lines.append(f'printf("{name}=%d\\n", (int){name});')
    for name, structure in c.STRUCTURES.items():
        lines.append(f'printf("sizeof {name}=%zu\\n", sizeof({name}));')
        for field in structure._fields_:
            lines.append(f'printf("{name}.{field[0]}=%zu\\n", offsetof({name}, {field[0]}));')
    for name, macro in SIZED_BY_MACRO.items():
        lines.append(f'{{ static const {name} it = {macro}; hex("{macro}", &it, sizeof it); }}')
    return PROBE + "\n".join(lines) + "\nreturn 0;\n}\n"


@pytest.fixture(scope="module")
def compiled(header, tmp_path_factory):
    """What a C program sees, by name."""
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.c").write_text(probe_text(header))
    subprocess.run([COMPILER, *INCLUDE, "-o", folder / "probe", folder / "probe.c"], check=True)
    lines = subprocess.run([folder / "probe"], check=True, capture_output=True, text=True).stdout.splitlines()
    return dict(line.split("=") for line in lines)


def test_sizes_and_offsets_are_the_compilers(compiled):
    for name, structure in c.STRUCTURES.items():
        assert int(compiled[f"sizeof {name}"]) == ctypes.sizeof(structure), name
        for field in structure._fields_:
            assert int(compiled[f"{name}.{field[0]}"]) == getattr(structure, field[0]).offset, (name, field[0])


def test_what_has_no_size_of_its_own_is_in_an_array():
    """Its size is in the options, so that every structure can grow."""
    assert set(c.STRUCTURES) - set(SIZED_BY_MACRO) == {"lshard_tensor", "lshard_poison_pattern"}


def test_defaults_are_the_headers(compiled):
    for name, macro in SIZED_BY_MACRO.items():
        assert bytes.fromhex(compiled[macro]) == bytes(c.STRUCTURES[name]()), name


def test_numbers_and_version_are_the_headers(header, compiled):
    ours = {f"LSHARD_{name}": value for name, value in c.STATUS.items()}
    for prefix, words in (
        ("LOG_", c.LOG_LEVEL),
        ("MEMORY_", c.MEMORY),
        ("", c.PLACEMENT),
        ("STRIPE_", c.STRIPE),
        ("POISON_", c.POISON),
        ("LARGE_PAGES_", c.LARGE_PAGES),
        ("NUMA_", c.NUMA),
        ("REJOIN_", c.REJOIN),
    ):
        ours.update({f"LSHARD_{prefix}{word.upper()}": value for word, value in words.items()})
    theirs = {name: int(compiled[name]) for name in header["enumerators"] if not name.startswith("LSHARD_FOR_")}
    assert ours == theirs
    assert c.BELOW_K_NAMED == int(compiled["LSHARD_BELOW_K_NAMED"])
    assert c.VERSION == tuple(int(compiled[name]) for name in ("MAJOR", "MINOR", "PATCH"))
