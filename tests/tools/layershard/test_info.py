# SPDX-License-Identifier: Apache-2.0
"""`layershard info`, --version and --help."""

import json
import pathlib
import re

import pytest
from programs import TREE, two_nodes


def test_version_is_the_header_s(program):
    header = (TREE / "include" / "layershard" / "layershard.h").read_text()
    version = ".".join(re.search(rf"LSHARD_VERSION_{part} (\d+)", header)[1] for part in ("MAJOR", "MINOR", "PATCH"))
    assert program.run("--version").stdout == f"layershard {version}\n"
    info = json.loads(program.run("info", "--json").stdout)
    assert list(info)[0] == "schema" and info["schema"] == "layershard-info/1" and info["version"] == version


@pytest.mark.parametrize("command", [[], ["info"]], ids=str)
def test_help_goes_to_standard_output(program, command):
    done = program.run(*command, "--help")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("Usage: layershard")
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_transports_say_whether_they_can_be_used(program):
    info = json.loads(program.run("info", "--json").stdout)
    transports = {transport["name"]: transport for transport in info["transports"]}
    assert {"shm", "local", "cuda"} <= set(transports)
    assert transports["shm"]["memory"] == "host" and transports["cuda"]["memory"] == "device"
    assert transports["callback"]["memory"] == "host or device"
    for transport in transports.values():
        assert transport["summary"]
        assert transport["available"] == (transport["reason"] == ""), "a reason exactly where it is missing"


def test_a_driver_that_is_not_there_is_named(program):
    environment = {"LAYERSHARD_CUDA_SO_PATH": "/nowhere/libcuda.so.1"}
    info = json.loads(program.run("info", "--json", env=environment).stdout)
    cuda = next(transport for transport in info["transports"] if transport["name"] == "cuda")
    assert not cuda["available"] and "/nowhere/libcuda.so.1" in cuda["reason"]
    text = program.run("info", env=environment).stdout
    assert f"not available here: {cuda['reason']}" in " ".join(text.split())


def test_variables_show_their_values(program):
    info = json.loads(program.run("info", "--json", env={"LAYERSHARD_TIMEOUT_MS": "1234"}).stdout)
    variables = {variable["name"]: variable for variable in info["variables"]}
    assert variables["LAYERSHARD_TIMEOUT_MS"]["value"] == "1234"
    assert variables["LAYERSHARD_TIMEOUT_MS"]["default"] == "30000"
    for name in ("RANK", "SIZE", "JOB", "TRANSPORT", "LOG"):
        assert variables["LAYERSHARD_" + name]["help"], name
    text = program.run("info", env={"LAYERSHARD_TIMEOUT_MS": "1234"}).stdout
    assert "LAYERSHARD_TIMEOUT_MS=1234" in text and "(default: 30000)" in text


def test_every_variable_the_sources_read_is_listed(program):
    """A variable that nobody can look up is one that nobody can debug."""
    listed = {variable["name"] for variable in json.loads(program.run("info", "--json").stdout)["variables"]}
    read = set()
    for path in (path for folder in ("src", "tools", "bench") for path in (TREE / folder).rglob("*.c")):
        read |= set(re.findall(r'getenv\("([A-Z_]+)"\)|"(LAYERSHARD_[A-Z_]+)"', path.read_text()))
    read = {name for pair in read for name in pair if name} - {"TERM", "OPENBLAS_NUM_THREADS"}  # those are not ours
    assert {"LAYERSHARD_CUDA_SO_PATH", "LAYERSHARD_LOG"} <= read
    assert read and read <= listed


def test_a_misspelt_variable_is_named(program):
    environment = {"LAYERSHARD_TRANSPRT": "shm", "LAYERSHARD_TRANSPORT": "shm", "LAYERSHARD_JO": "a=b"}
    info = json.loads(program.run("info", "--json", env=environment).stdout)
    assert {"LAYERSHARD_TRANSPRT", "LAYERSHARD_JO"} <= set(info["unknown_variables"])
    assert not set(info["unknown_variables"]) & {variable["name"] for variable in info["variables"]}
    text = program.run("info", env=environment).stdout
    assert "misspelt" in text and "\n  LAYERSHARD_TRANSPRT\n" in text[text.index("misspelt") :]


def test_values_that_are_not_utf_8_are_shown(program):
    done = program.run("info", "--json", env={"LAYERSHARD_JOB": b"a\xff"})
    variables = {variable["name"]: variable for variable in json.loads(done.stdout)["variables"]}
    assert variables["LAYERSHARD_JOB"]["value"] == "a\N{REPLACEMENT CHARACTER}"


def test_short_help_and_unknown_short_options(program):
    assert program.run("info", "-h").stdout == program.run("info", "--help").stdout != ""
    done = program.run("info", "-xy")
    assert done.returncode == 2 and "'-x' is no option" in done.stderr


def test_nodes_are_those_of_the_machine(program):
    nodes = program.json("info")["numa_nodes"]
    folder = pathlib.Path("/sys/devices/system/node")
    assert [node["number"] for node in nodes] == sorted(int(each.name[4:]) for each in folder.glob("node[0-9]*"))
    assert sum(node["here"] for node in nodes) == min(1, len(nodes))
    if len(nodes) == 1:
        assert (
            "NUMA nodes (shards: LAYERSHARD_NUMA=none, of which one node makes nothing)" in program.run("info").stdout
        )


def test_nodes_of_a_larger_machine(program):
    nodes = program.json("info", env=two_nodes())["numa_nodes"]
    assert [node["processors"] for node in nodes] == ["0-15,32-47", "16-31,48-63", ""]
    assert [node["here"] for node in nodes] == [False, True, False]
    assert [node["usable"] for node in nodes] == [True, True, False]
    assert nodes[1]["memory_bytes"] == 2 << 30 and nodes[1]["free_bytes"] == 1 << 30
    text = program.run("info", env={**two_nodes(), "LAYERSHARD_NUMA": "copy"}).stdout
    assert "\nNUMA nodes (shards: LAYERSHARD_NUMA=copy)\n" in text
    assert "processors 16-31,48-63; 1.0 of 2.0 GiB free; this process runs here" in text
    assert "processors none; 1.0 of 1.0 GiB free; not for this process's shards" in " ".join(text.split())
