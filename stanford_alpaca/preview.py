"""Shows what training will see: ``python -m stanford_alpaca.preview MODEL --data FILE [FILE ...]``.

Prints examples with trained tokens in colour and masked ones dim, the two tokens at the start of
every trained span, and a table for each source. With ``--transport N`` the model reads N records of
each: what it expects of them, and which look wrong.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from stanford_alpaca.checkpoint.files import write_new
from stanford_alpaca.console import printable, show
from stanford_alpaca.data.encode import SPECIAL
from stanford_alpaca.data.formats import check_columns, load_records, several_files, take_columns
from stanford_alpaca.data.records import form_of, unused_fields
from stanford_alpaca.data.report import count_lines
from stanford_alpaca.data.statistics import WHOLE, statistics_of
from stanford_alpaca.data.templates import check_template, told_templates, use_chat_template
from stanford_alpaca.data.tokenize import IGNORE_INDEX, ExampleEncoder, encode_records
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation import data_view
from stanford_alpaca.evaluation.data_view import Source
from stanford_alpaca.evaluation.page import render
from stanford_alpaca.flags import (
    check_whole,
    command,
    exit_on_user_error,
    from_command_line,
    word,
    words,
)
from stanford_alpaca.generation.writers import check_outputs
from stanford_alpaca.models.check import check_model
from stanford_alpaca.models.load import ModelSource

Piece = tuple[str, bool]  # the characters of a token, and whether it is trained


def pieces_of(record: dict, encode: ExampleEncoder) -> list[Piece]:
    """Returns a record token by token. Raises UserError if its template cannot write it."""
    text, ids, offsets, row = encode.in_parts(record)
    pieces: list[Piece] = []
    done = 0
    for token_id, (start, end), label in zip(ids, offsets, row["labels"], strict=False):
        piece = text[done:end].replace(SPECIAL, "")
        if (start, end) == (0, 0):  # a token that the tokenizer puts before the text
            piece = encode.encoder.name_of(token_id)
        if piece:  # byte tokens share one character: the first of them shows it
            pieces.append((piece, label != IGNORE_INDEX))
        done = max(done, end)
    return pieces


def boundaries_of(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Returns the last masked and the first trained token at the start of each trained span."""
    return [
        (masked, trained)
        for (masked, before), (trained, after) in pairwise(pieces)
        if after and not before
    ]


@dataclass(frozen=True)
class Options:
    """Shows what training will see: python -m stanford_alpaca.preview MODEL --data FILE [FILE ...]

    Args:
        model: the folder or hub name whose tokenizer and chat template are used.
        data: files, folders or hub names, also without the flag. Each is shown by itself.
        data_path: another name for data, as in training.
        examples: how many examples of each to show, 3 by default.
        max_length: tokens per example, 512 by default.
        model_max_length: another name for max_length, as in training.
        prompt_template: auto, alpaca, chat or plain.
        columns: other column names in the data, as instruction=question output=answer.
        chat_template, special_tokens, train_history, cache_dir: as in training.
        trust_remote_code: runs the code that comes with the model's folder or repository.
        json: prints the same as JSON: {source: {statistics, examples: [{pieces, boundaries}]}}.
        transport: how many records of each source the model reads: nll and emo of their tokens,
            suspicious labels, duplicates, and what EMO weighs otherwise than cross entropy.
        eval_path: with transport: held-out data, read too. What is also in --data is counted.
        out: with transport: a JSON file with every token that was read.
        page: with transport: an HTML page of what was found.
    """

    model: str | None = word()
    more_data: tuple[str, ...] = words()
    data: str | None = None
    data_path: str | None = None
    examples: int = 3
    max_length: int = 512
    model_max_length: int | None = None
    prompt_template: str = "auto"
    chat_template: str | None = None
    special_tokens: str = "text"
    train_history: bool = False
    columns: str | None = None
    cache_dir: str | None = None
    json: bool = False
    transport: int | None = None
    eval_path: str | None = None
    out: str | None = None
    page: str | None = None
    trust_remote_code: bool = False

    @property
    def length(self) -> int:
        """Tokens per example."""
        return self.max_length if self.model_max_length is None else self.model_max_length


def preview(options: Options) -> None:
    """Prints what training would see of each source, as text or as JSON."""
    given = [path for path in (options.data, options.data_path) if path is not None]
    check_whole("examples", options.examples, 0)
    check_whole("max_length", options.length, 2)
    files = check_transport(options)
    check_template(options.prompt_template, options.special_tokens)
    columns, others = take_columns(options.columns, list(options.more_data))
    paths = [*given, *others]
    if options.model is None or not paths:
        raise UserError("give a model and --data FILE")
    check_columns(paths, columns)
    if options.eval_path in paths:
        raise UserError(f"--eval_path {options.eval_path} is the data itself; give held-out data")
    source = ModelSource(options.model, options.cache_dir, options.trust_remote_code)
    check_model(source, weights=options.transport is not None)
    tokenizer = source.tokenizer()
    use_chat_template(tokenizer, options.chat_template, options.trust_remote_code)
    held_out = [] if options.eval_path is None else [options.eval_path]
    sources = [
        read_source(path, tokenizer, columns, options, held_out=path in held_out)
        for path in dict.fromkeys([*paths, *held_out])
    ]
    shown = {each.path: look_at(each, options) for each in sources}
    if options.json:
        show(json.dumps(shown, ensure_ascii=False, indent=1))
        return
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for path, found in shown.items():
        show_source(console, path, found, tokenizer, options)
    if options.transport is not None:
        show_transport(console, source, sources, options.transport, files)


def check_transport(options: Options) -> dict[str, Path]:
    """Returns the files that --out and --page name. Raises UserError for flags that do not fit."""
    named: dict[str, str | None] = {
        name: str(path) for name in ("out", "page") if (path := getattr(options, name))
    }
    if options.transport is None:
        for name in (*named, *(["eval_path"] if options.eval_path is not None else [])):
            raise UserError(f"--{name} belongs to --transport N")
        return {}
    check_whole("transport", options.transport, 1)
    if options.json:
        raise UserError("--json and --transport exclude each other: --out FILE writes JSON")
    return check_outputs(named)


def show_transport(
    console: Console, model: ModelSource, sources: list[Source], most: int, files: dict[str, Path]
) -> None:
    """Has the model read the sources, prints what it found, and writes the files."""
    found = data_view.look(model, sources, most, data_view.SHOWN if "page" in files else 0)
    data_view.show(console, found)
    written = {"out": lambda: json.dumps(data_view.as_json(found), ensure_ascii=False, indent=1)}
    written["page"] = lambda: render(data_view.page_data(found))
    for name, file in files.items():
        write_new(file, written[name]())
        console.print(f"{name}: {file.absolute()}")


def read_source(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    columns: Mapping[str, str],
    options: Options,
    held_out: bool,
) -> Source:
    """Returns the records of a source, and what encodes them."""
    template = options.prompt_template
    if options.chat_template is not None and template == "auto":
        template = "chat"
    records = load_records(
        path, options.cache_dir, columns=columns, train_history=options.train_history
    )
    form = form_of(records.column_names)
    encode = ExampleEncoder.of(tokenizer, form, options.length, template, options.special_tokens)
    return Source(path, records, encode, held_out)


def look_at(source: Source, options: Options) -> dict[str, Any]:
    """Returns the statistics and the first examples of a source."""
    records, cut = source.records, source.encode
    whole = ExampleEncoder(cut.template, cut.encoder, WHOLE)
    statistics = statistics_of(encode_records(records, whole), options.length)
    statistics |= {"not_used": unused_fields(records), "template": cut.template_name}
    return {"statistics": statistics, "examples": list(_examples(records, cut, options.examples))}


def show_source(
    console: Console,
    path: str,
    source: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    options: Options,
) -> None:
    """Prints a source: its examples, lines about its records, and two tables."""
    for number, example in enumerate(source["examples"], 1):
        console.print(Text(f"── {printable(path)}, example {number} ──", style="bold"))
        console.print(coloured(example["pieces"], console.is_terminal))
        for masked, trained in example["boundaries"]:
            console.print(f"boundary: {masked!r} is masked, {trained!r} is trained")
    found = source["statistics"]
    counts = count_lines(found["records"], found["not_used"], found["notes"])
    prompts = told_templates([found["template"]], tokenizer, options.chat_template)
    for line in [*several_files(path), *prompts, *counts]:
        console.print(printable(line))
    console.print(statistics_table(path, found, options.length))
    console.print(budgets_of(found, options.length))


run = command(Options, preview)


def _examples(records: Dataset, encode: ExampleEncoder, count: int) -> Any:
    """Yields the first ``count`` examples whose records the template can write."""
    for record in records:
        if count == 0:
            return
        try:
            pieces = pieces_of(record, encode)
        except UserError:
            continue
        yield {"pieces": pieces, "boundaries": boundaries_of(pieces)}
        count -= 1


def coloured(pieces: Sequence[Piece], in_colour: bool = True) -> Text:
    """Returns an example as text. Without colours, ⟦ and ⟧ enclose the trained spans."""
    text, before = Text(), False
    for piece, trained in [*pieces, ("", False)]:
        if not in_colour and trained != before:
            text.append("⟦" if trained else "⟧")
        text.append(printable(piece), style="bold green" if trained else "dim")
        before = trained
    return text


def statistics_table(path: str, statistics: dict[str, Any], max_length: int) -> Table:
    """Returns the table of statistics of one source."""
    table = Table("", printable(path), title=f"at most {max_length:,} tokens", title_justify="left")
    dropped, quantiles = statistics["dropped"], statistics["token_quantiles"]
    rows = {
        "records": f"{statistics['records']:,}",
        "kept": f"{statistics['kept']:,}",
        **{
            f"dropped: {reason.replace('_', ' ')}": f"{count:,}"
            for reason, count in dropped.items()
        },
        "truncated": f"{statistics['truncated']:,}",
        "a token straddles a boundary": f"{statistics['straddling']:,}",
        "tokens": f"{statistics['tokens']:,}",
        "supervised": f"{statistics['supervised_tokens']:,} ({statistics['supervised_share']:.1%})",
        "tokens of an example": ", ".join(
            f"{name}: {value:,}" for name, value in quantiles.items()
        ),
    }
    if statistics["first_refusal"]:
        rows["first refusal"] = statistics["first_refusal"]
    for name, value in rows.items():
        table.add_row(name, printable(value))
    return table


def budgets_of(statistics: dict[str, Any], max_length: int) -> Table:
    """Returns a table of what each maximum length would keep, truncate and lose."""
    table = Table(
        "--model_max_length",
        "kept",
        "truncated",
        "tokens",
        "supervised tokens lost",
        title_justify="left",
    )
    for budget, cut in statistics["budgets"].items():
        row = (
            f"{cut['kept']:,}",
            f"{cut['truncated']:,}",
            f"{cut['tokens']:,}",
            f"{cut['supervised_lost']:.2%}",
        )
        table.add_row(f"{budget:,}", *row, style="bold" if budget == max_length else None)
    return table


def main() -> None:
    """Runs the command."""
    exit_on_user_error(lambda: from_command_line(run))


if __name__ == "__main__":
    main()
