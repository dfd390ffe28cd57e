# SPDX-License-Identifier: Apache-2.0
"""The package as it is delivered: one wheel, no dependencies, the right library found."""

import ast
import graphlib
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from patience import LONG_S

import layershard

TREE = pathlib.Path(__file__).resolve().parents[2]


def python(*arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "LAYERSHARD_LIBRARY"}
    environment = {**kept, **environment}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=LONG_S, cwd="/"
    )


ASK = "import layershard; print(layershard.version())"


def test_importing_needs_no_library_and_no_other_package():
    done = python(
        "-c",
        "import sys, layershard; layershard.Tensor('w', 4); "
        "print(sorted(set(sys.modules) & {'torch', 'numpy', 'layershard.torch'}))",
        LAYERSHARD_LIBRARY="/nowhere/liblayershard.so",
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_what_needs_torch_says_what_to_install():
    done = python("-c", "import sys; sys.modules['torch'] = None; import layershard; layershard.shard")
    assert done.returncode != 0
    assert "layershard.shard needs PyTorch: pip install 'layershard[torch]'" in done.stderr


def test_a_library_that_is_not_there_is_named():
    done = python("-c", ASK, LAYERSHARD_LIBRARY="/nowhere/liblayershard.so")
    last = done.stderr.splitlines()[-1]
    assert "LibraryError" in last and "/nowhere/liblayershard.so (LAYERSHARD_LIBRARY)" in last and "make" in last


def test_nothing_found_says_what_to_do(tmp_path):
    shutil.copytree(TREE / "python" / "layershard", tmp_path / "layershard")
    done = python("-c", ASK, PYTHONPATH=str(tmp_path))
    last = done.stderr.splitlines()[-1]
    assert "LibraryError" in last and "liblayershard.so.0.1" in last and "LAYERSHARD_LIBRARY" in last


def test_an_editable_installation_has_the_library_in_a_folder_of_its_own(tmp_path):
    shutil.copytree(TREE / "python" / "layershard", tmp_path / "source" / "layershard")
    (tmp_path / "installed" / "lib").mkdir(parents=True)
    shutil.copy(os.environ["LAYERSHARD_LIBRARY"], tmp_path / "installed" / "lib" / "liblayershard.so")
    text = ASK.replace(";", f"; layershard.__path__.append({str(tmp_path / 'installed')!r});")
    done = python("-c", text, PYTHONPATH=str(tmp_path / "source"))
    assert done.stdout == f"{layershard.__version__}\n", done.stderr


def compile_library(folder, text):
    (folder / "other.c").write_text(text)
    compiler = os.environ.get("CC") or "cc"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "other.so", folder / "other.c"], check=True)
    return str(folder / "other.so")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('const char *lshard_version(void) { return "0.99.0"; }', "is version 0.99.0 of the library"),
        ("int something_else;", "is not layershard's library: it has no function lshard_version"),
        (f'const char *lshard_version(void) {{ return "{layershard.__version__}"; }}', "lacks the function lshard_"),
    ],
)
def test_another_library_is_refused(tmp_path, text, expected):
    done = python("-c", ASK, LAYERSHARD_LIBRARY=compile_library(tmp_path, text))
    last = done.stderr.splitlines()[-1]
    assert "LibraryError" in last and expected in last


def test_a_file_that_is_no_library_is_refused(tmp_path):
    (tmp_path / "text.so").write_text("not a library")
    done = python("-c", ASK, LAYERSHARD_LIBRARY=str(tmp_path / "text.so"))
    assert "cannot load the shared library" in done.stderr.splitlines()[-1]


# ---- Modules ----

PACKAGE = TREE / "python"


def modules():
    """Each module's full name, with its file."""
    files = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): path for parts, path in files.items()}


def imports(name, path, known):
    """What a module of the package imports of it, anywhere in the file and for types as well."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name in known)
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from {f"{base}.{each.name}" if f"{base}.{each.name}" in known else base for each in node.names}


def test_no_module_imports_itself_in_a_circle():
    known = modules()
    graph = {name: {each for each in imports(name, path, known) if each in known} for name, path in known.items()}
    assert len(graph) > 40 and "layershard.group" in graph["layershard.torch.shared"]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as circle:
        pytest.fail(" <- ".join(circle.args[1]))


def test_no_two_modules_have_one_name():
    names = [name.rpartition(".")[2] for name, path in modules().items() if path.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))


# ---- The wheel ----


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("scikit_build_core", reason="scikit-build-core is missing: scripts/python_env.sh installs it")
    folder = tmp_path_factory.mktemp("wheel")
    done = python("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder), str(TREE))
    assert done.returncode == 0, done.stderr
    (found,) = folder.iterdir()
    return found


def test_one_wheel_serves_every_python(wheel):
    assert wheel.name.startswith(f"layershard-{layershard.__version__}-py3-none-linux_")
    names = zipfile.ZipFile(wheel).namelist()
    headers = [f"include/layershard/{path.name}" for path in (TREE / "include" / "layershard").iterdir()]
    assert {f"layershard/{name}" for name in ["py.typed", "lib/liblayershard.so", *headers]} <= set(names)
    assert all(name.startswith(("layershard/", "layershard-")) for name in names)
    assert sum(".so" in name or name.endswith(".a") for name in names) == 1


def test_the_wheel_works_from_where_it_is_installed(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    done = python(
        "-c",
        "import layershard, pathlib\n"
        "with layershard.Group(0, 1) as group: print(group.size, layershard.__file__)\n"
        "print(pathlib.Path(layershard.get_include(), 'layershard', 'layershard.h').is_file())\n"
        "print([line for line in open('/proc/self/maps') if 'liblayershard' in line][0].split()[-1])",
        PYTHONPATH=str(tmp_path),
    )
    assert done.stdout.splitlines() == [
        f"1 {tmp_path}/layershard/__init__.py",
        "True",
        f"{tmp_path}/layershard/lib/liblayershard.so",
    ], done.stderr


def test_extras_are_declared_and_nothing_is_required(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    assert {line.split()[-1] for line in lines if line.startswith("Provides-Extra")} == {"torch", "diffusers", "vllm"}
    assert all("extra ==" in line for line in lines if line.startswith("Requires-Dist"))
    assert "Requires-Python: >=3.10" in lines


# ---- Syntax ----


def test_the_oldest_python_knows_the_syntax():
    """ruff knows each version's: it is told py310 in pyproject.toml."""
    pytest.importorskip("ruff", reason="ruff is not installed: scripts/python_env.sh installs it")
    folders = [str(TREE / each) for each in ("python", "tests/python", "examples/python")]
    done = python("-m", "ruff", "check", "--no-cache", *folders)
    assert done.returncode == 0, done.stdout
    too_new = "match 1:\n    case 1: pass\ntype A = int\ntry: pass\nexcept* OSError: pass\n"
    told = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", str(TREE / "pyproject.toml"), "-"],
        input=too_new,
        capture_output=True,
        text=True,
        timeout=LONG_S,
    )
    assert "Cannot use `type` alias statement on Python 3.10" in told.stdout, told.stdout
