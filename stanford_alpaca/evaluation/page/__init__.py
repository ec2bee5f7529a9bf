"""The report's page: ``page.html`` with its style, its scripts and the data in it, so that it asks for nothing else.

Whatever the data holds stays text: it stands in a block that is no script, the scripts make text nodes of it only, and the
page's policy lets no style and no script run but those whose hashes it names.
"""

import json
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

SCRIPTS = (
    "page.js",
    "curves.js",
    "measures.js",
    "samples.js",
    "map.js",
    "panel.js",
    "transport.js",
)  # one script, in this order
ESCAPED = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})


def render(data: dict[str, Any]) -> str:
    """The page as a text. The data must be JSON without NaN or infinity: ValueError otherwise."""
    style, script = _read("page.css"), "".join(map(_read, SCRIPTS))
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    parts = {"policy": policy, "style": style, "script": script, "data": as_block(data)}
    head, *rest = _read("page.html").split("{{")
    return head + "".join(
        parts[name] + text for name, _, text in (piece.partition("}}") for piece in rest)
    )


def as_block(data: dict[str, Any]) -> str:
    """JSON in which nothing can end the element that it stands in."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(
        ESCAPED
    )


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
