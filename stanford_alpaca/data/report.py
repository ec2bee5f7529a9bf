"""Reports what happened to the records of a source: how many were kept, dropped or cut.

Notes say what of them is not trained as a reader may expect it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from stanford_alpaca.errors import listed

KEPT, EMPTY, FILLED, REFUSED = range(4)  # the fates of a record, see ``DataReport``


def note_counts(encoded: Dataset) -> dict[str, int]:
    """Counts the records that have each note, the most frequent note first."""
    notes = pc.value_counts(pc.list_flatten(encoded.data["notes"]))
    return dict(
        Counter({row["values"].as_py(): row["counts"].as_py() for row in notes}).most_common()
    )


def count_lines(records: int, unused: Mapping[str, int], notes: Mapping[str, int]) -> list[str]:
    """Returns lines about fields that were not read and about notes, with numbers of records."""
    fields = listed(
        f"{name} ({count:,}{f' of {records:,} records' if number == 0 else ''})"
        for number, (name, count) in enumerate(unused.items())
    )
    return [
        *([f"not used: {fields}"] if unused else []),
        *(f"{note}: {count:,} of {records:,} records" for note, count in notes.items()),
    ]


@dataclass(frozen=True)
class DataReport:
    """What happened to the records of one source."""

    records: int
    kept: int
    no_response: int  # dropped: nothing to train, or a weight of 0
    filled: int  # dropped: the prompt takes the whole maximum length
    refused: int  # dropped: the template cannot write it
    truncated: int  # kept, but cut at the maximum length (the end is lost)
    straddling: int  # kept; a token crosses an end of what is trained, and is not trained
    tokens: int
    supervised_tokens: int
    refusal: str = ""  # of the first refused record: its number and the reason
    notes: Mapping[str, int] = field(default_factory=dict)  # note -> records, see ``Rendered``
    unused: Mapping[str, int] = field(default_factory=dict)  # unread field -> records with it
    template: str = ""  # the name of the template that wrote the prompts

    @classmethod
    def of(
        cls, encoded: Dataset, unused: Mapping[str, int] | None = None, template: str = ""
    ) -> "DataReport":
        """Returns the report of the rows that ``tokenize.encode_records`` returned."""
        columns = {
            name: encoded.data[name].to_numpy()
            for name in ("fate", "length", "full_length", "supervised", "straddling")
        }
        fate, kept = columns["fate"], columns["fate"] == KEPT
        refused = np.flatnonzero(fate == REFUSED)
        return cls(
            records=len(encoded),
            kept=int(kept.sum()),
            no_response=int((fate == EMPTY).sum()),
            filled=int((fate == FILLED).sum()),
            refused=len(refused),
            truncated=int((columns["length"] < columns["full_length"])[kept].sum()),
            straddling=int(columns["straddling"][kept].sum()),
            tokens=int(columns["length"][kept].sum()),
            supervised_tokens=int(columns["supervised"][kept].sum()),
            refusal=f"record {refused[0] + 1}: {encoded[int(refused[0])]['refusal']}"
            if len(refused)
            else "",
            notes=note_counts(encoded),
            unused=unused or {},
            template=template,
        )

    @property
    def dropped(self) -> int:
        return self.no_response + self.filled + self.refused

    def lines(self) -> list[str]:
        """Returns the report as a run prints it."""
        return [str(self), *count_lines(self.records, self.unused, self.notes)]

    def __str__(self) -> str:
        first = f" ({self.refusal})" if self.refusal else ""
        return (
            f"{self.kept:,} of {self.records:,} examples, {self.tokens:,} tokens, "
            f"{self.supervised_tokens:,} supervised; "
            f"dropped: {self.no_response:,} without a response, "
            f"{self.filled:,} whose prompt fills the length, "
            f"{self.refused:,} refused by the template{first}; "
            f"truncated: {self.truncated:,}, straddling: {self.straddling:,}"
        )
