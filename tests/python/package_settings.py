# SPDX-License-Identifier: Apache-2.0
"""What tests by the Python package share; importing it is enough. Where the package and the library are is the
environment's to say:

PYTHONPATH           python/ of this tree (default), or an installed package's place
LAYERSHARD_LIBRARY   liblayershard.so (default: as the package finds it)
"""

import os
import pathlib
import signal
import sys

TREE = pathlib.Path(__file__).resolve().parents[2]
sys.path += [str(TREE / "tests"), str(TREE / "python")]
# Ranks that are processes find the package as this one does.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [os.environ.get("PYTHONPATH"), str(TREE / "python"), str(TREE / "tests")])
)
for _name in ("LAYERSHARD_TRANSPORT", "LAYERSHARD_JOB", "RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
    os.environ.pop(_name, None)
from patience import LONG_MS  # noqa: E402

os.environ["LAYERSHARD_TIMEOUT_MS"] = str(LONG_MS)
# A shell starts what runs in the background deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
