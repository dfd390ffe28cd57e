# SPDX-License-Identifier: Apache-2.0
"""`layershard-llama --verify`: one hash, whoever looks and however the layers are kept."""

import re

import pytest


def hashes_of(result):
    assert all(rank["ok"] and rank["error"] is None for rank in result["ranks"])
    return {rank["hash"] for rank in result["ranks"]}


@pytest.fixture(scope="module")
def reference(program, tiny):
    (hash_,) = hashes_of(program.json("--verify", "--model", tiny, "--ranks", 1))
    assert re.fullmatch("[0-9a-f]{16}", hash_)
    return hash_


@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("placement", ["whole", "striped"])
@pytest.mark.parametrize(
    "mode", [[], ["--shm-copy"], ["--transport", "local"], ["--shm-copy", "--resident", "40%"]], ids=str
)
def test_every_rank_sees_the_same_bytes(program, tiny, reference, ranks, placement, mode):
    result = program.json("--verify", "--model", tiny, "--ranks", ranks, "--placement", placement, *mode)
    assert [rank["rank"] for rank in result["ranks"]] == list(range(ranks))
    assert hashes_of(result) == {reference}
    assert list(result) == ["schema", "ranks", "model", "config"] and result["schema"] == "layershard-llama-verify/1"


def test_text_has_a_line_per_rank(program, tiny, reference):
    done = program.run("--verify", "--model", tiny, "--ranks", 3)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == "".join(f"rank {rank}  {reference}  ok\n" for rank in range(3))
    many = program.run("--verify", "--model", tiny, "--ranks", 11)
    assert many.stdout == "".join(f"rank {rank:<2}  {reference}  ok\n" for rank in range(11))


def test_another_model_has_another_hash(program, tiny, reference, other_tiny):
    assert hashes_of(program.json("--verify", "--model", other_tiny, "--ranks", 2)) != {reference}
