# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around layershard.torch: ranks that are killed, late or different, loads that break off, Ctrl-C.

Nothing hangs, the texts name who and what, nothing is left behind, and what can go on goes on.
"""

import os
import pathlib
import signal
import time

import pytest
from patience import LONG_MS, LONG_S

import torch_ranks as ranks

torch = ranks.torch
sharding = pytest.importorskip("layershard.torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
layershard = pytest.importorskip("layershard")

DEADLINE_MS = LONG_MS  # nobody waits for it here
SOON_S = DEADLINE_MS / 2000
BLOCKS = {"modules": "layers.*", "scope": "block", "buffers": "*"}


def compute(model, rank):
    with torch.inference_mode():
        return model(ranks.inputs(rank))


def shard(model, **options):
    return sharding.shard(model, **{**BLOCKS, "transport": "shm", "timeout_ms": DEADLINE_MS, **options})


def works(rank, **options):
    """A new model is sharded and computes: this rank goes on."""
    assert torch.equal(compute(shard(ranks.stack(), **options), rank), compute(ranks.stack(), rank))


def gloo(rank, size, path):
    import torch.distributed as dist

    for name in ("LAYERSHARD_RANK", "LAYERSHARD_SIZE", "LAYERSHARD_JOB"):
        os.environ.pop(name, None)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    return dist


def meet_by(how, rank, size, path):
    if how == "process group":
        gloo(rank, size, path)


def empty_stack():
    with sharding.empty_weights():
        return ranks.stack()


@pytest.fixture()
def checkpoint(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    safetensors_torch.save_file(ranks.stack().state_dict(), tmp_path / "checkpoint" / "model.safetensors")
    return tmp_path / "checkpoint"


MEET_BY = pytest.mark.parametrize("how", ["name", "process group"])

# ---- Ranks that are killed ----


def kill_myself(*_args):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("transport", ["shm", "shm:copy"])
def test_killed_in_the_middle_of_a_pass(transport):
    def work(rank, size):
        model = shard(ranks.stack(), transport=transport)
        if rank == 1:
            model.layers[2].up.register_forward_pre_hook(kill_myself)
        for _ in range(20):  # what it stored stays
            assert torch.equal(compute(model, rank), compute(ranks.stack(), rank))
        with pytest.raises(layershard.PeerFailed, match="rank 1") as caught:
            with sharding.of(model).update():
                pass
        assert caught.value.rank == rank and caught.value.status == "LSHARD_ERR_PEER_FAILED"
        assert torch.equal(compute(model, rank), compute(ranks.stack(), rank))  # nothing had been changed

    assert ranks.run(3, work) == [None] * 3


@MEET_BY
def test_killed_in_shard(tmp_path, how):
    def work(rank, size):
        meet_by(how, rank, size, tmp_path / "store")
        model = ranks.stack()
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(sharding.layout.Layout, "view", kill_myself)
            with pytest.raises(layershard.PeerFailed, match="rank 1") as caught:
                shard(model)
        assert caught.value.rank == rank
        assert torch.equal(compute(model, rank), compute(ranks.stack(), rank))  # its own weights, as before
        model.half()  # and no guards
        os._exit(0) if how == "process group" else None  # gloo's own end waits for the dead

    begin = time.monotonic()
    ranks.run(3, work)
    assert time.monotonic() - begin < DEADLINE_MS / 1e3


def test_killed_before_it_comes(tmp_path):
    def work(rank, size, connected):
        gloo(rank, size, tmp_path / "store")
        if rank == 1:
            assert connected.wait(ranks.DEADLINE_S)
            kill_myself()
        connected.set()
        with pytest.raises(layershard.Error) as caught:
            shard(ranks.stack())
        assert caught.type.__name__ in ("TransportFailed", "PeerFailed") and "process group" in str(caught.value)

    begin = time.monotonic()
    ranks.run(2, work, ranks._fork.Event())
    assert time.monotonic() - begin < DEADLINE_MS / 1e3


def test_killed_in_load(checkpoint):
    def work(rank, size):
        model = shard(empty_stack())
        if rank == 1:
            from layershard.torch.checkpoint import Checkpoint

            Checkpoint.read = kill_myself
        with pytest.raises(layershard.PeerFailed, match="rank 1"):
            sharding.load(model, checkpoint)
        with pytest.raises(sharding.Guarded, match="loading the weights has failed.*PeerFailed"):
            compute(model, rank)

    assert ranks.run(3, work) == [None] * 3


def test_who_does_not_come_is_named():
    def work(rank, size):
        if rank == 1:
            return
        with pytest.raises(layershard.Timeout, match="rank 1") as caught:
            shard(ranks.stack(), timeout_ms=400)
        assert caught.value.rank == 0

    ranks.run(2, work)


def test_who_does_not_come_to_a_process_group(tmp_path):
    def work(rank, size, over):
        gloo(rank, size, tmp_path / "store")
        if rank == 0:
            with pytest.raises(layershard.Timeout, match="has not made this call of layershard.torch"):
                shard(ranks.stack(), timeout_ms=400)
            over.set()
        assert over.wait(ranks.DEADLINE_S)

    started = ranks.start(2, work, ranks._fork.Event())
    ranks.finish(started)
    assert [process.exitcode for process, _ in started] == [0, 0]  # also with a collective that never ended


# ---- Models that differ ----

DIFFERENT = {
    "shapes": (lambda rank: ranks.stack(width=37 + rank), {}, "norm.weight"),
    "number of layers": (lambda rank: ranks.stack(n_layers=5 + rank), {}, "layer_count is 5 on rank 0 and 6 on rank 1"),
    "dtypes": (lambda rank: ranks.stack().to([torch.float32, torch.float64][rank]), {}, "float64"),
    "patterns": (lambda rank: ranks.stack(), {"modules": [["*.up"], ["*.down"]], "scope": "linear"}, "layers.*.down"),
    "scopes": (lambda rank: ranks.stack(), {"modules": "*.up", "scope": ["linear", "block"]}, "layers.*"),
    "placements": (lambda rank: ranks.stack(), {"placement": ["whole", "striped"]}, "placement"),
    "families": (lambda rank: ranks.stack(), {"transport": ["auto", "cuda"]}, "'auto'"),
    "transports": (lambda rank: ranks.stack(), {"transport": ["shm", "shm:copy"]}, "shm:copy"),
}


@MEET_BY
@pytest.mark.parametrize("what", DIFFERENT)
def test_different_models_are_told_apart_on_both_ranks(tmp_path, what, how):
    make, options, word = DIFFERENT[what]

    def work(rank, size):
        meet_by(how, rank, size, tmp_path / "store")
        mine = {name: value[rank] if isinstance(value, list) else value for name, value in options.items()}
        model = make(rank)
        before = [(each, each.data_ptr()) for each in model.parameters()]
        with pytest.raises(layershard.Mismatch) as caught:
            shard(model, **mine)
        assert word in str(caught.value) and "rank 0" in str(caught.value) and "rank 1" in str(caught.value)
        assert before == [(each, each.data_ptr()) for each in model.parameters()]
        works(rank)

    ranks.run(2, work)


# ---- One rank that refuses alone ----


@MEET_BY
@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_refuses_alone_tells_the_others(tmp_path, how, who):
    def work(rank, size):
        meet_by(how, rank, size, tmp_path / "store")
        for _ in range(2):
            if rank == who:
                with pytest.raises(sharding.Refused, match="'lairs.*' matches no module"):
                    shard(ranks.stack(), modules="lairs.*")
            else:
                with pytest.raises(layershard.Mismatch) as caught:
                    shard(ranks.stack())
                text = str(caught.value)
                assert "refused: pattern 'lairs.*' matches no module" in text and f"rank {who}" in text
            works(rank)

    ranks.run(3, work)


BAD = [{"resident": "much"}, {"stripe": {"*": "diagonal"}}, {"modules": None}, {"device": "meta"}]
BAD += [{"prefetch": -1}, {"placement": "wrong"}, {"timeout_ms": -1}]
BAD += [{"prefetch": "1"}, {"transport": 5}, {"timeout_ms": 1.5}, {"stripe": {"*.upp.weight": "rows"}}]


@MEET_BY
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_whatever_a_rank_refuses_alone(tmp_path, bad, how):
    def work(rank, size):
        meet_by(how, rank, size, tmp_path / "store")
        with pytest.raises((sharding.Refused, layershard.Invalid) if rank == 1 else layershard.Mismatch):
            shard(ranks.stack(), **(bad if rank == 1 else {}))
        works(rank)

    ranks.run(2, work)


def test_ranks_meet_again_after_one_had_given_up():
    def work(rank, size, given_up):
        if rank == 0:
            for _ in range(3):
                with pytest.raises(layershard.Timeout, match="rank 1"):
                    shard(ranks.stack(), timeout_ms=200)
            given_up.set()
        assert given_up.wait(ranks.DEADLINE_S)
        works(rank)

    ranks.run(2, work, ranks._fork.Event())


# ---- The library is not there, or another one ----

OLD = """
#include <stdio.h>
#include <layershard/layershard.h>
%s
lshard_status lshard_group_create(const lshard_group_options *options, lshard_group **group)
{
    snprintf(options->error, options->error_bytes, "struct_size %%zu is not 96: use LSHARD_GROUP_OPTIONS_INIT",
             options->struct_size);
    return LSHARD_ERR_INVALID;
}
"""


def old_library(folder, version):
    """A library of another build: all functions of this one, shorter structures."""
    import subprocess

    from layershard._declarations import FUNCTIONS

    others = "".join(
        f'void {name}_(void) __asm__("{name}"); void {name}_(void) {{}}\n'
        for name in FUNCTIONS
        if name not in ("lshard_group_create", "lshard_version")
    )
    body = others + f'const char *lshard_version(void) {{ return "{version}"; }}'
    (folder / "old.c").write_text(OLD % body)
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-w", "-I", layershard.get_include()]
    subprocess.run([*command, "-o", str(folder / "old.so"), str(folder / "old.c")], check=True, timeout=LONG_S)
    return str(folder / "old.so")


def with_library(rank, size, path, file, words, how):
    from layershard._library import library

    if rank == 1:
        os.environ["LAYERSHARD_LIBRARY"] = file
        library.cache_clear()
    if how == "process group":
        gloo(rank, size, path)
    else:
        for name in ("LAYERSHARD_RANK", "LAYERSHARD_SIZE", "LAYERSHARD_JOB"):
            os.environ.pop(name)
    model = ranks.stack()
    if rank == 0 and how == "alone":
        return
    with pytest.raises(layershard.LibraryError if rank == 1 else layershard.Error) as caught:
        shard(model)
    if rank == 1:
        assert all(word in str(caught.value) for word in [file, *words]), caught.value
    model.half()  # nothing was changed


@pytest.mark.parametrize("how", ["alone", "process group"])
@pytest.mark.parametrize("what", ["missing", "other version", "other build"])
def test_no_library_or_another(tmp_path, what, how):
    file, words = "/nowhere/liblayershard.so", ["cannot load", "(LAYERSHARD_LIBRARY)", "make"]
    if what == "other version":
        file, words = old_library(tmp_path, "0.0.9"), ["version 0.0.9", layershard.__version__]
    if what == "other build":
        file, words = old_library(tmp_path, layershard.__version__), ["not of the same build", "struct_size"]
    begin = time.monotonic()
    ranks.run(2, with_library, tmp_path / "store", file, words, how)
    assert time.monotonic() - begin < DEADLINE_MS / 1e3


def test_a_rank_without_the_library_tells_the_others(tmp_path):
    def work(rank, size):
        from layershard._library import library

        if rank == 1:
            os.environ["LAYERSHARD_LIBRARY"] = "/nowhere/liblayershard.so"
            library.cache_clear()
        gloo(rank, size, tmp_path / "store")
        with pytest.raises(layershard.LibraryError if rank == 1 else layershard.Mismatch) as caught:
            shard(ranks.stack())
        assert "/nowhere/liblayershard.so" in str(caught.value) and caught.value.text
        return str(caught.value)

    assert "rank 1 cannot take part" in ranks.run(2, work)[0]


# ---- Loads that break off ----


def held():
    """What a process holds: open files, names in /dev/shm, bytes of its own and of shared memory, also in
    reserved pages."""
    sizes = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()
    counted = ("Pss_Anon:", "Pss_Shmem:", "Shared_Hugetlb:", "Private_Hugetlb:")
    kib = sum(int(line.split()[1]) for line in sizes if line.startswith(counted))
    return len(os.listdir("/proc/self/fd")), sorted(os.listdir("/dev/shm")), kib


def load_and_fail(model, directory, error, **marks):
    with pytest.raises(error, **marks) as caught:
        sharding.load(model, directory)
    return caught.value


def test_a_truncated_file_leaves_nothing_and_a_whole_one_loads_then(checkpoint, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    whole = (checkpoint / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])

    def work(rank, size):
        model = shard(empty_stack(), transport="shm:copy")
        samples = []
        for number in range(30):
            error = load_and_fail(model, broken, Exception)
            if number in (9, 29):
                samples.append(held())
        assert str(broken / "model.safetensors") in str(error), error
        (files, names, kib), (files_after, names_after, kib_after) = samples
        assert (files, names) == (files_after, names_after) and kib_after - kib < 1024
        sharding.load(model, checkpoint)
        assert torch.equal(compute(model, rank), compute(ranks.stack(), rank))

    ranks.run(2, work)


def test_a_file_that_one_rank_alone_cannot_read_is_an_error_on_all_at_once(checkpoint, tmp_path):
    def work(rank, size):
        model, is_loaded = shard(empty_stack(), transport="shm:copy"), False
        for _ in range(2):
            if rank == 1:
                error = load_and_fail(model, tmp_path / "nowhere", sharding.Refused, match="nowhere is neither")
            else:
                error = load_and_fail(model, checkpoint, layershard.CallbackFailed, match="rank 1")
                assert error.rank == 0
            if is_loaded:  # nothing was touched: all is as before
                assert torch.equal(compute(model, rank), compute(ranks.stack(), rank))
                sharding.of(model).update()
            else:
                with pytest.raises(sharding.Guarded, match="not been loaded yet"):
                    compute(model, rank)
                with pytest.raises(sharding.Guarded, match="before the weights have been loaded"):
                    sharding.of(model).update()
            sharding.load(model, checkpoint)  # the second time it replaces what is there
            is_loaded = True
            assert torch.equal(compute(model, rank), compute(ranks.stack(), rank))

    begin = time.monotonic()
    ranks.run(2, work)
    assert time.monotonic() - begin < DEADLINE_MS / 1e3


def test_what_failed_is_said_with_its_layer(checkpoint):
    def work(rank, size):
        from layershard.torch.tensor_files import Checkpoint

        read = Checkpoint.read

        def broken(self, name):
            if name == "layers.3.up.bias":
                raise OSError(f"{name} cannot be read")
            return read(self, name)

        Checkpoint.read = broken
        error = load_and_fail(shard(empty_stack()), checkpoint, layershard.CallbackFailed)
        assert (error.status, error.rank, error.layer) == ("LSHARD_ERR_CALLBACK", rank, 3 if rank == 1 else None)
        assert "OSError: layers.3.up.bias cannot be read" in error.text and (rank == 1 or "rank 1" in error.text)

    ranks.run(2, work)


def test_a_load_that_failed_half_way_is_told_by_every_pass_until_one_succeeds(checkpoint):
    def work(rank, size):
        from layershard.torch.tensor_files import Checkpoint

        def broken(self, name):
            raise OSError("the disk is gone")

        model, read = shard(ranks.stack(seed=7), transport="shm:copy"), Checkpoint.read
        Checkpoint.read = broken
        load_and_fail(model, checkpoint, Exception)
        Checkpoint.read = read
        load_and_fail(model, "/nowhere", sharding.Refused)  # says itself what is wrong, and is not what the pass lacks
        with pytest.raises(sharding.Guarded, match="OSError: the disk is gone.*load them again"):
            compute(model, rank)
        sharding.load(model, checkpoint)
        assert torch.equal(compute(model, rank), compute(ranks.stack(), rank))

    ranks.run(2, work)


@pytest.mark.parametrize("who", [0, 1])
def test_ctrl_c_while_a_file_is_read(checkpoint, who):
    """On the rank that reads, in the middle of its layers: the others are told, and the load can be made again."""

    def work(rank, size):
        from layershard.torch.tensor_files import Checkpoint

        model, read = shard(empty_stack(), transport="shm:copy"), Checkpoint.read
        count = iter(range(1000))

        def interrupted(self, name):
            if next(count) % 15 == 14:
                signal.raise_signal(signal.SIGINT)
            return read(self, name)

        samples = []
        for _ in range(12):
            if rank == who:
                Checkpoint.read = interrupted
                load_and_fail(model, checkpoint, KeyboardInterrupt)
                Checkpoint.read = read
            else:
                error = load_and_fail(model, checkpoint, layershard.CallbackFailed, match=f"rank {who}")
                assert error.rank == rank
            samples.append(held())
        assert samples[3][:2] == samples[-1][:2] and samples[-1][2] - samples[3][2] < 1024
        sharding.load(model, checkpoint)
        assert torch.equal(compute(model, rank), compute(ranks.stack(), rank))

    ranks.run(2, work)


# ---- Ctrl-C ----


def test_ctrl_c_while_the_parameters_become_shared():
    """A model that is shared by half, without hooks, would compute with what windows happen to hold."""

    def work(rank, size):
        model, view, count = ranks.stack(n_layers=12), sharding.layout.Layout.view, iter(range(1000))
        before = [(each, each.data_ptr(), each.requires_grad) for each in model.parameters()]

        def interrupted(self, raw):
            if next(count) == 50 + 36:  # 36 are written by commit
                signal.raise_signal(signal.SIGINT)
            return view(self, raw)

        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                patch.setattr(sharding.layout.Layout, "view", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    shard(model, transport="shm:copy")
            else:
                shard(model, transport="shm:copy")
        assert torch.equal(compute(model, rank), compute(ranks.stack(n_layers=12), rank))
        if rank == 0:
            assert before == [(each, each.data_ptr(), each.requires_grad) for each in model.parameters()]
            model.half()  # and no guards

    ranks.run(2, work)


# ---- Ctrl-C while others are waited for ----


def ready_model(rank, size, path, how):
    if how == "collectives":
        gloo(rank, size, path)
    return shard(ranks.stack(), transport="callback" if how == "collectives" else how)


def in_shard_by_name(rank, size, path):
    return lambda: shard(ranks.stack())


def in_shard_by_process_group(rank, size, path):
    gloo(rank, size, path)
    return lambda: shard(ranks.stack())


def in_shard_by_collectives(rank, size, path):
    gloo(rank, size, path)
    return lambda: shard(ranks.stack(), transport="callback")


def in_load(rank, size, path):
    safetensors_torch.save_file(ranks.stack().state_dict(), f"{path}.{rank}.safetensors")
    model = shard(empty_stack())
    return lambda: sharding.load(model, f"{path}.{rank}.safetensors")


def in_load_by_collectives(rank, size, path):
    gloo(rank, size, path)
    safetensors_torch.save_file(ranks.stack().state_dict(), f"{path}.{rank}.safetensors")
    model = shard(empty_stack(), transport="callback")
    return lambda: sharding.load(model, f"{path}.{rank}.safetensors")


def in_update(rank, size, path):
    model = ready_model(rank, size, path, "shm:copy")
    return lambda: sharding.of(model).update().__enter__()


def in_update_by_collectives(rank, size, path):
    model = ready_model(rank, size, path, "collectives")
    return lambda: sharding.of(model).update().__enter__()


def in_verify(rank, size, path):
    model = ready_model(rank, size, path, "shm")
    return lambda: sharding.of(model).verify()


def in_a_pass_by_collectives(rank, size, path):
    model = ready_model(rank, size, path, "collectives")
    return lambda: compute(model, rank)


def in_state_dict_by_collectives(rank, size, path):
    model = ready_model(rank, size, path, "collectives")
    return lambda: sharding.of(model).state_dict()


WAITS = {
    name.replace("_", " "): function
    for name, function in list(globals().items())
    if name.startswith("in_") and callable(function)
}


def interrupted(rank, size, path, where, waiting, over):
    wait = WAITS[where](rank, size, path)
    if rank == 1:
        assert over.wait(ranks.DEADLINE_S)
        return None
    waiting.set()
    with pytest.raises(KeyboardInterrupt):
        wait()
    for name in ("LAYERSHARD_RANK", "LAYERSHARD_SIZE", "LAYERSHARD_JOB"):
        os.environ.pop(name, None)
    if not torch.distributed.is_initialized():
        works(0)  # alone: the program goes on
    over.set()
    return time.monotonic()


@pytest.mark.parametrize("where", WAITS)
def test_ctrl_c(tmp_path, where):
    waiting, over = ranks._fork.Event(), ranks._fork.Event()
    started = ranks.start(2, interrupted, tmp_path / "store", where, waiting, over)
    try:
        assert waiting.wait(ranks.DEADLINE_S)
        time.sleep(0.7)
        sent = time.monotonic()
        os.kill(started[0][0].pid, signal.SIGINT)
        ended, _ = ranks.finish(started)
        assert ended - sent < SOON_S
        for process, _ in started:
            process.join(LONG_S)
        assert [process.exitcode for process, _ in started] == [0, 0]
    finally:
        over.set()
        for process, _ in started:
            process.kill()
