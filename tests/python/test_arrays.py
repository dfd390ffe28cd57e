# SPDX-License-Identifier: Apache-2.0
"""Memory of a series in other libraries' arrays, by DLPack: the right bytes, not writable, never gone too early."""

import gc
import subprocess
import sys

import pytest
from patience import LONG_S

import layershard
from layershard import dlpack
from python_ranks import run

numpy = pytest.importorskip("numpy", reason="numpy is not installed: scripts/python_env.sh installs it")

SHAPE = (6, 8)
OPTIONS = {"first_layer": 0, "layer_count": 3, "tensors": [layershard.Tensor("w", 6 * 8 * 4)]}


@pytest.fixture
def series():
    with layershard.Group(0, 1) as group:
        series = group.series("w", **OPTIONS)
        for layer in series.layers:
            view = series.view(layer, 0, SHAPE, numpy.float32, writable=True)
            numpy.from_dlpack(view)[:] = numpy.arange(48).reshape(SHAPE) + layer
        series.commit()
        yield series


def test_an_array_is_the_memory(series):
    array = numpy.from_dlpack(series.view(1, 0, SHAPE, "float32"))
    assert array.ctypes.data == series.address(1, 0)
    assert (array == numpy.arange(48).reshape(SHAPE) + 1).all()
    whole = numpy.from_dlpack(series.view(1, 0, (192,), "uint8"))
    assert whole.tobytes() == array.tobytes()


def test_an_array_is_read_only(series):
    array = numpy.from_dlpack(series.view(1, 0, SHAPE, "float32"))
    assert not array.flags.writeable
    with pytest.raises(ValueError):
        array[0, 0] = 1


def test_an_array_outlives_series_and_group():
    with layershard.Group(0, 1) as group:
        series = group.series("w", **OPTIONS)
        numpy.from_dlpack(series.view(2, 0, SHAPE, "float32", writable=True))[:] = 7
        series.commit()
        array = numpy.from_dlpack(series.view(2, 0, SHAPE, "float32"))
        view = series.view(2, 0, SHAPE, "float32")
        handle = group._handle
    assert series.closed and handle.pointer
    del series, group
    gc.collect()
    assert (array == 7).all()
    with pytest.raises(layershard.WrongState, match="closed"):
        numpy.from_dlpack(view)
    del array
    assert not handle.pointer, "the group goes with the last array"


def test_a_view_keeps_a_forgotten_series():
    with layershard.Group(0, 1) as group:
        series = group.series("w", **OPTIONS)
        series.commit()
        view = series.view(0, 0, SHAPE, "float32")
        group._series.clear()
        del series
        assert numpy.from_dlpack(view).shape == SHAPE


def test_a_capsule_nobody_took_lets_go(series):
    for version in (None, (1, 0)):
        capsule = series.view(0, 0, SHAPE, "float32").__dlpack__(max_version=version)
        assert len(dlpack._exported) == 1
        del capsule
        assert not dlpack._exported


@pytest.mark.parametrize(
    ("shape", "dtype", "text"),
    [
        ((6, 8), "float64", "384 bytes; tensor 0 has 192"),
        ((47,), "float32", "188 bytes"),
        ((6, 8), "floaty", "dtype 'floaty' is not known; known are"),
        ((-6, -8), "float32", "negative"),
    ],
)
def test_a_wrong_shape_is_refused(series, shape, dtype, text):
    with pytest.raises(layershard.Invalid) as failure:
        series.view(0, 0, shape, dtype)
    assert text in str(failure.value)


def test_what_a_view_cannot_give_is_refused(series):
    view = series.view(0, 0, SHAPE, "float32")
    assert view.__dlpack_device__() == (1, 0)
    with pytest.raises(BufferError, match="copied"):
        view.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="device"):
        view.__dlpack__(dl_device=(2, 0))
    with pytest.raises(layershard.WrongState):
        series.view(0, 0, SHAPE, "float32", writable=True)  # committed


def from_peers(group):
    series = group.series("w", **OPTIONS)

    def fill(layer, addresses):
        view = series.view(layer, 0, SHAPE, "float32", writable=True)
        assert view.address == addresses[0]
        numpy.from_dlpack(view)[:] = layer

    series.commit(fill)
    arrays = [numpy.from_dlpack(series.view(layer, 0, SHAPE, "float32")) for layer in series.layers]
    for layer in series.layers:
        series.reach(layer)
        series.wait(layer)
        assert (arrays[layer] == layer).all()


@pytest.mark.parametrize("transport", ["shm", "shm:copy", "local"])
def test_arrays_made_once_show_every_pass(transport):
    run(2, from_peers, transport=transport)


def test_torch_takes_a_view(series):
    torch = pytest.importorskip("torch", reason="torch is not installed: scripts/python_env.sh --torch installs it")
    tensor = torch.from_dlpack(series.view(1, 0, SHAPE, torch.float32))
    assert tensor.data_ptr() == series.address(1, 0) and tensor[5, 7] == 48
    for dtype in (torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn, torch.bool):
        n = 192 // dtype.itemsize
        assert torch.from_dlpack(series.view(1, 0, (n,), dtype)).dtype == dtype


PROGRAM_THAT_JUST_ENDS = """
import layershard, numpy
series = layershard.Group(0, 1).series("w", first_layer=0, layer_count=1, tensors=[layershard.Tensor("w", 64)])
array = numpy.from_dlpack(series.view(0, 0, (64,), "uint8", writable=True))
numpy.array_kept_for_ever = array
{also}
"""


KEEP_A_TENSOR = "import torch; torch.kept = torch.from_dlpack(series.view(0, 0, (64,), 'uint8'))"


@pytest.mark.parametrize("also", ["", KEEP_A_TENSOR], ids=["numpy", "torch"])
def test_a_program_may_end_with_arrays_alive(also):
    if also:
        pytest.importorskip("torch", reason="torch is not installed: scripts/python_env.sh --torch installs it")
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM_THAT_JUST_ENDS.format(also=also)], capture_output=True, text=True, timeout=LONG_S
    )
    assert (ended.returncode, ended.stderr) == (0, "")
