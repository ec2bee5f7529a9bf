"""What transformers found of the keys of an architecture in a model's weights."""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from stanford_alpaca.errors import listed

SHOWN = 3  # keys of a kind
MASK = re.compile(
    r"\.attn(\.attention)?\.(masked_bias|bias|causal_mask)$"
)  # constants that GPT-2 to GPT-J once saved


@contextlib.contextmanager
def no_report() -> Iterator[None]:
    """Keeps transformers from printing its table of what does not fit: the caller names it in a line."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_nothing)
    try:
        yield
    finally:
        logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def wrong_keys(info: Mapping[str, Any]) -> str:
    """What of ``from_pretrained``'s ``output_loading_info`` is wrong, in words; nothing if the weights fill the architecture.

    What transformers itself ties, or ignores by design, is not in it. Read with ``ignore_mismatched_sizes=True``.
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
