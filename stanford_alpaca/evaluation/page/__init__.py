"""Renders the report's page, a single file that loads nothing else.

It is ``page.html`` with its style, its scripts and the data inside. Whatever the data holds stays
text. The data stands in a block that is no script, and the scripts only make text nodes of it. The
page's content security policy allows only the style and the script whose hashes it names.
"""

import json
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

# joined into one script, in this order
SCRIPTS = (
    "page.js",
    "records.js",
    "bench.js",
    "curves.js",
    "measures.js",
    "entropy.js",
    "samples.js",
    "map.js",
    "panel.js",
    "transport.js",
)
ESCAPED = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})


def render(data: dict[str, Any]) -> str:
    """Returns the page as text. Raises ValueError if the data holds NaN or infinity."""
    style, script = _read("page.css"), "".join(map(_read, SCRIPTS))
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {"policy": policy, "style": style, "script": script, "data": as_block(data)}
    head, *rest = _read("page.html").split("{{")
    return head + "".join(
        parts[name] + text for name, _, text in (piece.partition("}}") for piece in rest)
    )


def as_block(data: dict[str, Any]) -> str:
    """Returns the data as JSON in which nothing can end the element that holds it."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(
        ESCAPED
    )


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
