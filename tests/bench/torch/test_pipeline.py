# SPDX-License-Identifier: Apache-2.0
"""bench/torch/pipeline.py and long_prompt.py on CPUs, with shapes of a few KiB: every variant computes what the
replicated model does, or is named with a reason."""

import json
import pathlib
import statistics
import sys
import types

import forked_scripts
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("torch.distributed.fsdp._fully_shard", reason="this torch has no fully_shard")

TREE = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(TREE / "bench" / "torch"))

import long_prompt  # noqa: E402
import pipeline  # noqa: E402
import pipeline_schemes  # noqa: E402
import sequence_model  # noqa: E402
import torch_launch  # noqa: E402

torch.set_num_threads(1)  # a forked process cannot use the parent's OpenMP threads

SMALL = "--devices cpu,cpu --shape 32,88,4,2 --layers 4 --rounds 2 --margin 1000".split()
BY_MESSAGES = "PP2 by send and recv"


def run(module, folder, *options):
    script = TREE / "bench" / "torch" / f"{module.__name__}.py"
    done = forked_scripts.run(module.main, [script, *SMALL, *options], folder, torch_launch)
    if done.returncode:
        return done, None
    return done, json.loads((folder / "found.json").read_text(encoding="utf-8"))["result"]


def rows_of(table):
    return {row["variant"]: row for row in table["rows"] if not row["again"]}


# ---- Requests -----------------------------------------------------------------------------------------------------


def test_all_ways_to_serve_requests_compute_the_same(tmp_path):
    options = ["--tokens", "32", "--most-tokens", "64", "--requests", "4", "--save", tmp_path / "found.json"]
    done, result = run(pipeline, tmp_path, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    equal, mixed, one = result["tables"]
    assert equal["lengths"] == [32] * 4 and one["lengths"] == [32] * 2 and len(set(mixed["lengths"])) > 1
    for table in result["tables"]:
        rows = rows_of(table)
        assert rows.keys() == {"replicated", "layershard k=1", "TP2", BY_MESSAGES, f"{BY_MESSAGES} in chunks"}
        assert all(rows[name]["bits_equal"] for name in ("replicated", "layershard k=1", BY_MESSAGES))
        assert all(row["tokens_per_second"] > 0 and row["first_token_ms"]["median"] > 0 for row in rows.values())
        assert rows[BY_MESSAGES]["weight_bytes"] * 2 == rows["replicated"]["weight_bytes"]
        assert {each["variant"] for each in table["not_run"]} == {"PP2"}


def test_loads_that_are_not_there(tmp_path):
    done, _ = run(pipeline, tmp_path, "--loads", "equal,odd")
    assert done.returncode == 2 and "there is no 'odd'" in done.stderr


def test_lengths_have_the_mean_and_the_spread_that_were_asked_for():
    lengths = pipeline.lognormal(4000, 2048, 1.0, 1 << 20)
    assert statistics.mean(lengths) == pytest.approx(2048, rel=0.08)
    logarithms = [torch.tensor(each).log().item() for each in lengths]
    assert statistics.stdev(logarithms) == pytest.approx(1, rel=0.08)
    assert all(each % 16 == 0 for each in lengths) and max(pipeline.lognormal(400, 2048, 1.0, 4096)) == 4096


def test_requests_go_to_who_has_had_least():
    assert pipeline.share([8, 2, 2, 2, 8], 2) == [[0], [1, 2, 3, 4]]
    assert pipeline.share([8, 2, 2], 1) == [[0, 1, 2]]


def test_first_tokens_and_steady_speed():
    ends = [{0: 2.0, 2: 4.0}, {1: 3.0}]
    assert pipeline.first_tokens(ends, one_at_a_time=False) == [2.0, 3.0, 4.0]
    assert pipeline.first_tokens(ends, one_at_a_time=True) == [2.0, 1.0, 1.0]
    assert pipeline.steady(ends, [10, 10, 30]) == 15.0  # rank 0 alone has a second one
    assert pipeline.steady([{0: 1.0}], [10]) is None


# ---- How activations travel ---------------------------------------------------------------------------------------


class Pad:
    """Symmetric memory's signals: one that was not taken may not be given again."""

    def __init__(self):
        self.given = set()

    def put_signal(self, rank, channel):
        assert channel not in self.given
        self.given.add(channel)

    def wait_signal(self, rank, channel):
        self.given.remove(channel)


def test_places_are_written_again_when_they_were_given_back():
    ranks = types.SimpleNamespace(rank=0, size=2)
    memory, pad = torch.zeros(4, 8, 2), Pad()

    def side(rank):
        made = object.__new__(pipeline_schemes.Signals)
        made.ranks, made.memory, made.next, made.handle = types.SimpleNamespace(rank=rank, size=2), memory, memory, pad
        made.written = made.read = 0
        return made

    sender, receiver = side(ranks.rank), side(1)
    arriving = receiver.arrivals([3] * 12)
    for number in range(4):
        sender.send(torch.full((1, 3, 2), float(number)))
    with pytest.raises(KeyError):  # on a GPU it would wait
        sender.send(torch.zeros(1, 3, 2))
    for number in range(4, 12):
        assert next(arriving).eq(number - 4).all()
        if number > 4:
            sender.send(torch.full((1, 3, 2), float(number - 1)))
    receiver.tell()
    sender.told()


# ---- One long prompt ----------------------------------------------------------------------------------------------


def test_all_ways_to_divide_a_prompt_compute_the_same(tmp_path):
    options = ["--tokens", "32,64", "--chunk", "8", "--save", tmp_path / "found.json"]
    done, result = run(long_prompt, tmp_path, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [table["tokens"] for table in result["tables"]] == [32, 64]
    for table in result["tables"]:
        rows = rows_of(table)
        context = ["context parallel", "context parallel, layershard k=1", "context parallel, FSDP2 p=1"]
        assert rows.keys() == {*context, "TP2 sequence parallel", f"{BY_MESSAGES} in chunks"}
        assert all(rows[name]["bits_equal"] for name in context)
        assert all(0 <= row["distance"] < 1e-5 for row in rows.values())
        assert rows["TP2 sequence parallel"]["weight_bytes"] * 2 == rows["context parallel"]["weight_bytes"]
        assert {each["variant"] for each in table["not_run"]} == {"PP2", "TP2 sequence parallel overlapped"}
    assert [row["result"] for row in result["targets"]] == ["not run", "not run"]


def test_tokens_that_cannot_be_divided(tmp_path):
    done, _ = run(long_prompt, tmp_path, "--tokens", "30")
    assert done.returncode == 2 and "4 pieces are needed" in done.stderr


@pytest.mark.parametrize("size", [1, 2, 3])
def test_pieces_are_each_position_once_and_as_much_work(size):
    pieces = [sequence_model.pieces_of(rank, size, 12 * size) for rank in range(size)]
    positions = torch.arange(12 * size)
    everyones = torch.stack([torch.cat([positions[each] for each in mine]) for mine in pieces])
    assert sequence_model.in_order(everyones[..., None]).flatten().equal(positions)
    work = [sum(int(positions[each].sum()) for each in mine) for mine in pieces]
    assert len(set(work)) == 1


def test_the_last_positions_attend_to_all_before_them():
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, 8, 4, generator=draw) for heads in (4, 2, 2))
    whole = sequence_model.attend(q, k, v)
    assert torch.allclose(sequence_model.attend(q[:, :, 5:], k, v), whole[:, :, 5:], atol=1e-6)
