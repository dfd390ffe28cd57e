# SPDX-License-Identifier: Apache-2.0
"""layershard.torch.of(model): what a sharded model can be asked and told."""

import json
import time

import pytest
from patience import patience

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")

BY = [{"transport": "shm"}, {"transport": "shm:copy"}, {"transport": "shm:copy", "placement": "striped"}]


def sharded(**options):
    return sharding.shard(ranks.stack(), "layers.*", scope="block", buffers="*", **options)


def compute(model, rank):
    with torch.inference_mode():
        return model(ranks.inputs(rank))


def update_in_place(rank, size, options):
    """Code that fuses weights, run on every rank as it would be without sharding."""
    model, want = sharded(**options), ranks.stack()
    handle = sharding.of(model)
    before = compute(model, rank)
    addresses = [each.data_ptr() for each in model.parameters()]
    for factor in (2.0, 0.5):
        with handle.update():
            for layer in model.layers:
                layer.up.weight.data.mul_(factor)
                layer.norm.bias.data += factor
        for layer in want.layers:
            layer.up.weight.data.mul_(factor)
            layer.norm.bias.data += factor
        assert torch.equal(compute(model, rank), compute(want, rank))
        assert not torch.equal(compute(model, rank), before)
    assert [each.data_ptr() for each in model.parameters()] == addresses
    assert {each.generation for each in handle.stats().values()} == {3} or options


@pytest.mark.parametrize("options", BY, ids=str)
def test_update_by_writing_to_parameters_on_all_ranks(options):
    ranks.run(3, update_in_place, options)


def update_by_name(rank, size, options):
    model, new = sharded(**options), ranks.stack(seed=5)
    shared = {name: tensor for name, tensor in new.state_dict().items() if name.startswith("layers.")}
    with sharding.of(model).update() as update:
        update.copy(shared.items())
        own = {name.split(".")[1] for name, _ in update.parameters()}
        with pytest.raises(sharding.Refused, match="head.weight is not among"):
            update.copy({"head.weight": new.head.weight})
        with pytest.raises(sharding.Refused, match=r"layers.0.up.bias is \[3\]"):
            update.copy({"layers.0.up.bias": torch.zeros(3)})
    assert own == {str(index) for index in range(5) if index % size == rank}
    model.embed, model.head = new.embed, new.head
    assert torch.equal(compute(model, rank), compute(new, rank))


@pytest.mark.parametrize("options", BY, ids=str)
def test_update_by_names(options):
    ranks.run(2, update_by_name, options)


def test_an_update_that_raises_on_one_rank_fails_on_all_and_can_be_made_again():
    def work(rank, size):
        model = sharded(transport="shm:copy")
        handle = sharding.of(model)
        with pytest.raises(Exception) as caught, handle.update():
            if rank == 1:
                raise KeyError("bad delta")
        assert caught.type.__name__ == ("KeyError" if rank == 1 else "CallbackFailed")
        with pytest.raises(sharding.Guarded, match="update has failed"):
            compute(model, rank)
        with handle.update() as update:
            update.copy((name, t) for name, t in ranks.stack(seed=5).state_dict().items() if "layers." in name)
        model.embed, model.head = ranks.stack(seed=5).embed, ranks.stack(seed=5).head
        assert torch.equal(compute(model, rank), compute(ranks.stack(seed=5), rank))

    ranks.run(2, work)


def test_an_update_that_one_rank_does_not_begin_changes_nothing():
    def work(rank, size, ended):
        model = sharded(transport="shm:copy", timeout_ms=patience(3000))
        handle = sharding.of(model)
        if rank == 0:
            with pytest.raises(TimeoutError, match="rank 1"), handle.update():
                pass
            assert torch.equal(compute(model, rank), compute(ranks.stack(), rank))
            ended.set()
        assert ended.wait(ranks.DEADLINE_S)

    ranks.run(2, work, ranks._fork.Event())


def test_an_update_that_is_over_takes_nothing():
    def work(rank, size):
        model = sharded(transport="shm:copy", placement="striped")
        with sharding.of(model).update() as update:
            pass
        with pytest.raises(sharding.Refused, match="is over"):
            update.copy(ranks.stack().layers.state_dict(prefix="layers."))
        assert not update._copies  # of the striped layers

    ranks.run(2, work)


def stripes(rank, size):
    cuts = {"*.up.weight": "rows", "*.up.bias": "rows", "*.down.weight": "columns"}
    model = sharded(transport="shm", placement="striped", stripe=cuts)
    handle, want, x = sharding.of(model), ranks.stack(), torch.randn(2, 37, generator=torch.Generator().manual_seed(1))
    parts = {name[2:]: [handle.stripe(f"layers.{index}{name[1:]}") for index in range(5)] for name in cuts}
    rows = slice(75 * rank // size, 75 * (rank + 1) // size)
    for index, layer in enumerate(want.layers):
        assert torch.equal(parts["up.weight"][index], layer.up.weight[rows])
        assert torch.equal(parts["up.bias"][index], layer.up.bias[rows])
        assert torch.equal(parts["down.weight"][index], layer.down.weight[:, rows])
    with torch.inference_mode():  # a slice of the product, as tensor parallelism computes it
        part = torch.nn.functional.linear(x, parts["up.weight"][0], parts["up.bias"][0])
        assert torch.allclose(part, want.layers[0].up(x)[:, rows], atol=1e-5)
    with pytest.raises(Exception, match="striped by BYTES|stripe"):
        handle.stripe("layers.0.norm.weight")
    with pytest.raises(sharding.Refused, match="head.weight is not among"):
        handle.stripe("head.weight")
    assert torch.equal(compute(model, rank), compute(want, rank))


def test_stripes_are_slices_by_rows_and_columns():
    ranks.run(3, stripes)


def test_state_dict_gathered_and_sharded():
    def work(rank, size):
        handle, want = sharding.of(sharded(transport="shm:copy")), ranks.stack().state_dict()
        gathered = handle.state_dict()
        assert list(gathered) == list(want)
        assert all(torch.equal(gathered[name], want[name]) for name in want)
        with pytest.raises(sharding.Refused, match="gathered or sharded"):
            handle.state_dict("full")
        return list(handle.state_dict("sharded"))

    parts = ranks.run(2, work)
    layers = [{name for name in part if name.startswith("layers.")} for part in parts]
    assert layers[0] | layers[1] == {name for name in ranks.stack().state_dict() if name.startswith("layers.")}
    assert not layers[0] & layers[1]
    assert "head.weight" in parts[0] and "head.weight" in parts[1]


def test_verify_gives_one_hash_on_all_ranks():
    def work(rank, size):
        return sharding.of(sharded(transport="shm:copy")).verify()

    assert ranks.run(1, work)[0] == ranks.run(2, work)[0] == ranks.run(3, work)[2]


def test_report_names_what_was_saved():
    def work(rank, size):
        model = sharding.shard(ranks.stack(width=400), ["*.up", "*.down"], transport="shm:copy", prefetch=0)
        compute(model, rank)
        return sharding.of(model).report()

    for rank, text in enumerate(ranks.run(2, work)):
        lines = text.splitlines()
        assert lines[0] == f"rank {rank} of 2, transport shm:copy (as asked)"
        assert lines[1].split()[:3] == ["series", "layers", "placement"]
        up, down = (line.split() for line in lines[2:4])
        assert up[:4] == ["layers.*.up", "0-4", "whole", "6.1"]
        assert down[:4] == ["layers.*.down", "0-4", "whole", "6.1"]
        assert up[5] == "1"  # window


def test_report_tells_what_poison_takes():
    """What a check leaves behind makes windows look larger, and savings smaller, than they are in a run."""

    def work(rank, size):
        model = sharding.shard(ranks.stack(width=400), "layers.*", scope="block", transport="shm:copy", prefetch=0)
        before = sharding.of(model).report()
        with torch.inference_mode():
            sharding.check(model, ranks.inputs(rank))
        return before, sharding.of(model).report()

    for before, after in ranks.run(2, work, LAYERSHARD_POISON="0"):
        assert "poison" not in before and "1 (2.5)" in before
        assert "1 (7.4)" in after and "4.9 MiB of the windows is room for poison" in after


def test_trace_holds_every_call(tmp_path):
    def work(rank, size):
        model = sharded(transport="shm:copy")
        with sharding.of(model).trace(str(tmp_path / "pass.json")):
            compute(model, rank)
        compute(model, rank)  # not recorded

    ranks.run(2, work)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["pass.0.json", "pass.1.json"]
    for rank in range(2):
        trace = json.loads((tmp_path / f"pass.{rank}.json").read_text())
        assert trace["schema"] == "layershard-torch-trace/1"
        events = trace["traceEvents"]
        assert {event["pid"] for event in events} == {rank}
        assert [event["name"] for event in events if event["ph"] == "X"] == [
            f"{word} {layer}" for layer in range(5) for word in ("reach", "wait")
        ]


def test_a_trace_that_cannot_be_written_is_told_before_the_pass(tmp_path):
    def work(rank, size):
        model = sharded(transport="shm:copy")
        with pytest.raises(FileNotFoundError, match="nowhere"):
            with sharding.of(model).trace(tmp_path / "nowhere" / "pass.json"):
                pytest.fail("the pass was made first")
        compute(model, rank)
        with sharding.of(model).trace(tmp_path / "pass.json"):
            compute(model, rank)
        assert (tmp_path / "pass.json").exists()

    ranks.run(1, work)


def test_detach_gives_the_model_back():
    def work(rank, size):
        model = sharded(transport="shm:copy")
        assert sharding.of(model).detach() is model
        with pytest.raises(sharding.Refused, match="has not been sharded"):
            sharding.of(model)
        model.load_state_dict(ranks.stack(seed=9).state_dict())
        assert torch.equal(compute(model.to(torch.float32), rank), compute(ranks.stack(seed=9), rank))
        sharding.shard(model, "*.up", transport="shm")
        assert torch.equal(compute(model, rank), compute(ranks.stack(seed=9), rank))

    ranks.run(2, work)


def test_a_closed_model_makes_no_pass_and_cannot_be_sharded():
    def work(rank, size):
        model = sharded(transport="shm:copy")
        sharding.of(model).close()
        with pytest.raises(sharding.Guarded, match=r"given up by close\(\)"):
            compute(model, rank)
        with pytest.raises(sharding.Refused, match=r"given up by close\(\)"):
            sharding.shard(model, "*.up")

    ranks.run(2, work)


def test_a_closed_model_cannot_be_detached_and_is_not_told_to():
    def work(rank, size):
        model = sharded(transport="shm:copy")
        handle = sharding.of(model)
        handle.close()
        for late in (handle.detach, lambda: sharding.of(model).detach(), lambda: sharding.shard(model, "*.up")):
            with pytest.raises(sharding.Refused, match=r"given up by close\(\).*build the model again\. "):
                late()

    ranks.run(2, work)


def test_a_closed_model_takes_no_weights_into_memory_that_is_read_only():
    def work(rank, size):
        model = sharded(transport="shm")
        sharding.of(model).close()
        for part in (model, model.layers[0].up, model.layers[1].up):
            with pytest.raises(sharding.Guarded, match=r"given up by close\(\)"):
                part.load_state_dict(part.state_dict())
        with pytest.raises(sharding.Refused, match=r"given up by close\(\)"):
            sharding.of(model)

    assert ranks.run(2, work) == [None] * 2
    assert ranks.run(1, work) == [None]


def test_survivors_of_a_killed_rank_go_on():
    def work(rank, size):
        import os
        import signal

        model = sharded(transport="shm:copy")
        want = compute(ranks.stack(), rank)
        assert torch.equal(compute(model, rank), want)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(50):
            assert torch.equal(compute(model, rank), want)

    assert ranks.run(3, work) == [None] * 3


def test_close_leaves_the_others_their_last_pass(tmp_path):
    """By collectives, also where the process ends right after it, without what Python does at its end."""

    def work(rank, size):
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=size)
        model = sharding.shard(ranks.stack(), "*.up", transport="callback")
        with sharding.of(model).update():
            model.layers[rank].up.weight.data.mul_(2)
        if rank == 1:
            model.layers[4].up.register_forward_pre_hook(lambda *_: time.sleep(0.5), prepend=True)
        compute(model, rank)
        sharding.of(model).close()

    ranks.run(2, work)
