# SPDX-License-Identifier: Apache-2.0
"""The rivals of e2e.py: the original's broadcasts, copies of a peer's tensors, FSDP2, tensor parallelism.

Each is used as its makers would: the layer's tensors in one piece for broadcast and copy, streams of their own, the
next layers fetched across passes, FSDP2 with several settings of its prefetch and with copy engines, tensor parallelism
with NCCL and with torch's symmetric memory, from a graph, and with products that overlap what they send. Knows
torch.distributed; nothing of layershard.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from e2e_arms import Bench, Captured, Replicated, Way, all_tokens, has_nccl, no_graphs, tolerance_of
from e2e_model import Layer, Stack, empty_stack, hang, part_of, values
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import reduce_tensor
from torch_rounds import Arm

WINDOWS = 2

# ---- Windows of one's own -----------------------------------------------------------------------------------------


class Windowed(Way):
    """Two windows, always kept full: one is filled again as soon as its layer is done with, with the layer that
    travels next. Layers come from the replicated arm's memory."""

    def __init__(self, bench: Bench, replicated: Replicated) -> None:
        super().__init__(bench)
        self.replicated = replicated

    def needs(self) -> int:
        return WINDOWS * self.shape.layer_bytes

    def source_of(self, layer: int) -> int:
        return layer % self.meeting.size

    def travellers(self) -> list[int]:
        raise NotImplementedError

    def move(self, layer: int, window: torch.Tensor) -> Any:
        """Enqueue the bytes' way on the stream that is current; something to wait for, or None."""
        raise NotImplementedError

    def open(self) -> None:
        if not self.replicated.built:
            raise RuntimeError("it takes its layers from the replicated arm, which was not built")
        device = self.meeting.device
        self.windows = [
            torch.empty(self.shape.layer_bytes, dtype=torch.uint8, device=device) for _ in range(WINDOWS)
        ]
        with torch.device("meta"):
            made = [Layer(self.shape, self.shape.head).to(self.shape.dtype).eval() for _ in range(WINDOWS)]
        self.through = [hang(layer, window) for layer, window in zip(made, self.windows)]
        self.path = self.travellers()
        self.started = self.done = 0
        self.under_way: list[Any] = [None] * WINDOWS
        if self.meeting.on_gpus:
            self.stream = torch.cuda.Stream()
            self.freed = torch.cuda.Event()
            self.ready = [torch.cuda.Event() for _ in range(WINDOWS)]
            self.freed.record()

    def _start(self) -> None:
        slot, layer = self.started % WINDOWS, self.path[self.started % len(self.path)]
        self.started += 1
        if not self.meeting.on_gpus:
            self.under_way[slot] = self.move(layer, self.windows[slot])
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.freed)
            work = self.move(layer, self.windows[slot])
            if work is not None:
                work.wait()  # this stream's, not the host's
            self.ready[slot].record(self.stream)

    def _refill(self) -> None:
        while self.path and self.started < self.done + WINDOWS:
            self._start()

    def _await(self, slot: int) -> None:
        if self.meeting.on_gpus:
            torch.cuda.current_stream().wait_event(self.ready[slot])
        elif self.under_way[slot] is not None:
            self.under_way[slot].wait()
            self.under_way[slot] = None

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for layer in range(self.shape.layers):
            self._refill()
            if not self.path or self.path[self.done % len(self.path)] != layer:
                x = self.replicated.model.layers[layer](x)
                continue
            slot = self.done % WINDOWS
            own = self.source_of(layer) == self.meeting.rank
            if not own:
                self._await(slot)
            x = (self.replicated.model.layers[layer] if own else self.through[slot])(x)
            if own and not self.meeting.on_gpus:
                self._await(slot)
            if self.meeting.on_gpus:
                self.freed.record()
            self.done += 1
        self._refill()
        return x

    def rest(self) -> None:
        """What is on its way is the beginning of the next pass, and is kept."""
        for slot in range(WINDOWS):
            self._await(slot)

    def arms(self, tokens: int) -> list[Arm]:
        x = self.input(tokens)
        details = {"mode": "eager", "prefetch": 1, "windows": WINDOWS}
        return [Arm(self.title, lambda: self.run(x), rest=self.rest, details=details)]

    def close(self) -> None:
        self.meeting.synchronize()
        self.meeting.meet()
        kept = {"bench", "meeting", "shape", "memory", "replicated"}
        for name in set(vars(self)) - kept:
            delattr(self, name)
        self.meeting.meet()


class Broadcast(Windowed):
    """The original's scheme: every layer by torch.distributed's broadcast from its source, all ranks in step, in a
    group and on a stream of its own, one layer ahead. The source computes from its own memory."""

    title = "broadcast"

    def refusal(self) -> str | None:
        return has_nccl(self.meeting)

    def travellers(self) -> list[int]:
        return list(range(self.shape.layers))

    def open(self) -> None:
        super().open()
        self.group = dist.new_group(backend="nccl" if self.meeting.on_gpus else "gloo")

    def move(self, layer: int, window: torch.Tensor) -> Any:
        source = self.source_of(layer)
        memory = self.replicated.layers[layer] if source == self.meeting.rank else window
        return dist.broadcast(memory, src=source, group=self.group, async_op=True)


class PeerCopy(Windowed):
    """copy_ from the source's tensor, mapped by CUDA IPC as torch does it: the copy is then a stream's of the GPU it
    comes from."""

    title = "peer copy"

    def refusal(self) -> str | None:
        return None if self.meeting.on_gpus else "there is no CUDA IPC on a processor"

    def travellers(self) -> list[int]:
        return [layer for layer in range(self.shape.layers) if self.source_of(layer) != self.meeting.rank]

    def open(self) -> None:
        super().open()
        offered = {
            layer: reduce_tensor(memory)
            for layer, memory in enumerate(self.replicated.layers)
            if self.source_of(layer) == self.meeting.rank
        }
        everyones = self.meeting.gather(offered)
        self.remote: dict[int, torch.Tensor] = {}
        for layer in self.path:
            rebuild, arguments = everyones[self.source_of(layer)][layer]
            self.remote[layer] = rebuild(*arguments)

    def move(self, layer: int, window: torch.Tensor) -> None:
        window.copy_(self.remote[layer], non_blocking=True)


# ---- FSDP2 --------------------------------------------------------------------------------------------------------


class Fsdp(Way):
    """fully_shard layer by layer, resharded after each; 1 or 2 layers prefetched explicitly, also across passes."""

    title = "FSDP2"
    suffixes = (" p=1", " p=2", " p=1 across passes", " p=2 across passes")
    symmetric = False

    def needs(self) -> int:
        """Shards, and what is gathered: a layer in use, two on the way, and the gather's own buffers."""
        return self.shape.bytes // self.meeting.size + 5 * self.shape.layer_bytes

    def refusal(self) -> str | None:
        return has_nccl(self.meeting)

    def mesh(self) -> DeviceMesh:
        return init_device_mesh(self.meeting.device.type, (self.meeting.size,))

    def open(self) -> None:
        self.model: Any = empty_stack(self.shape)
        mesh = self.mesh()
        for layer in self.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(self.model, mesh=mesh, reshard_after_forward=False)  # no parameters of its own
        self.model.to_empty(device=self.meeting.device)
        if self.symmetric:
            for layer in self.model.layers:
                layer.set_symm_mem_for_comm("NCCL")
        for name, parameter in self.model.named_parameters():
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            parts = values(name, whole, self.meeting.device).chunk(self.meeting.size)
            if self.meeting.rank < len(parts):
                parameter.to_local().copy_(parts[self.meeting.rank])

    def _set(self, ahead: int, across: bool) -> None:
        layers = list(self.model.layers)
        circle = layers + (layers if across else [])
        for number, layer in enumerate(layers):
            layer.set_modules_to_forward_prefetch(circle[number + 1 : number + 1 + ahead])

    def _rest(self) -> None:
        """What was gathered for a next pass is dropped."""
        self.meeting.synchronize()
        for layer in self.model.layers:
            layer.unshard()  # waits for what is under way; where nothing is, it comes and goes
            layer.reshard()

    def arms(self, tokens: int) -> list[Arm]:
        x = self.input(tokens)
        made = []
        for suffix in self.suffixes:
            ahead, across = int(suffix.partition("p=")[2][0]), suffix.endswith("across passes")
            made.append(
                Arm(
                    self.title + suffix,
                    lambda: self.model(x),
                    begin=lambda ahead=ahead, across=across: self._set(ahead, across),
                    rest=self._rest if across else lambda: None,
                    check="close",  # what is gathered is elsewhere in each pass: cuBLAS may choose by alignment
                    details={"mode": "eager", "prefetch": ahead},
                )
            )
        return made


class FsdpCopyEngines(Fsdp):
    """The gathers by copy engines: staging in NCCL's symmetric memory, a communicator that uses no multiprocessor."""

    title = "FSDP2 copy engines"
    symmetric = True

    def refusal(self) -> str | None:
        if not self.meeting.on_gpus:
            return "there are no copy engines on a processor"
        if not hasattr(torch.distributed.fsdp.FSDPModule, "set_symm_mem_for_comm"):
            return f"torch {torch.__version__} has no set_symm_mem_for_comm"
        if not hasattr(dist.ProcessGroupNCCL, "NCCL_CTA_POLICY_ZERO"):
            return f"torch {torch.__version__} has no NCCL_CTA_POLICY_ZERO"
        return super().refusal()

    def mesh(self) -> DeviceMesh:
        options = dist.ProcessGroupNCCL.Options()
        options.config.cta_policy = dist.ProcessGroupNCCL.NCCL_CTA_POLICY_ZERO
        group = dist.new_group(backend="nccl", pg_options=options, device_id=self.meeting.device)
        return DeviceMesh.from_group(group, "cuda")


# ---- Tensor parallelism -------------------------------------------------------------------------------------------


class TensorParallel(Way):
    """Heads and hidden columns divided; two sums a layer; one pass computes the tokens of all ranks."""

    suffixes = ("", ", graph")

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.title = f"TP{self.meeting.size}"

    def needs(self) -> int:
        return self.shape.bytes // self.meeting.size

    def refusal(self) -> str | None:
        if not self.shape.divides_by(self.meeting.size):
            return "heads or hidden columns do not divide"
        return has_nccl(self.meeting)

    def refusal_of(self, suffix: str) -> str | None:
        return no_graphs(self.meeting) if suffix.endswith("graph") else None

    def combine(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        return x

    def open(self) -> None:
        whole, part = self.shape, self.shape.part(self.meeting.size)
        with torch.device("meta"):
            layers = [Layer(part, whole.head, self.combine).to(whole.dtype) for _ in range(whole.layers)]
        self.model = Stack(list(layers)).eval().requires_grad_(False)
        self.model.to_empty(device=self.meeting.device)
        shapes = dict(empty_stack(whole).named_parameters())
        for name, parameter in self.model.named_parameters():
            full = values(name, shapes[name], self.meeting.device)
            parameter.copy_(part_of(name, full, self.meeting.rank, self.meeting.size))

    def arms(self, tokens: int) -> list[Arm]:
        x = all_tokens(self, tokens)
        mine = slice(self.meeting.rank, self.meeting.rank + 1)
        captured = Captured(self.bench, self.model, x)
        runs = [("", lambda: self.model(x))]
        runs += [(", graph", captured)] if self.meeting.on_gpus else []
        return [
            Arm(self.title + suffix, lambda run=run: run()[mine], check="close", tolerance=tolerance_of(self.shape),
                baseline="replicated" + suffix, details={"mode": suffix.removeprefix(", ") or "eager"})
            for suffix, run in runs
        ]

    def close(self) -> None:
        title = self.title
        super().close()
        self.title = title


class _Borrowed(TensorParallel):
    """The same weights as the plain way's, in other modules."""

    def __init__(self, bench: Bench, plain: TensorParallel) -> None:
        super().__init__(bench)
        self.title = f"{plain.title}{self.addition}"
        self.plain = plain

    addition = ""

    def needs(self) -> int:
        return 0

    def refusal(self) -> str | None:
        if not self.meeting.on_gpus:
            return "there is no symmetric memory of a processor"
        return super().refusal()

    def layer(self) -> nn.Module:
        """An empty one."""
        raise NotImplementedError

    def open(self) -> None:
        if not self.plain.built:
            raise RuntimeError(f"it takes its weights from {self.plain.title}, which was not built")
        layers = []
        for source in self.plain.model.layers:
            with torch.device("meta"):
                layer = self.layer().to(self.shape.dtype)
            for name, parameter in source.named_parameters():
                owner, _, key = name.rpartition(".")
                layer.get_submodule(owner)._parameters[key] = parameter
            layers.append(layer)
        self.model = Stack(layers).eval()
        self.group_name = dist.group.WORLD.group_name

    def close(self) -> None:
        plain = self.plain
        super().close()
        self.plain = plain


class TensorParallelSymmetric(_Borrowed):
    """The sums by torch's symmetric memory instead of NCCL: one step for few bytes, two for many. No multicast."""

    addition = " symmetric"
    ONE_STEP_BYTES = 1 << 20

    def layer(self) -> nn.Module:
        return Layer(self.shape.part(self.meeting.size), self.shape.head, self.combine)

    def arms(self, tokens: int) -> list[Arm]:
        import torch.distributed._symmetric_memory as symmetric

        size = self.meeting.size * tokens * self.shape.width
        self.buffer = symmetric.empty(size, dtype=self.shape.dtype, device=self.meeting.device)
        symmetric.rendezvous(self.buffer, self.group_name)
        return super().arms(tokens)

    def combine(self, x: torch.Tensor) -> torch.Tensor:
        self.buffer.copy_(x.flatten())
        if x.nbytes <= self.ONE_STEP_BYTES:
            return torch.ops.symm_mem.one_shot_all_reduce(self.buffer, "sum", self.group_name).view_as(x)
        return torch.ops.symm_mem.two_shot_all_reduce_(self.buffer, "sum", self.group_name).view_as(x)


class OverlappedLayer(Layer):
    """Between its products each rank has the tokens of its own sequence only; gathering them and summing up for them is
    done in pieces beside the products, as torch's asynchronous tensor parallelism does."""

    group_name = ""

    def _gathered(self, x: torch.Tensor, *linears: nn.Linear) -> list[torch.Tensor]:
        weights = [linear.weight.t() for linear in linears]
        return torch.ops.symm_mem.fused_all_gather_matmul(x, weights, 0, self.group_name)[1]

    def _scattered(self, x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(x, linear.weight.t(), "sum", 0, self.group_name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attention, tokens = self.attention, x.shape[1]
        x = x.flatten(0, 1)
        everyones = self._gathered(self.input_norm(x), attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (part.view(-1, tokens, part.shape[-1] // attention.head, attention.head) for part in everyones)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        x = x + self._scattered(mixed.transpose(1, 2).flatten(2).flatten(0, 1), attention.o_proj)
        gate, up = self._gathered(self.post_norm(x), self.gate_proj, self.up_proj)
        return (x + self._scattered(F.silu(gate) * up, self.down_proj)).unsqueeze(0)


class TensorParallelOverlapped(_Borrowed):
    """Sequence parallel beside it, with torch's fused gather-and-multiply and multiply-and-scatter."""

    addition = " overlapped"
    suffixes = ("",)

    def layer(self) -> nn.Module:
        layer = OverlappedLayer(self.shape.part(self.meeting.size), self.shape.head)
        layer.group_name = dist.group.WORLD.group_name
        return layer

    def open(self) -> None:
        import torch.distributed._symmetric_memory  # noqa: F401  # the operators

        super().open()

    def arms(self, tokens: int) -> list[Arm]:
        x = self.input(tokens)
        return [
            Arm(self.title, lambda: self.model(x), check="close", tolerance=tolerance_of(self.shape),
                details={"mode": "eager"})
        ]
