"""JSON of which nothing is lost in silence."""

import json
from collections.abc import Sequence


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object's pairs as a dict, of which Python would silently keep the last of each key."""
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(
            f"the key {duplicate([key for key, _ in pairs])!r} stands twice in an object"
        )
    return record


def duplicate(names: Sequence[str]) -> str | None:
    """The first name that stands among those before it."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


JSON = json.JSONDecoder(object_pairs_hook=_without_duplicates)
