"""Adapters: files of factors of differences to a base model, known by the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Collection

_FACTOR = re.compile(
    r"(^|[._])(lora_(A|B|down|up|embedding_[AB]|magnitude_vector)|hada_w[12]_[ab]|lokr_w[12]|ia3_l|vera_lambda_[bd]"
    r"|oft_r|boft_R)([._]|$)"
)
REASON = (
    "factors of the differences to a base model. Factors are not unique: each product B·A has many pairs of them, so "
    "the mean of factors is not the mean of what they do"
)
WAY_OUT = (
    "Merge each adapter into its base first, and fuse the whole models: PeftModel.from_pretrained(base, adapter)"
    ".merge_and_unload().save_pretrained(folder)."
)


def adapter_names(names: Collection[str]) -> list[str]:
    """Returns the names of the tensors that belong to an adapter.

    Example:
        >>> adapter_names(["q_proj.weight", "q_proj.lora_A.default.weight", "unet.lora_down.weight"])
        ['q_proj.lora_A.default.weight', 'unet.lora_down.weight']
    """
    return [name for name in names if _FACTOR.search(name)]
