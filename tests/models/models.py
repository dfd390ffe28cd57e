# SPDX-License-Identifier: Apache-2.0
"""models.py TEST_RING_MODEL: the models of this folder, searched by Spin through all their states; each of their
mutants, which Spin has to find; and ring.c driven through what ring.pml prints. Exits 77 without Spin."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
SCENARIOS = 4
STEPS = 4000


def run(command: list[str], folder: str, text: str | None = None) -> str:
    done = subprocess.run(command, cwd=folder, input=text, text=True, capture_output=True, timeout=170, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def search(model: str, defines: list[str]) -> tuple[int, int]:
    """The number of states, and of errors (of which the search ends at the first)."""
    with tempfile.TemporaryDirectory() as folder:
        run(["spin", *defines, "-a", str(HERE / model)], folder)
        run([os.environ.get("CC", "cc"), "-w", "-O2", "-DMEMLIM=2000", "-DSAFETY", "-o", "pan", "pan.c"], folder)
        said = run(["./pan", "-m2000000"], folder)
    if "errors: 0" in said and ("max search depth too small" in said or "Search not completed" in said):
        sys.exit(f"{model} {defines}: the search was cut short")
    states = re.search(r"(\d+) states, stored", said)
    errors = re.search(r"errors: (\d+)", said)
    assert states and errors, said
    return int(states[1]), int(errors[1])


def must_hold(model: str, defines: list[str]) -> int:
    states, errors = search(model, defines)
    print(f"{model} {' '.join(defines)}: {states} states", flush=True)
    if errors:
        sys.exit(f"{model}: Spin has found a fault")
    return states


def must_fail(model: str, defines: list[str]) -> None:
    for mutant in sorted(set(re.findall(r"MUTANT_[A-Z_]+[A-Z]", (HERE / model).read_text()))):
        if not search(model, [*defines, f"-D{mutant}"])[1]:
            sys.exit(f"{model}: Spin does not find {mutant}")
        print(f"{model} {mutant}: found", flush=True)


def slot_map(remote: list[int], layers: int, prefetch: int) -> list[int]:
    """As docs/design.md has it: equal blocks, of all rotations the first of the best."""
    count = len(remote)
    blocks = -(-count // min(prefetch + 1, count))

    def turned(rotation: int) -> list[int]:
        slots = [255] * layers
        for block in range(blocks):
            begin = block * count // blocks
            for index in range(begin, (block + 1) * count // blocks):
                slots[remote[(index + rotation) % count]] = index - begin
        return slots

    def badness(slots: list[int]) -> tuple[int, int, int]:
        distances = []
        for layer in remote:
            back = next(step for step in range(1, layers + 1) if slots[(layer - step) % layers] == slots[layer])
            distances.append(back - 1 if back < layers else layers)
        short = [distance for distance in distances if distance < prefetch]
        return short.count(0), prefetch - min([prefetch, *short]), len(short)

    return min((turned(rotation) for rotation in range(count)), key=badness)


def ring(program: str) -> None:
    total = calls = 0
    for ranks, layers, prefetch in [(2, 5, 0), (2, 5, 1), (3, 4, 1), (3, 5, 2)]:
        for rank in range(ranks):
            remote = [layer for layer in range(layers) if layer % ranks != rank]
            slots = slot_map(remote, layers, prefetch)
            windows = max(slot for slot in slots if slot < 255) + 1
            for horizon in {prefetch, layers}:
                defines = [f"-DN={layers}", f"-DWINDOWS={windows}", f"-DHORIZON={horizon}"]
                defines.append(f"-DSLOTS={{{','.join(map(str, slots))}}}")
                total += must_hold("ring.pml", defines)
                bits = sum(1 << layer for layer in remote)
                head = f"map {layers} {bits} {prefetch} {horizon} {' '.join(map(str, slots))}\n"
                calls += sum(replay(program, defines, head, windows, seed) for seed in range(1, SCENARIOS + 1))
    print(f"ring.pml: {total} states; ring.c agrees in {calls} calls", flush=True)
    must_fail("ring.pml", ["-DN=4", "-DWINDOWS=2", "-DHORIZON=4", "-DSLOTS={255,0,1,0}"])


def replay(program: str, defines: list[str], head: str, windows: int, seed: int) -> int:
    call = rf"call \w+ \d+ \d+( +\d+/\d+){{{windows}}}"  # the last one is cut off in its middle
    with tempfile.TemporaryDirectory() as folder:
        said = run(["spin", *defines, f"-n{seed}", f"-u{STEPS}", "-T", str(HERE / "ring.pml")], folder)
        whole = "".join(line + "\n" for line in said.splitlines() if re.fullmatch(call, line))
        return int(run([program], folder, head + whole))


if not shutil.which("spin"):
    print("skipped: there is no spin")
    sys.exit(77)
ring(sys.argv[1])
for n in (2, 3):
    must_hold("update.pml", [f"-DRANKS={n}", "-DUPDATES=2"])
must_fail("update.pml", ["-DRANKS=3", "-DUPDATES=2"])
for n, sources in [(2, 2), (3, 2), (3, 3)]:
    must_hold("rejoin.pml", [f"-DRANKS={n}", f"-DSOURCES={sources}", "-DDEATHS=2", "-DUPDATES=2"])
must_fail("rejoin.pml", ["-DRANKS=3", "-DSOURCES=2", "-DDEATHS=2", "-DUPDATES=2"])
