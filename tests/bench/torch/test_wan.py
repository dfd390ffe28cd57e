# SPDX-License-Identifier: Apache-2.0
"""bench/torch/wan.py on processors: the whole program at a tiny shape, and what its figures are made of."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import threading

import forked_scripts
import pytest
from patience import LONG_S

import torch_ranks as ranks

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")

BENCH = pathlib.Path(__file__).resolve().parents[3] / "bench" / "torch"
TINY = ["--shape", "tiny", "--video", "64x32x9", "--text-tokens", "6", "--rounds", "2", "--warm-ms", "1"]
TINY += ["--alltoall-rounds", "2", "--passes", "1"]
BLOCKS = 8


def load(name):
    """A script of bench/torch/ as a module; those beside it it finds as it does when it is run."""
    if str(BENCH) not in sys.path:
        sys.path.append(str(BENCH))
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def wan(folder, *arguments):
    from diffusers import WanTransformer3DModel  # noqa: F401

    import layershard.diffusers  # noqa: F401 - imported here they are there in all forks

    return forked_scripts.run(load("wan").main, ["bench/torch/wan.py", *TINY, *arguments], folder, load("torch_launch"))


def saved(tmp_path, *arguments):
    """What a run has saved. Status 3 says that the machine was busy, which is no fault here."""
    done = wan(tmp_path, "--save", str(tmp_path / "wan.json"), *arguments)
    assert done.returncode in (0, 3), done.stdout + done.stderr
    return json.loads((tmp_path / "wan.json").read_text())["result"], done.stdout


# ---- The whole program ----


def test_all_variants_compute_the_same(tmp_path):
    result, text = saved(tmp_path, "--devices", "cpu,cpu", "--control", "--fsdp-prefetch", "1")
    rows = {row["variant"]: row for row in result["tables"][0]["rows"] if not row["again"]}
    assert list(rows) == ["replicated", "layershard", "layershard, all resident", "FSDP2, prefetch 1"]
    assert all(row["bits_equal"] for name, row in rows.items() if not name.startswith("FSDP2"))
    memory = {row["variant"]: row for row in result["memory"]["rows"]}
    assert [memory[name]["windows"] for name in rows] == [0, 2, 0, 0]
    assert memory["FSDP2, prefetch 1"]["wanted_bytes"] * 2 == memory["replicated"]["wanted_bytes"]
    whole = memory["replicated"]["wanted_bytes"]
    assert memory["layershard"]["wanted_bytes"] == whole * (BLOCKS / 2 + 2) / BLOCKS
    assert memory["layershard, all resident"]["wanted_bytes"] == whole > 0
    # what the other rank has, in every pass
    assert whole / 2 <= memory["layershard"]["fetched_bytes"] < 0.6 * whole
    assert [memory[name]["fetched_bytes"] for name in rows if name != "layershard"] == [0, 0, 0]
    assert {row["variant"]: row["calls"] for row in result["all_to_alls"]["rows"]} == dict.fromkeys(rows, 4 * BLOCKS)
    assert all(target["result"] is None for target in result["targets"]["rows"])
    assert "all-to-alls by gloo" in text and "not evaluated" in text


def test_second_expert_takes_over(tmp_path):
    result, _ = saved(tmp_path, "--devices", "cpu,cpu", "--experts", "2", "--fsdp-prefetch", "")
    rows = {row["variant"]: row for row in result["tables"][0]["rows"]}
    assert rows["layershard"]["bits_equal"]
    assert result["steps"] == 2
    assert {row["calls"] for row in result["all_to_alls"]["rows"]} == {2 * 4 * BLOCKS}
    memory = {row["variant"]: row for row in result["memory"]["rows"]}
    assert memory["layershard"]["windows"] == 4


def test_windows_that_hold_everything_are_pointed_at(tmp_path):
    _, text = saved(tmp_path, "--devices", "cpu,cpu", "--layers", "4", "--fsdp-prefetch", "")
    assert "layershard: NOTHING IS FETCHED" in text


def test_a_scheme_that_cannot_be_built_is_named_and_the_rest_runs(tmp_path):
    result, text = saved(tmp_path, "--devices", "cpu,cpu", "--pace", "20", "--fsdp-prefetch", "")
    assert [each["variant"] for each in result["tables"][0]["not_run"]] == ["layershard, 20 GB/s"]
    assert "shm has no option" in text


def test_without_replicated_there_is_nothing_to_compare_with(tmp_path):
    done = wan(tmp_path, "--devices", "cpu,cpu", "--attention", "none_of_these")
    assert done.returncode == 1
    assert "replicated, which all else is compared with, cannot be built: ValueError" in done.stdout


def test_a_scheme_whose_first_pass_fails_is_named_and_the_rest_runs(monkeypatch):
    """It may be built and find no memory for a pass, or no operator: that must not cost the others' results."""
    wan, schemes = load("wan"), load("wan_schemes")
    given = [schemes.Scheme("replicated", "replicated"), schemes.Scheme("broken", "layershard", experts=[None])]
    monkeypatch.setattr(schemes, "schemes_of", lambda options, here: given)

    class Ranks:
        on_gpus = False

        def note(self, text):
            pass

        def synchronize(self):
            pass

        def gather(self, mine):
            return [mine]

        def agree(self, trouble):
            return trouble

    class Builder:
        def build(self, scheme):
            return None

    class Denoiser:
        def run(self, experts):
            if experts:
                raise RuntimeError("out of memory\nand more")

    built, variants, trouble = wan.build_all(None, Ranks(), Builder(), Denoiser())
    assert [scheme.name for scheme in built] == [variant.name for variant in variants] == ["replicated"]
    assert trouble == {"broken": "RuntimeError: out of memory"}


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--devices", "cpu,cpu,cpu"], "24 tokens and 4 heads do not divide by 3 ranks"),
        (["--devices", "cpu,cpu", "--video", "64x33x9"], "must be multiples of 16"),
        (["--devices", "cpu,cpu", "--video", "64x32"], "is not WIDTHxHEIGHTxFRAMES"),
    ],
)
def test_what_cannot_be_split_is_refused_before_ranks_start(tmp_path, arguments, text):
    done = wan(tmp_path, *arguments)
    assert done.returncode == 2 and text in done.stderr


def test_all_to_alls_by_what_the_devices_do_not_have_are_refused():
    """The one test that starts the script as its users do."""
    command = [sys.executable, str(BENCH / "wan.py"), *TINY, "--devices", "cpu,cpu", "--all-to-all", "nccl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == 1 and "all-to-alls by nccl: on these devices it can be gloo" in done.stdout


# ---- The model ----


def denoise(rank, size, port, experts):
    """This rank's output with the tokens split, and that of the same weights in one piece."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    launch, model, alltoall = load("torch_launch"), load("wan_model"), load("wan_alltoall")
    here = launch.join([torch.device("cpu")] * size)
    shape, device = model.SHAPES["tiny"], here.device
    parallel = model.ulysses(here, model.make_meshes(size, device)[0])
    denoiser = model.Denoiser(shape, "64x32x9", 2, device, 6)
    alltoall.AllToAlls(here, "gloo", 0).install()
    outputs = []
    with torch.no_grad():
        for split in (True, False):
            models = [model.empty(shape, BLOCKS, device) for _ in range(experts)]
            for number, each in enumerate(models):
                model.replicate(each, f"{number}.", device)
                if split:
                    model.split_tokens(each, parallel)
            outputs.append(denoiser.run(models).float().tolist())
    launch.leave(here)
    return outputs


def test_split_tokens_give_what_one_piece_gives_and_experts_differ():
    wholes = []
    for experts in (1, 2):
        outputs = [[torch.tensor(each) for each in both] for both in ranks.run(2, denoise, ranks.free_port(), experts)]
        for split, whole in outputs:
            assert torch.isfinite(whole).all()
            assert torch.equal(split, outputs[0][0])
            assert (split - whole).norm() < 0.02 * whole.norm()
        wholes.append(outputs[0][1])
    assert (wholes[0] - wholes[1]).norm() > 0.1 * wholes[0].norm()


def test_shape_is_the_published_one():
    model = load("wan_model")
    assert model.tokens_of("832x480x81") == 32760
    assert model.tokens_of("1280x720x81") == 75600
    whole = model.empty(model.SHAPES["a14b"], 40, torch.device("cpu"))
    assert 14.2e9 < sum(each.numel() for each in whole.parameters()) < 14.4e9
    assert {str(each.dtype) for each in whole.blocks[0].parameters()} == {"torch.bfloat16", "torch.float32"}


# ---- Figures ----


def test_own_time_is_that_of_the_rank_that_waits_for_nobody():
    row = load("wan_times").alltoall_row("x", [[[1e-3, 5e-3], [4e-3, 2e-3]]])
    assert row["calls"] == 2
    assert row["own_ns"]["pass"] == pytest.approx(3e6)
    assert row["with_waiting_ns"]["pass"] == pytest.approx(9e6)


class Place:
    """The ranks as far as an evaluation looks at them."""

    def __init__(self, on_gpus, shares_device):
        self.on_gpus, self.shares_device = on_gpus, shares_device


@pytest.mark.parametrize(
    "sharded, again, place, result, options",
    [
        (1.009, 1.0, Place(True, False), "met", {}),
        (1.011, 1.0, Place(True, False), "MISSED", {}),
        (1.004, 1.0, Place(True, False), "met", {"transport": "cuda:pace=100"}),
        (1.006, 1.0, Place(True, False), "MISSED", {"transport": "cuda:pace=100"}),
        (1.009, 1.01, Place(True, False), None, {}),
        (1.009, 1.0, Place(True, True), None, {}),
        (1.009, 1.0, Place(False, False), None, {}),
    ],
)
def test_what_is_said_of_targets(sharded, again, place, result, options):
    compared, report = load("torch_table"), load("wan_report")
    table = compared.Table([compared.Variant("replicated", None), compared.Variant("layershard", None)], 0.5)
    table.times = {"replicated": [1.0] * 3, "layershard": [sharded] * 3}
    table.again = [again] * 3
    scheme = load("wan_schemes").Scheme("layershard", "layershard", options, memory={"off_wanted": 0.03})
    speed, memory = report.evaluate(place, table, [scheme])
    assert speed["result"] == result
    assert memory["result"] == "MISSED"
    assert (result or "not evaluated" if not place.on_gpus else result or "") in report.targets_text([speed], place)


def test_a_pace_is_an_option_of_the_transport():
    script = load("wan_schemes")
    assert [script.paced("cuda", 50), script.paced("cuda:copy", 2.5)] == ["cuda:pace=50", "cuda:copy+pace=2.5"]


class Circle:
    """Ranks that are threads, as far as the counters need it."""

    def __init__(self, rank, size, barrier, shared):
        self.rank, self.size, self.barrier, self._shared = rank, size, barrier.wait, shared

    def first(self, mine):
        if self.rank == 0:
            self._shared.append(mine)
        self.barrier()
        return self._shared[0]


def test_a_rank_that_does_not_begin_an_all_to_all_is_named():
    alltoall = load("wan_alltoall")
    barrier, shared, counters = threading.Barrier(2), [], {}

    def work(rank):
        counters[rank] = alltoall._Counters(Circle(rank, 2, barrier, shared))
        counters[rank].begin(1)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
        assert not thread.is_alive()
    assert not os.path.exists(shared[0])
    counters[0].DEADLINE_S = 0.05
    with pytest.raises(TimeoutError, match=r"rank 0: all-to-all 2: ranks \[1\] have not begun it"):
        counters[0].begin(2)


class Event:
    """CUDA's, where everything enqueued is done at once."""

    def __init__(self, **_options):
        pass

    def ipc_handle(self):
        return b"handle"

    @classmethod
    def from_ipc_handle(cls, _device, _handle):
        return cls()

    def record(self):
        pass

    wait = record


class Crowd(Circle):
    device = torch.device("cpu")

    def gather(self, mine):
        self._shared.append((self.rank, mine))
        self.barrier()
        everyones = [given for _, given in sorted(self._shared[-self.size :], key=lambda each: each[0])]
        self.barrier()
        return everyones

    def first(self, mine):
        return self.gather(mine)[0]


def test_copies_inside_a_gpu_give_every_rank_its_part(monkeypatch):
    """The places and their turns; that streams wait for each other takes a GPU."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    alltoall = load("wan_alltoall")
    size, calls, part = 3, 7, 4
    barrier, shared, received = threading.Barrier(size), [], {}

    def value(sender, receiver, call):
        return torch.full((part,), 100 * sender + 10 * receiver + call, dtype=torch.bfloat16)

    def work(rank):
        exchange = alltoall.CopiesInside(Crowd(rank, size, barrier, shared), 2 * part * size)
        sent = [torch.stack([value(rank, receiver, call) for receiver in range(size)]) for call in range(calls)]
        received[rank] = [exchange(each, None) for each in sent]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
        assert not thread.is_alive()
    for rank, outputs in received.items():
        for call, output in enumerate(outputs):
            assert torch.equal(output, torch.stack([value(sender, rank, call) for sender in range(size)]))
