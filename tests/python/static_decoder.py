# SPDX-License-Identifier: Apache-2.0
"""A small decoder that generates with a cache of fixed size, as engines do: the prompt in eager mode, then one token
after the other by a program that torch.compile makes once. With random weights, the same on every rank."""

import torch_ranks as ranks

torch = ranks.torch

WIDTH, HEADS, LENGTH, WORDS = 64, 4, 48, 97


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.norm_too = torch.nn.RMSNorm(WIDTH), torch.nn.RMSNorm(WIDTH)
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x, at, keys, values):
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in self.qkv(self.norm(x)).chunk(3, -1))
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        seen = torch.arange(LENGTH, device=x.device) <= at[:, None]
        mixed = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(torch.nn.functional.silu(self.up(self.norm_too(x))))


class Decoder(torch.nn.Module):
    """Gives the next word of each sequence."""

    def __init__(self, n_layers):
        super().__init__()
        self.words = torch.nn.Embedding(WORDS, WIDTH)
        self.places = torch.nn.Embedding(LENGTH, WIDTH)
        self.layers = torch.nn.ModuleList(Block() for _ in range(n_layers))
        self.head = torch.nn.Linear(WIDTH, WORDS)

    def forward(self, words, at, cache):
        x = self.words(words) + self.places(at)
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            x = layer(x, at, keys, values)
        return self.head(x[:, -1:]).argmax(-1)


def decoder(n_layers=4):
    torch.manual_seed(7)
    return Decoder(n_layers).eval().requires_grad_(False)


def empty_cache(model):
    """At addresses that stay, as caches of fixed size have them."""
    place = model.head.weight.device
    made = [[torch.zeros(1, HEADS, LENGTH, WIDTH // HEADS, device=place) for _ in "kv"] for _ in model.layers]
    for each in sum(made, []):
        torch._dynamo.mark_static_address(each)
    return made


def prompt(number, length):
    return torch.randint(WORDS, (1, length), generator=torch.Generator().manual_seed(number))


def generate(model, run, cache, words, count):
    """@count words after @words: the first by @model, the others by @run, which is it or is compiled from it."""
    place = model.head.weight.device
    for each in sum(cache, []):
        each.zero_()
    at = torch.arange(words.shape[1], device=place)
    found = [model(words.to(place), at, cache)]
    for _ in range(count - 1):
        at = at[-1:] + 1
        found.append(run(found[-1].clone(), at, cache).clone())
    return torch.cat(found, 1).tolist()
