#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write a tiny random Llama as a GGUF file, for tests: every type the reader knows, a vocabulary of all bytes.

The same options give the same bytes. Needs Python's standard library only. What it generates is noise, but the same
noise on any number of ranks, which is what the tests look at.
"""

import argparse
import random
import struct

U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
TYPES = {"F32": 0, "F16": 1, "Q4_1": 3, "Q8_0": 8}
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "i n", "a n", "an d", "Ġ t", "Ġ the", "o n", "e r", "Ġ a", "Ġ and", "r e", "Ã ¼", "l l"]
MERGES += ["ll o", "Ġ Ġ"]


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key, kind, value):
    packed = {
        U32: lambda: struct.pack("<I", value),
        F32: lambda: struct.pack("<f", value),
        BOOL: lambda: struct.pack("<B", value),
        STRING: lambda: text(value),
    }[kind]()
    return text(key) + struct.pack("<I", kind) + packed


def array(key, kind, values):
    packed = b"".join(text(v) if kind == STRING else struct.pack("<i", v) for v in values)
    return text(key) + struct.pack("<IIQ", ARRAY, kind, len(values)) + packed


def alphabet():
    """GPT-2's printable character for each byte."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in itself]
    return [chr(byte if byte in itself else 256 + others.index(byte)) for byte in range(256)]


def vocabulary():
    tokens = SPECIALS + alphabet() + [merge.replace(" ", "") for merge in MERGES]
    return tokens, [3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS))


def matrix(source, kind, rows, columns):
    """Random values with a deviation of about 1 / sqrt(columns), as stored bytes."""
    deviation, count = columns**-0.5, rows * columns
    if kind in ("F32", "F16"):
        values = (source.uniform(-1.7, 1.7) * deviation for _ in range(count))
        return struct.pack(f"<{count}{'f' if kind == 'F32' else 'e'}", *values)
    blocks = []
    for _ in range(count // 32):
        spread = deviation * source.uniform(0.8, 1.2)
        if kind == "Q8_0":
            blocks.append(struct.pack("<e", spread / 74) + source.randbytes(32))
        else:
            blocks.append(struct.pack("<ee", spread / 4.6, -7.5 * spread / 4.6) + source.randbytes(16))
    return b"".join(blocks)


def tensors(options, vocabulary_size):
    """(name, innermost size first, type, bytes) of each tensor."""
    source = random.Random(options.seed)
    kinds = list(TYPES) if options.types == "mix" else options.types.split(",")
    hidden, feed, head = options.hidden, options.feed_forward, options.hidden // options.heads
    key = options.kv_heads * head
    shapes = [("attn_q", hidden, hidden), ("attn_k", key, hidden), ("attn_v", key, hidden)]
    shapes += [("attn_output", hidden, hidden), ("ffn_gate", feed, hidden), ("ffn_up", feed, hidden)]
    shapes += [("ffn_down", hidden, feed)]

    def norm(name):
        return name, [hidden], "F32", struct.pack(f"<{hidden}f", *(source.uniform(0.5, 1.5) for _ in range(hidden)))

    outer = [("token_embd.weight", "Q8_0" if options.types == "mix" else kinds[0])]
    if options.untied:
        outer.append(("output.weight", kinds[-1]))
    for name, kind in outer:
        yield name, [hidden, vocabulary_size], kind, matrix(source, kind, vocabulary_size, hidden)
    for layer in range(options.layers):
        yield norm(f"blk.{layer}.attn_norm.weight")
        yield norm(f"blk.{layer}.ffn_norm.weight")
        for number, (name, rows, columns) in enumerate(shapes):
            kind = kinds[(layer + number) % len(kinds)]
            yield f"blk.{layer}.{name}.weight", [columns, rows], kind, matrix(source, kind, rows, columns)
    yield norm("output_norm.weight")


def metadata(options, tokens, kinds):
    return [
        pair("general.architecture", STRING, "llama"),
        pair("general.name", STRING, f"tiny {options.seed}"),
        pair("llama.block_count", U32, options.layers),
        pair("llama.context_length", U32, options.context),
        pair("llama.embedding_length", U32, options.hidden),
        pair("llama.feed_forward_length", U32, options.feed_forward),
        pair("llama.attention.head_count", U32, options.heads),
        pair("llama.attention.head_count_kv", U32, options.kv_heads),
        pair("llama.rope.freq_base", F32, 10000.0),
        pair("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
        pair("tokenizer.ggml.model", STRING, "gpt2"),
        pair("tokenizer.ggml.pre", STRING, "smollm"),
        array("tokenizer.ggml.tokens", STRING, tokens),
        array("tokenizer.ggml.token_type", I32, kinds),
        array("tokenizer.ggml.merges", STRING, MERGES),
        pair("tokenizer.ggml.eos_token_id", U32, 2),
        *([pair("tokenizer.ggml.bos_token_id", U32, 1)] if options.bos else []),
        pair("tokenizer.ggml.add_bos_token", BOOL, options.bos),
    ]


def write(path, options):
    tokens, kinds = vocabulary()
    pairs, infos, data = metadata(options, tokens, kinds), [], bytearray()
    for name, sizes, kind, stored in tensors(options, len(tokens)):
        infos.append(text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, TYPES[kind], len(data)))
        data += stored + bytes(-len(stored) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(pairs)) + b"".join(pairs) + b"".join(infos)
    with open(path, "wb") as file:
        file.write(head + bytes(-len(head) % 32) + data)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file")
    numbers = {"layers": 8, "hidden": 64, "heads": 4, "kv-heads": 2, "feed-forward": 128, "context": 512, "seed": 1}
    for name, default in numbers.items():
        parser.add_argument("--" + name, type=int, default=default, metavar="N", help=f"default {default}")
    parser.add_argument("--types", default="mix", help="of the matrices: mix (default), or F32,F16,Q4_1,Q8_0 in turn")
    parser.add_argument("--untied", action="store_true", help="with an output matrix of its own")
    parser.add_argument("--bos", action="store_true", help="ask for <|im_start|> in front of every prompt")
    options = parser.parse_args()
    if options.hidden % 32 or options.feed_forward % 32:
        parser.error("--hidden and --feed-forward are multiples of 32: blocks of quantised values are that long")
    if options.hidden % options.heads or options.heads % options.kv_heads or options.hidden // options.heads % 2:
        parser.error("--heads divides --hidden into even parts, and --kv-heads divides --heads")
    write(options.file, options)


if __name__ == "__main__":
    main()
