# SPDX-License-Identifier: Apache-2.0
"""bench/torch/family_sweep.py with a compiler: a model of each library, compiled by inductor as a whole."""

import importlib
import pathlib
import sys

import pytest

import torch_ranks as ranks

torch = ranks.torch
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("layershard.torch")

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "bench" / "torch"))
families = importlib.import_module("family_ranks")
sweep = importlib.import_module("family_sweep")


@pytest.mark.parametrize(
    "library, family", [("family_language", "gpt2"), ("family_diffusion", "DiTTransformer2DModel")]
)
def test_a_compiled_family_gives_the_same_bits(tmp_path, monkeypatch, library, family):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    sweep.import_compiler()
    (found,) = families.run([sweep.case_of(importlib.import_module(library), family)], backend="inductor")
    assert found["result"] == "equal", found["reason"]
    assert found["windows"] > 0
