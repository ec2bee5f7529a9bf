"""Looks at data through a model before training: ``stanford_alpaca.preview --transport N``."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stanford_alpaca import __version__
from stanford_alpaca.console import printable
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.duplicates import NEAR, Asked, Duplicates, find_duplicates
from stanford_alpaca.data.prompts import as_shown
from stanford_alpaca.data.tokenize import ExampleEncoder
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.page.transport import rounded, view_of
from stanford_alpaca.evaluation.reading import (
    LEAST,
    MEANING,
    WORDING,
    Reading,
    read_with,
    rows_of,
)
from stanford_alpaca.generation.responses import load_for_generation
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.objective.head import original_weight

LISTED = 10  # rows of a table in the terminal
SHOWN = 24  # records of the page's transport view
NO_DATASKETCH = "near duplicates were not looked for: pip install datasketch"


@dataclass(frozen=True)
class Source:
    """Records of one file, folder or hub name, and what encodes them."""

    path: str
    records: Dataset
    encode: ExampleEncoder
    held_out: bool = False

    def asked(self) -> list[Asked]:
        """Returns all records as they are compared with each other."""
        return [Asked.of(shown(record)) for record in self.records]


def shown(record: Mapping) -> dict[str, str]:
    """Returns what a reader wants to see of a record; of running text, its beginning."""
    if "text" in record:
        return {"instruction": record["text"], "input": "", "reference": ""}
    return as_shown(record)


@dataclass(frozen=True)
class Found:
    """What was found.

    Attributes:
        rows: of each record that was read, see ``reading.rows_of``.
        tokens: the readings of ``rows``, in the same order.
        view: the transport view of some of them, in the order of ``chosen`` (places in ``rows``).
    """

    model: str
    sources: list[Source]
    rows: list[dict[str, Any]]
    tokens: list[Reading]
    duplicates: Duplicates
    chosen: list[int]
    view: dict[str, Any]


def look(model_source: ModelSource, sources: list[Source], most: int, in_view: int) -> Found:
    """Reads the first ``most`` records of each source with the model, and compares all of them.

    Raises:
        UserError: the model cannot be used.
    """
    near = importlib.util.find_spec("datasketch") is not None
    duplicates = find_duplicates({each.path: each.asked() for each in sources}, near)
    model, tokenizer = load_for_generation(model_source)
    places: list[tuple[str, int]] = []
    readings: list[Reading | None] = []
    try:
        cost = CostEmbedding(original_weight(model))
        for each in sources:
            first = each.records.select(range(min(most, len(each.records))))
            places += [(each.path, number) for number in range(len(first))]
            readings += read_with(model, first, cost, each.encode)
    except ValueError as error:
        raise UserError(f"{model_source.path}: {error}") from None
    rows = rows_of(places, readings)
    if not rows:
        raise UserError("--transport: no record has a token to predict; see the tables above")
    chosen = choose(rows)[:in_view]
    view = _view(model_source.path, model, tokenizer, [rows[i] for i in chosen], sources, cost)
    kept = [reading for reading in readings if reading is not None]
    return Found(model_source.path, sources, rows, kept, duplicates, chosen, view)


def choose(rows: list[dict[str, Any]]) -> list[int]:
    """Returns the places of the most telling rows, the most suspicious first, each once.

    Then come, in turn, the unlikeliest of another meaning and of another wording.
    """
    by_nll = sorted(range(len(rows)), key=lambda i: -rows[i]["nll"])
    suspicious = sorted(
        (i for i in by_nll if rows[i]["suspicious"]), key=lambda i: -rows[i]["suspicion"]
    )
    lists = [[i for i in by_nll if rows[i]["kind"] == kind] for kind in (MEANING, WORDING)]
    turns = [i for pair in zip(*lists, strict=False) for i in pair]
    return list(dict.fromkeys([*suspicious, *turns, *by_nll]))


def _view(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    sources: list[Source],
    cost: CostEmbedding,
) -> dict[str, Any]:
    """Returns the page's transport view of these records, as the report has it."""
    joined: dict[str, Any] = {"records": [[]] * len(rows), "pieces": {}, "neighbours": {}}
    questions = [{"instruction": "", "input": "", "reference": ""}] * len(rows)
    for source in sources:
        places = [i for i, row in enumerate(rows) if row["source"] == source.path]
        if not places:
            continue
        records = source.records.select([rows[i]["record"] - 1 for i in places])
        view = view_of(name, model, tokenizer, records, cost, source.encode)
        joined["tokens"] = view["tokens"]
        joined["pieces"] |= view["pieces"]
        joined["neighbours"] |= view["neighbours"]
        for i, record, tokens in zip(places, records, view["records"], strict=True):
            joined["records"][i] = tokens
            told = {"instruction": "", "input": ""} if "text" in record else shown(record)
            label = f"{source.path}, record {rows[i]['record']}"
            questions[i] = {**told, "instruction": f"{label}: {told['instruction']}".rstrip(": ")}
    return {"records": questions, "runs": [joined]}


def as_json(found: Found) -> dict[str, Any]:
    """Returns all that was found, with nll, emo and ratio of every token."""
    return {
        "version": __version__,
        "model": found.model,
        "records": [
            row
            | {
                "tokens": [
                    {
                        "text": text,
                        "nll": rounded(nll),
                        "emo": rounded(emo),
                        "ratio": rounded(emo / nll) if nll > 0 else 0.0,
                    }
                    for text, nll, emo in zip(
                        reading.texts, reading.nll.tolist(), reading.emo.tolist(), strict=True
                    )
                ]
            }
            for row, reading in zip(found.rows, found.tokens, strict=True)
        ],
        "duplicates": _told_duplicates(found),
    }


def _told_duplicates(found: Found) -> dict[str, Any]:
    """Returns the duplicates with records counted from 1 on."""
    exact, conflicting, near = found.duplicates

    def place(of: tuple[str, int]) -> list[Any]:
        return [of[0], of[1] + 1]

    return {
        "exact": [[place(of) for of in group] for group in exact],
        "conflicting": [[place(of) for of in group] for group in conflicting],
        "near": None
        if near is None
        else [[place(one), place(two), round(similarity, 4)] for one, two, similarity in near],
        "overlap": {
            each.path: found.duplicates.overlap(each.path)
            for each in found.sources
            if each.held_out
        },
    }


def lines_of(found: Found) -> list[str]:
    """Returns what was found, in sentences, each with what to do about it or what it means."""
    rows, (exact, conflicting, near) = found.rows, found.duplicates
    kinds = [row["kind"] for row in rows]
    count = f"{sum(row['suspicious'] for row in rows):,} (nll and emo far above those of similar"
    suspicious = f"{count} prompts)" if len(rows) >= LEAST else f"not among fewer than {LEAST}"
    tokens = sum(row["tokens"] for row in rows)
    lines = [
        f"read {len(rows):,} records, {tokens:,} tokens: "
        f"nll {sum(row['nll'] * row['tokens'] for row in rows) / tokens:.3f}, "
        f"emo {sum(row['emo'] * row['tokens'] for row in rows) / tokens:.4f}",
        f"of the unlikeliest quarter {kinds.count(MEANING):,} are of another meaning, "
        f"{kinds.count(WORDING):,} of another wording than the model expected",
        f"suspicious labels: {suspicious}",
        f"records that occur twice: {sum(map(len, exact)):,} in {len(exact):,} groups; "
        f"one question with several answers: {len(conflicting):,}",
    ]
    lines += [NO_DATASKETCH] if near is None else [f"near duplicates: {len(near):,} pairs"]
    for each in found.sources:
        if each.held_out:
            both = found.duplicates.overlap(each.path)
            nearly = "" if both["near"] is None else f", {both['near']:,} more nearly"
            lines.append(
                f"{each.path}: {both['exact']:,} of {len(each.records):,} held-out records "
                f"are in another file, too{nearly}"
            )
    return lines


def tables_of(found: Found) -> list[Table]:
    """Returns the tables of the terminal: the most telling records, and what EMO weighs anew."""
    telling = Table("record", "nll", "emo", "emo / nll", "distance", "", title="look at these")
    for i in choose(found.rows)[:LISTED]:
        row = found.rows[i]
        said = "suspicious label" if row["suspicious"] else row["kind"]
        numbers = (f"{row[name]:.3f}" for name in ("nll", "emo", "ratio", "distance"))
        telling.add_row(_name(row), *numbers, said)
    weighed = Table("record", "emo", "emo2", title="share of the pull, mle = 1")
    order = sorted(found.rows, key=lambda row: row["weight"]["emo2"])
    ends = order if len(order) <= LISTED else [*order[: LISTED // 2], *order[-LISTED // 2 :]]
    for row in ends:
        weighed.add_row(_name(row), *(f"{row['weight'][mode]:.2f}" for mode in ("emo", "emo2")))
    return [telling, weighed]


def _name(row: dict[str, Any]) -> str:
    return printable(f"{row['source']}, record {row['record']}")


def show(console: Console, found: Found) -> None:
    """Prints what was found."""
    for line in lines_of(found):
        console.print(printable(line))
    for table in tables_of(found):
        console.print(table)


def page_data(found: Found) -> dict[str, Any]:
    """Returns what the page shows: ``page.render`` draws it."""
    run: dict[str, Any] = {
        "name": found.model,
        "path": found.model,
        "flags": {},
        "curves": None,
        "model": True,
    }
    fields = (
        "source",
        "record",
        "tokens",
        "nll",
        "emo",
        "ratio",
        "distance",
        "kind",
        "suspicious",
        "weight",
    )
    return {
        "version": __version__,
        "sections": ["records", "transport"],
        "runs": [run],
        "evaluation": None,
        "samples": None,
        "transport": found.view,
        "records": {
            "lines": lines_of(found),
            "rows": [{field: _shorter(row[field]) for field in fields} for row in found.rows],
            "shown": found.chosen,
            "near": NEAR,
            "duplicates": _told_duplicates(found),
        },
    }


def _shorter(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _shorter(each) for name, each in value.items()}
    return rounded(value) if isinstance(value, float) else value
