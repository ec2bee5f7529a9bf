"""Reads prompts from a file or the command line, and encodes them as the model was trained."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers import PreTrainedConfig

from stanford_alpaca.console import say
from stanford_alpaca.data.reading import (
    DATA_SUFFIXES,
    kind_of_file,
    lines_of,
    open_text,
    read_file,
    readable,
    too_large,
)
from stanford_alpaca.data.records import parse_record
from stanford_alpaca.data.templates import IN_WORDS
from stanford_alpaca.data.tokenize import PromptEncoder
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import RECORD_LIMIT
from stanford_alpaca.models.load import ModelSource

PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin")


def encode_prompts(
    config: PreTrainedConfig, encode: PromptEncoder, records: list[dict], max_new_tokens: int
) -> list[list[int]]:
    """Returns the token ids of the prompts, as ``encode`` writes them.

    Raises:
        UserError: a prompt is empty, or leaves no room for an answer in the model's context.
    """
    prompts = encode(records)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    for number, ids in enumerate(prompts, 1):
        if not ids:
            raise UserError(
                f"prompt {number} is empty, and the tokenizer puts nothing before it: "
                "give it a word"
            )
        if context is not None and len(ids) + max_new_tokens > context:
            raise UserError(
                f"prompt {number} has {len(ids)} tokens; the model's context leaves room for "
                f"{context - max_new_tokens} before {max_new_tokens} new ones: shorten it, "
                "or ask for fewer new ones"
            )
    return prompts


def check_prompts(
    sources: list[ModelSource],
    records: list[dict],
    max_new_tokens: int,
    prompt_template: str = "auto",
    special_tokens: str | None = None,
) -> dict[str, str]:
    """Returns the template of each model's prompts, in words, before any model is loaded.

    Prints a line for each model that is prompted differently than it was trained.

    Raises:
        UserError: a prompt does not fit into the context of every model.
    """
    asked: dict[str, str] = {}
    for source in sources:
        name = source.path
        encode = PromptEncoder(source.tokenizer(), prompt_template, special_tokens)
        encode_prompts(source.config(), encode, records, max_new_tokens)
        asked[name] = ", ".join(
            dict.fromkeys(IN_WORDS[template] for template in encode.names.values())
        )
        for otherwise in dict.fromkeys(encode.otherwise.values()):
            if otherwise:
                say(f"{name}: {otherwise}")
    return asked


def read_prompts(
    prompts: str | None,
    instruction: str | None,
    input: str | None,
    columns: Mapping[str, str] | None = None,
) -> list[dict[str, str]]:
    """Reads records from a data file, a text file (an instruction per line) or the command line.

    The records need no ``output``. They keep AlpacaEval's ``dataset`` if they have it.
    """
    if (prompts is None) == (instruction is None):
        raise UserError("give the prompts: --prompts FILE, --instruction TEXT, or --interactive")
    if prompts is None:
        return [
            parse_record(
                {"instruction": str(instruction), "input": input},
                "--instruction",
                needs_output=False,
            )
        ]
    if input is not None:
        raise UserError(
            "--input belongs to --instruction; with --prompts the file holds the inputs"
        )
    file = Path(str(prompts)).expanduser()
    if not os.path.isfile(file):
        raise UserError(f"--prompts {str(prompts) or 'without a name'}: no such file")
    if file.suffix.lower() in PICKLES:
        raise UserError(
            f"--prompts {file}: pickles are never opened; give text, an instruction a line, or "
            f"{', '.join(DATA_SUFFIXES)}"
        )
    records, size = [], 0
    for record in _records(file, columns):
        records.append(record)
        size += sum(map(len, map(str, record.values())))
        if size > RECORD_LIMIT.mib << 20:
            raise too_large(f"--prompts {file}: all of it")
    if not records:
        raise UserError(f"--prompts {file}: there is no prompt in it")
    return records


def _records(file: Path, columns: Mapping[str, str] | None) -> Iterator[dict[str, str]]:
    if kind_of_file(file) not in DATA_SUFFIXES:
        for line in filter(str.strip, _lines(file)):
            yield {"instruction": line.strip(), "input": "", "output": ""}
        return
    for where, record in read_file(file):
        asked = parse_record(record, where, columns, needs_output=False)
        # the model continues running text
        asked = {"prompt": asked["text"], "completion": ""} if "text" in asked else asked
        if isinstance(record, dict) and isinstance(record.get("dataset"), str):
            asked["dataset"] = record["dataset"]
        yield asked


def _lines(file: Path) -> Iterator[str]:
    with readable(file), open_text(file) as stream:
        yield from lines_of(stream, file)
