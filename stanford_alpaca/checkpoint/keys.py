"""Compares the keys of a model's weights with its architecture, as transformers reports them."""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from stanford_alpaca.errors import listed

SHOWN = 3  # how many keys of each kind a message names
# constants that GPT-2 to GPT-J once saved
MASK = re.compile(r"\.attn(\.attention)?\.(masked_bias|bias|causal_mask)$")


@contextlib.contextmanager
def no_report() -> Iterator[None]:
    """Keeps transformers from printing its table of mismatched keys.

    The caller names them in one line.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_nothing)
    try:
        yield
    finally:
        logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def wrong_keys(info: Mapping[str, Any]) -> str:
    """Returns in words which keys are wrong, or "" if the weights fill the architecture.

    Keys that transformers itself ties or ignores by design do not count.

    Args:
        info: the ``output_loading_info`` of a ``from_pretrained`` that was called with
            ``ignore_mismatched_sizes=True``.
    """
    unused = [key for key in info["unexpected_keys"] if not MASK.search(key)]
    misshapen = [
        f"{key} ({list(has)}, wanted {list(wanted)})"
        for key, has, wanted in sorted(info["mismatched_keys"])
    ]
    found = {"missing": info["missing_keys"], "of no use": unused, "of another shape": misshapen}
    return "; ".join(
        f"{what}: {listed(sorted(keys), SHOWN)}" for what, keys in found.items() if keys
    )
