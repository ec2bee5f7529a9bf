"""Running text: decides which lines of a file, or rows of a data set, form a document."""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from stanford_alpaca.data.detokenize import plain_text

DOCUMENTS = ("auto", "file", "blank", "row", "wikitext")
# the title of a WikiText article; the titles of its sections have more signs
TITLE = re.compile(r"\s*= [^=\s](.*[^=\s])? =\s*")


@dataclass
class Texts:
    """Joins records of the form ``text`` into documents, in all files of a source.

    Attributes:
        rule: what begins a document.
            ``row``: every row.
            ``blank``: a blank row.
            ``wikitext``: the title of an article.
            ``file``: only the next file.
            ``auto``: ``wikitext`` if the first row is a title, else ``file`` for text files and
            ``row`` for others.
            None: ``auto`` for text files; other rows stay as they are.
        plain: whether word tokens become plain text again, see ``detokenize``.
        most: how many rows to take, blank ones not counted; None for all.
        taken: how many rows were taken so far.
    """

    rule: str | None = None
    most: int | None = None
    plain: bool = False
    taken: int = field(default=0, init=False)

    def documents(self, records: Iterator[dict], in_lines: bool) -> Iterator[dict]:
        """Yields the records of a file, with texts joined into documents.

        Args:
            in_lines: whether the file is a text file, and each record one of its lines.
        """
        first = next(records, None)
        if first is None:
            return
        records = chain([first], records)
        if "text" not in first:
            yield from records
            return
        if self.rule is not None or in_lines:
            otherwise = "file" if in_lines else "row"
            records = _join(self._first(records), self.rule or "auto", otherwise)
        for record in records:
            yield record | {"text": plain_text(record["text"])} if self.plain else record

    def _first(self, records: Iterable[dict]) -> Iterator[dict]:
        for record in records:
            self.taken += not _blank(record["text"])
            if self.taken > (sys.maxsize if self.most is None else self.most):
                return
            yield record


def _join(rows: Iterable[dict], rule: str, otherwise: str) -> Iterator[dict]:
    """Joins rows into documents. Keeps blank rows within a document, and drops those around it."""
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
    """Joins the rows of a document. Its other fields are those of its first row."""
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
