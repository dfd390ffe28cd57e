# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds and no tensor of the model is made of: told, and refused where it says that what is taken are
no weights before they are multiplied by it.

Knows names and how formats of quantised weights call what belongs to a weight; reads nothing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from pathlib import Path

from torch import nn

from .recipes import is_of_transformers, lines_of_fill
from .refusals import Refused, all_tensors

_log = logging.getLogger("layershard")
_TOLD = 4
_OF_A_WEIGHT = re.compile(r"scale|zero|absmax|quant|packed|blocks|shape|qdata|nested|g_idx|scb", re.IGNORECASE)
# Nothing but a quantised layer has one of these beside its weight, or instead of it.
_NEVER_PLAIN = re.compile(
    r"(.*)\.(qweight|qzeros|scales|g_idx|SCB|W_q|weight_format|weight_packed|(?:\w+_)?scale_inv|qscale_weight)"
)
# What makes transformers give plain weights, by how a name ends; other methods of its have dequantize().
_PLAIN_BY = {"scale_inv": "FineGrainedFP8Config", "_blocks": "Mxfp4Config", "_scales": "Mxfp4Config"}


class Leftover:
    """The checkpoint's @keys less those that are @used for any layer of the model, whichever rank's."""

    def __init__(self, model: nn.Module, keys: Collection[str], used: Collection[str], directory: Path) -> None:
        self._model = model
        self._directory = directory
        self._used = set(used)
        self._keys = sorted(set(keys) - self._used)

    def refuse_quantised(self) -> None:
        modules = {name.rpartition(".")[0] for name in self._used} | {name for name, _ in self._model.named_modules()}
        for key in self._keys:
            match = _NEVER_PLAIN.fullmatch(key)
            if match is not None and match[1] in modules:
                raise Refused(self._why(key, f"the weights of {match[1]} are"))
            weight = self._weight_of(key)
            if weight is not None:
                raise Refused(self._why(key, f"{weight} is"))

    def refuse_scaled(self, key: str) -> None:
        """@key holds bytes: what else its module has says whether they are the weight."""
        module = key.rpartition(".")[0]
        for each in self._keys:
            if each.rpartition(".")[0] == module and _OF_A_WEIGHT.search(each[len(module) :]):
                raise Refused(self._why(each, f"{key} is"))

    def hint(self, name: str) -> str:
        """Why @name may be missing."""
        extended = (f"{name}_", f"{name}.", f"{name}:")
        for key in self._keys:
            if _NEVER_PLAIN.fullmatch(key) or (key.startswith(extended) and _OF_A_WEIGHT.search(key[len(name) :])):
                return f". {self._why(key, 'The checkpoint is')}"
        return ""

    def tell(self) -> None:
        names = {name for name, _ in all_tensors(self._model)}
        expected = _expected(self._model, names)
        left = [key for key in self._keys if key not in names and not any(each.search(key) for each in expected)]
        if left:
            first = ", ".join(left[:_TOLD]) + (", ..." if len(left) > _TOLD else "")
            _log.warning("%d tensors of the checkpoint are not in the model, and are not read: %s", len(left), first)

    def _weight_of(self, key: str) -> str | None:
        """What is used and has a name that this one begins with: q_proj.weight, of q_proj.weight_scale_inv."""
        for cut in (place for place in range(len(key) - 1, 0, -1) if key[place] in "_.:"):
            if key[:cut] in self._used and _OF_A_WEIGHT.search(key[cut:]):
                return key[:cut]
        return None

    def _why(self, key: str, what: str) -> str:
        text = (
            f"{what} quantised: nothing in the model takes {key}, without which the values are others. Build the model "
            f"for the checkpoint's quantisation, or save it once as plain weights and load those"
        )
        if not is_of_transformers(self._model):
            return text
        where = repr(str(self._directory))
        config = next((config for ends, config in _PLAIN_BY.items() if key.endswith(ends)), None)
        if config is None:
            return text + lines_of_fill(f"from_pretrained({where}).dequantize()")
        config = f"__import__('transformers').{config}(dequantize=True)"
        return text + lines_of_fill(f"from_pretrained({where}, quantization_config={config})")


def _expected(model: nn.Module, names: set[str]) -> list[re.Pattern[str]]:
    """What models once saved, and compute for themselves now."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    for buffer in ("rotary_emb.inv_freq", "position_ids"):
        patterns += [rf"(^|\.){buffer}$"] if any(name.endswith(buffer) for name in names) else []
    return [re.compile(pattern) for pattern in patterns]
