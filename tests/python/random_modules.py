# SPDX-License-Identifier: Apache-2.0
"""Models made at random from a seed, the same on every rank: what programs do with a block's results.

States travel as tensors, lists, dicts or dataclasses; blocks have second results, which are returned, put into a
container they were given, or kept in an attribute; layers are skipped, repeated and run backwards; later layers read
what earlier ones left; buffers that are no parameters are written in place. Every block computes from its parameters by
products and element by element, since compilers treat the two differently.
"""

import dataclasses
import random

import torch

WIDTH = 16


@dataclasses.dataclass
class State:
    x: torch.Tensor
    notes: list


def wrap(form, x, notes):
    if form == "list":
        return [x, notes]
    if form == "dict":
        return {"x": x, "notes": notes}
    return State(x, notes) if form == "dataclass" else x


def unwrap(state):
    if isinstance(state, list):
        return state[0]
    if isinstance(state, dict):
        return state["x"]
    return state.x if isinstance(state, State) else state


class Block(torch.nn.Module):
    def __init__(self, form, second, tap, gate, counts, views, keeps):
        super().__init__()
        self.form, self.second, self.gate = form, second, gate
        self.counts, self.views, self.keeps = counts, views, keeps
        self.scale = torch.nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.shift = torch.nn.Parameter(torch.randn(WIDTH) / 4)
        self.up = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.down = torch.nn.Linear(2 * WIDTH, WIDTH)
        self.tap = torch.nn.Linear(WIDTH, tap)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.register_buffer("seen", torch.zeros(WIDTH), persistent=False)
        self.kept = None

    def forward(self, state, notes, extra=None):
        x = unwrap(state)
        scaled = x * self.scale + self.shift
        y = x + self.down(torch.relu(self.up(scaled)))
        if self.gate:
            y = y * torch.sigmoid(self.shift) + torch.tanh(scaled)
        if extra is not None:
            y = y + extra * self.scale
        if self.counts:
            self.calls.add_(1)
            self.seen.copy_(y[0])
        if self.second == "noted":
            notes.append(torch.tanh(self.tap(x)))
        elif self.second == "noted pointwise":
            notes.append(scaled)
        if self.keeps:
            self.kept = scaled
        if self.views:
            y, _ = torch.cat([y, y], -1).chunk(2, -1)
        result = wrap(self.form, y, notes)
        return (result, self.tap(x), x) if self.second == "returned" else (result, None, x)


class Model(torch.nn.Module):
    """draw: a random.Random. Three blocks, run in an order of their own."""

    def __init__(self, draw, keeps=False):
        super().__init__()
        form = draw.choice(["tensor", "list", "dict", "dataclass"])
        second = draw.choice(["returned", "noted", "noted pointwise", "none"])
        n_layers, tap = 3, draw.choice([8, 64])
        flags = [draw.random() < 0.5 for _ in range(3)]
        self.form = form
        self.layers = torch.nn.ModuleList(Block(form, second, tap, *flags, keeps) for _ in range(n_layers))
        self.order = list(range(n_layers))
        if draw.random() < 0.4:
            self.order.append(draw.randrange(n_layers))
        if draw.random() < 0.3:
            self.order.reverse()
        if draw.random() < 0.3:
            self.order.remove(draw.choice(self.order))
        self.skips = {draw.randrange(len(self.order)): draw.randint(1, 3) for _ in range(draw.randint(0, 2))}
        self.last_first = draw.random() < 0.5

    def forward(self, x):
        notes, taps, states = [], [], [x]
        state = wrap(self.form, x, notes)
        for place, index in enumerate(self.order):
            back = self.skips.get(place)
            extra = states[-back] if back is not None and back <= len(states) else None
            state, tap, before = self.layers[index](state, notes, extra)
            states.append(unwrap(state) + before)
            if tap is not None:
                taps.append(tap)
        kept = [layer.kept for layer in self.layers if layer.kept is not None]
        found = [torch.sin(each).sum(-1) for each in (*notes, *taps, *kept)]
        if self.last_first:
            found.reverse()
        return unwrap(state), sum(found) if found else states[1], torch.stack([each.sum() for each in states])


def model(seed, keeps=False):
    torch.manual_seed(seed)
    return Model(random.Random(seed), keeps).eval().requires_grad_(False)
