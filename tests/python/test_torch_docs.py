# SPDX-License-Identifier: Apache-2.0
"""Every block of Python in docs/python.md and in the packages' first lines runs, on ranks of a processor, with small
models for the reader's own; whole programs run as the shell beside them says, see tests/docs."""

import ast
import contextlib
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import types

import pytest
from patience import LONG_MS

import torch_ranks as ranks

torch = ranks.torch
layershard = pytest.importorskip("layershard")
sharding = pytest.importorskip("layershard.torch")

# What they import by name, seconds of it, is there when ranks are forked; so is what torch.compile imports.
if importlib.util.find_spec("transformers"):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401
with torch.no_grad():
    torch.compile(torch.nn.ReLU(), backend="aot_eager")(torch.ones(1))
torch.compiler.reset()

TREE = pathlib.Path(__file__).resolve().parents[2]
FENCED = re.compile(r"```python\n(.*?)```", re.DOTALL)


def indented(module):
    """The examples in a module's docstring: what is indented and parses as more than names."""
    text = ast.get_docstring(ast.parse((TREE / "python/layershard" / module).read_text(encoding="utf-8")), clean=False)
    return [textwrap.dedent(each) for each in re.findall(r"(?:^    .*\n?)+", text, re.MULTILINE)]


DOCS = FENCED.findall((TREE / "docs/python.md").read_text(encoding="utf-8"))
BASE = indented("__init__.py")
TORCH = indented("torch/__init__.py")


def block_with(blocks, phrase):
    (found,) = (each for each in blocks if phrase in each)
    return found


def for_a_processor(text, rank, size, path):
    """What a reader with GPUs writes, as this machine can do it."""
    world = f'"gloo", init_method="file://{path}", rank={rank}, world_size={size}'
    changes = [
        ('init_process_group("nccl")', f"init_process_group({world})"),
        ('"cuda"', '"cpu"'),
    ]
    for there, here in changes:
        text = text.replace(there, here)
    return text


def run_block(text, rank, size, path, **names):
    exec(compile(for_a_processor(text, rank, size, path), "block", "exec"), names)
    return names


def llama(**options):
    import transformers

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **options)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval(), torch.tensor([[5, 7, 11, 2]])


def logits(model, tokens):
    with torch.inference_mode():
        return model(tokens).logits


def use_processes(work, size=2):
    pytest.importorskip("transformers")
    ranks.run(size, work)


# ---- docs/python.md ----


def test_the_shortest_program_alone(tmp_path):
    """By torchrun it is run as all blocks of shell are, see tests/docs."""
    (tmp_path / "first.py").write_text(block_with(DOCS, "torch.nn.Sequential"))
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    alone = subprocess.run([sys.executable, "first.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert alone.stdout.startswith("rank 0 of 1, ") and alone.returncode == 0, alone.stderr


def test_in_a_program(tmp_path):
    text = block_with(DOCS, "init_process_group")

    def work(rank, size):
        model, tokens = llama()
        want = logits(model, tokens)
        names = {"build_and_load": lambda: model, "batch_of_this_rank": tokens, "model": model}
        for name in ("LAYERSHARD_RANK", "LAYERSHARD_SIZE", "LAYERSHARD_JOB"):
            os.environ.pop(name)
        run_block(text, rank, size, tmp_path / "store", **names)
        assert torch.equal(logits(model, tokens), want)
        assert sharding.of(model).group.size == size and "model.layers.*" in sharding.of(model).report()

    use_processes(work)


def test_models_that_fit_nowhere(tmp_path):
    def work(rank, size):
        import transformers

        model, tokens = llama()
        if rank == 0:
            model.save_pretrained(tmp_path / "checkpoint", max_shard_size="10KB")
            (tmp_path / "saved").touch()
        names = {"config": model.config, "checkpoint_dir": tmp_path / "checkpoint"}
        names |= {"AutoModelForCausalLM": transformers.AutoModelForCausalLM, "layershard": layershard}
        with (
            layershard.Group() as group,
            group.series("saved", first_layer=0, layer_count=1, tensors=[layershard.Tensor("saved", 1)]),
        ):
            pass  # a meeting: the files are there then
        made = run_block(block_with(DOCS, "checkpoint_dir"), rank, size, None, **names)["model"]
        assert torch.equal(logits(made, tokens), logits(model, tokens))

    use_processes(work)


class NoCuda:
    """A stream, a graph and its capture, which is a pass like any other here."""

    replays = 0

    def stream(self, _stream):
        return contextlib.nullcontext()

    def graph(self, graph, stream):
        return contextlib.nullcontext()

    def CUDAGraph(self):  # noqa: N802
        return self

    def replay(self):
        self.replays += 1


def test_a_captured_pass():
    def work(rank, size):
        model, x = ranks.stack(), ranks.inputs(rank)
        want, cuda = ranks.stack()(x), NoCuda()
        sharding.shard(model, "*.up", transport="shm:copy")
        names = {"torch": types.SimpleNamespace(cuda=cuda), "model": model, "handle": sharding.of(model), "stream": 0}
        with torch.no_grad():
            made = run_block(block_with(DOCS, "graph.replay()"), rank, size, None, x=x, batches=[x] * 3, **names)
            assert torch.equal(made["y"], want) and cuda.replays == 3

    ranks.run(2, work)


def test_a_kept_graph():
    def work(rank, size):
        model, x = ranks.stack(), ranks.inputs(rank)
        with torch.no_grad():
            want = model(x)
            sharding.shard(model, "*.up", transport="shm:copy")
            names = {"torch": torch, "layershard": layershard, "model": model, "batch": x, "kept": []}
            assert torch.allclose(run_block(block_with(DOCS, "def keep"), rank, size, None, **names)["result"], want)

    ranks.run(2, work)


def test_one_store_two_regimes(tmp_path):
    def work(rank, size):
        model, tokens = llama(attn_implementation="eager")
        want = logits(model, tokens)
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=size)
        for layer in model.model.layers:  # a parallel pass has this rank's heads
            layer.self_attn.head_dim = model.config.hidden_size // 4
        names = {"layershard": layershard, "model": model, "group": dist.group.WORLD}
        seen = []
        model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
        names |= {"own_batch": tokens, "same_tokens_on_all_ranks": tokens}
        with torch.inference_mode():
            run_block(block_with(DOCS, "regime.parallel"), rank, size, None, **names)
        gathered, parallel = seen
        assert torch.equal(gathered, want) and torch.allclose(parallel, want, atol=1e-4)
        dist.barrier()

    use_processes(work)


def test_an_update_in_vain_and_one_that_works():
    def work(rank, size):
        model = sharding.shard(
            ranks.stack(), "layers.*", scope="block", buffers="*", transport="shm:copy", timeout_ms=LONG_MS
        )
        new = {name: 2 * value for name, value in ranks.stack().state_dict().items() if name.startswith("layers.")}
        names = {"layershard": layershard, "model": model, "new_weights": new}
        text = block_with(DOCS, "except layershard.PeerFailed")
        run_block(text, rank, size, None, **names)
        state = sharding.of(model).state_dict()
        assert all(torch.equal(state[name], value) for name, value in new.items())
        if rank == 1:
            os.kill(os.getpid(), 9)
        said = []
        run_block(text, rank, size, None, print=said.append, **names)
        assert len(said) == 1 and said[0].startswith("rank 0 goes on with the old weights: ") and "rank 1" in said[0]

    ranks.run(2, work)


def test_diffusers():
    pytest.importorskip("diffusers")
    from diffusers import WanTransformer3DModel

    import layershard.diffusers  # noqa: F401

    def work(rank, size):
        import types

        torch.manual_seed(0)
        sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}
        sizes |= {"text_dim": 16, "freq_dim": 32, "ffn_dim": 45, "num_layers": 4, "rope_max_seq_len": 32}
        pipe = types.SimpleNamespace(transformer=WanTransformer3DModel(**sizes).eval())
        run_block(block_with(DOCS, "apply_layer_sharding"), rank, size, None, pipe=pipe)
        assert "blocks.*" in sharding.of(pipe.transformer).report()

    ranks.run(2, work)


def test_an_engine():
    def work(rank, size):
        def load(blocks):
            for number, block in enumerate(blocks):
                passed_over = getattr(block.weight, "weight_loader", None)
                passed_over() if passed_over else block.weight.data.fill_(number)

        def run(blocks):
            with torch.inference_mode():
                seen.extend(float(block(torch.ones(1, 4))[0, 0]) for block in blocks)

        seen, blocks = [], [torch.nn.Linear(4, 3, bias=False) for _ in range(5)]
        text = block_with(DOCS, "without_storage")
        run_block(text, rank, size, None, layershard=layershard, blocks=blocks, load=load, run=run)
        assert seen == [0, 4, 8, 12, 16]

    ranks.run(2, work, LAYERSHARD_TRANSPORT="shm:copy")


def test_checked_at_the_start():
    def work(rank, size):
        model, tokens = llama()
        sharding.shard(model, "model.layers.*", scope="block", transport="shm:copy")
        names = {"torch": torch, "layershard": layershard, "model": model, "tokens": tokens}
        run_block(block_with(DOCS, "torch.check("), rank, size, None, **names)

    use_processes(work)


def test_no_block_is_left_out():
    phrases = ["torch.nn.Sequential", "build_and_load", "checkpoint_dir", "def keep", "graph.replay()"]
    phrases += ["regime.parallel", "except layershard.PeerFailed", "apply_layer_sharding", "torch.check("]
    phrases += ["without_storage"]
    assert [block for block in DOCS if not any(phrase in block for phrase in phrases)] == []
    assert (len(DOCS), len(BASE), len(TORCH)) == (len(phrases), 1, 1)


# ---- Docstrings ----


def test_the_example_of_the_base_package():
    def work(rank, size):
        import ctypes

        nbytes, computed = 64, []

        def load(layer, addresses):
            ctypes.memset(addresses[0], layer, nbytes)

        def compute(address):
            computed.append(ctypes.string_at(address, 1)[0])

        (block,) = BASE
        run_block(block, rank, size, None, layershard=layershard, nbytes=nbytes, load=load, compute=compute)
        assert computed == list(range(32))

    ranks.run(2, work)


def test_the_example_of_the_torch_package():
    def work(rank, size):
        import transformers  # noqa: F401

        model, tokens = llama()
        want = logits(model, tokens)
        (block,) = TORCH
        made = run_block(block, rank, size, None, layershard=layershard, model=model)
        assert torch.equal(logits(made["model"], tokens), want)

    use_processes(work)
