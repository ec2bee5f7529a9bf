"""Turns running text made of word tokens, such as WikiText's, back into plain text.

The rule, line by line:

1. A sentence with ``<unk>`` is left out, because the word in its place is lost. Sentences end with
   `` . ``, `` ? `` or `` ! ``. Lines with nothing left are left out.
2. `` @-@ ``, `` @,@ `` and `` @.@ `` are signs within a word: they lose their marks and spaces.
3. Closing signs lose the space before them, opening signs the one after them. Of quotation marks
   every second one of a line is closing. ``'s``, ``n't`` and their like are joined to their word,
   and so is an apostrophe by itself.
"""

import re

UNKNOWN = "<unk>"
SENTENCE = re.compile(r".*?(?: [.?!](?= |$)|$)")
WITHIN = re.compile(r" ?@([-,.])@ ?")
CLOSING = re.compile(
    " +([,.:;?!%)\\]}\u2019\u201d\u2026]|'(?:s|t|m|d|re|ve|ll)\\b|n't\\b|'(?= |$))"
)
OPENING = re.compile("([(\\[{$\u00a3\u201c\u2018]) +")


def plain_text(text: str) -> str:
    """Returns the text by the rule of this module."""
    lines = [(line, _plain_line(line)) for line in text.split("\n")]
    return "\n".join(plain for line, plain in lines if plain or not line.strip())


def _plain_line(line: str) -> str:
    if UNKNOWN in line:
        line = "".join(part for part in SENTENCE.findall(line) if UNKNOWN not in part)
    line = WITHIN.sub(r"\1", line)
    line = OPENING.sub(r"\1", CLOSING.sub(r"\1", line))
    parts = line.split('"')
    for place in range(1, len(parts), 2):  # between an opening and a closing mark
        parts[place] = parts[place].strip()
    return '"'.join(parts).strip()
