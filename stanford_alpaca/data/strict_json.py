"""Decodes JSON and refuses repeated keys, which Python's decoder would silently merge."""

import json
from collections.abc import Sequence


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Returns an object's pairs as a dict. Raises ValueError if a key is repeated."""
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(
            f"the key {duplicate([key for key, _ in pairs])!r} stands twice in an object"
        )
    return record


def duplicate(names: Sequence[str]) -> str | None:
    """Returns the first name that equals an earlier one, or None."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


JSON = json.JSONDecoder(object_pairs_hook=_without_duplicates)
