# SPDX-License-Identifier: Apache-2.0
"""Whether what runs is being compiled.

Knows torch's compilers; nothing of series or windows.
"""

from __future__ import annotations

import torch


def is_recording() -> bool:
    """Whether torch.compile or make_fx records operators: the library's calls are to be among them."""
    return torch.compiler.is_dynamo_compiling() or _is_proxied()


def _is_proxied() -> bool:
    """make_fx hands on tensors that write down what is done with them."""
    depth, kind = torch._C._len_torch_dispatch_stack(), torch._C._TorchDispatchModeKey.PROXY
    return depth > 0 and torch._C._get_dispatch_mode(kind) is not None
