# SPDX-License-Identifier: Apache-2.0
"""A rank of a sharded model that is killed and started again while the other passes on: it takes the weights over from
memory, computes what an unshared model computes, and takes part in what all ranks do from then on."""

import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch
from patience import LONG_S
from torch import nn

import layershard.torch

WIDTH = 64
LAYERS = 5
NAMES = "*.proj"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.proj(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


def plain(seed):
    torch.manual_seed(seed)
    return Model()


def wait_for(path):
    deadline = time.monotonic() + LONG_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} does not come"
        time.sleep(0.01)


def check(model, seed):
    x = torch.randn(4, 8)
    with torch.no_grad():
        assert torch.equal(model(x), plain(seed)(x)), f"the outputs are not those of seed {seed}"


def rank(number, job, folder, mode):
    """Rank 0 passes until rank 1 has come back; then both verify, and both load other weights."""
    given = dict(plain(0).named_parameters())
    asked = []

    def give(name, _tensor):
        asked.append(name)
        return given[name]

    if mode == "empty":
        with layershard.torch.empty_weights():
            model = Model()
    else:
        model = plain(0)
    layershard.torch.shard(
        model, NAMES, {"rank": number, "size": 2, "job": job}, transport=(folder / "transport").read_text()
    )
    if mode == "empty":
        layershard.torch.fill(model, give)
        assert asked and not [name for name in asked if name.startswith("layers")], asked
    check(model, 0)
    if number == 1 and mode == "real":
        (folder / "passed").touch()
        time.sleep(LONG_S)
    while number == 0 and not (folder / "returned").exists():
        check(model, 0)
    (folder / "returned").touch()
    handle = layershard.torch.of(model)
    assert len(handle.verify()) == 1
    given.update(plain(1).named_parameters())
    layershard.torch.load(model, folder / "new.safetensors")
    check(model, 1)
    handle.close()


@pytest.mark.parametrize("transport", ["shm", "shm:copy"])
def test_a_rank_takes_over_what_the_other_kept(tmp_path, transport):
    from safetensors.torch import save_file

    save_file({name: value.detach() for name, value in plain(1).named_parameters()}, tmp_path / "new.safetensors")
    (tmp_path / "transport").write_text(transport)
    environment = {**os.environ, "LAYERSHARD_REJOIN": "allow", "LAYERSHARD_TIMEOUT_MS": str(LONG_S * 1000)}
    started = []

    def start(number, mode):
        command = [sys.executable, __file__, str(number), tmp_path.name, str(tmp_path), mode]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        return started[-1]

    try:
        first, second = start(0, "real"), start(1, "real")
        wait_for(tmp_path / "passed")
        second.kill()
        second.wait()
        third = start(1, "empty")
        for each in (third, first):
            _, told = each.communicate(timeout=LONG_S)
            assert each.returncode == 0, told
    finally:
        for each in started:
            each.kill()
            each.wait()


if __name__ == "__main__":
    rank(int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]), sys.argv[4])
