"""Running text: which lines of a file, or rows of a data set, make a document."""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

DOCUMENTS = ("auto", "file", "blank", "row", "wikitext")
TITLE = re.compile(
    r"\s*= [^=\s](.*[^=\s])? =\s*"
)  # of an article of WikiText; its sections have more signs


@dataclass
class Texts:
    """What becomes of records of the form text, in all files of a source.

    Attributes:
        rule: what begins a document: ``row``: every row; ``blank``: a blank row; ``wikitext``: the title of an article;
            ``file``: a file; ``auto``: titles if the first row is one, else ``file`` for text files and ``row`` for others.
            None: text files are documents by ``auto``, other rows stay what they are.
        most: how many rows are taken, blank ones not counted; None for all.
    """

    rule: str | None = None
    most: int | None = None
    taken: int = field(default=0, init=False)

    def documents(self, records: Iterator[dict], in_lines: bool) -> Iterator[dict]:
        """The records of a file, documents where they are texts. ``in_lines``: it is a text file, whose lines they are."""
        first = next(records, None)
        if first is None:
            return
        records = chain([first], records)
        if (self.rule is None and not in_lines) or "text" not in first:
            yield from records
        else:
            yield from _join(
                self._first(records), self.rule or "auto", "file" if in_lines else "row"
            )

    def _first(self, records: Iterable[dict]) -> Iterator[dict]:
        for record in records:
            self.taken += not _blank(record["text"])
            if self.taken > (sys.maxsize if self.most is None else self.most):
                return
            yield record


def _join(rows: Iterable[dict], rule: str, otherwise: str) -> Iterator[dict]:
    """Blank rows stay within a document, and are left out around it."""
    document: list[dict] = []
    for row in rows:
        text = row["text"]
        if not document and _blank(text):
            continue
        if rule == "auto":
            rule = "wikitext" if TITLE.fullmatch(text) else otherwise
        begins = {
            "file": False,
            "blank": _blank(text),
            "row": True,
            "wikitext": TITLE.fullmatch(text) is not None,
        }[rule]
        if begins and document:
            yield _text(document)
            document = []
        if document or not _blank(text):
            document.append(row)
    if document:
        yield _text(document)


def _text(rows: list[dict]) -> dict:
    """A document; what its first row says beside its text is said of it."""
    while _blank(rows[-1]["text"]):
        rows.pop()
    text = (
        "\n".join(row["text"].removesuffix("\n") for row in rows)
        if len(rows) > 1
        else rows[0]["text"]
    )
    return rows[0] | {"text": text}


def _blank(row: str) -> bool:
    return not row.strip()
