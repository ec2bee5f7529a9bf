"""Downloads a published instruction set: ``python -m stanford_alpaca.data.fetch alpaca``."""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from stanford_alpaca.checkpoint.files import check_new, new_file
from stanford_alpaca.console import show
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.errors import UserError, nearest
from stanford_alpaca.flags import command, exit_on_user_error, from_command_line, word


class Source(NamedTuple):
    """A data set on the hub, and the license that its publishers give it."""

    hub_name: str
    file: str
    about: str
    license: str


SOURCES = {
    "alpaca": Source(
        "tatsu-lab/alpaca",
        "data/alpaca_data.json",
        "Stanford Alpaca's 52K instructions, answered by text-davinci-003",
        "CC BY-NC 4.0 (research only, no commercial use)",
    ),
    "alpaca-gpt4": Source(
        "vicgalle/alpaca-gpt4",
        "data/alpaca_gpt4_data.json",
        "the same instructions, answered by GPT-4 (GPT-4-LLM)",
        "CC BY-NC 4.0 (research only, no commercial use)",
    ),
}


@dataclass(frozen=True)
class Options:
    """Downloads a published instruction set: python -m stanford_alpaca.data.fetch NAME [--out FILE]

    Args:
        name: the data set: alpaca (tatsu-lab/alpaca on the Hugging Face hub) or alpaca-gpt4
            (vicgalle/alpaca-gpt4).
        out: the .json file to write, which must not exist yet. The default is
            data/alpaca_data.json or data/alpaca_gpt4_data.json.
    """

    name: str | None = word()
    out: str | None = None


def fetch(options: Options) -> None:
    """Downloads a data set, writes it to a file, and prints its source and its license."""
    if str(options.name) not in SOURCES:
        got = "no data set named" if options.name is None else f"unknown data set {options.name}"
        raise UserError(
            f"{got}{nearest(str(options.name), list(SOURCES))}; choose from {', '.join(SOURCES)}"
        )
    source = SOURCES[str(options.name)]
    file = Path(source.file if options.out is None else str(options.out))
    if file.suffix != ".json":
        raise UserError(f"--out {file}: give the name of a .json file that does not exist yet")
    check_new("out", str(file))
    records = (
        load_records(source.hub_name).select_columns(["instruction", "input", "output"]).to_list()
    )
    digest = write_json(file, records)
    show(f"source:  https://huggingface.co/datasets/{source.hub_name}, {source.about}")
    show(f"license: {source.license}")
    show(f"file:    {file}, {len(records):,} records, sha256 {digest}")
    show(f"next:    DATA_PATH={file} bash train_emo.sh MODEL_PATH")


run = command(Options, fetch)


def write_json(file: Path, records: list[dict[str, str]]) -> str:
    """Writes a JSON list atomically and returns the file's sha256.

    Makes the folder if it is missing.
    """
    content = (json.dumps(records, ensure_ascii=False, indent=4) + "\n").encode()
    with new_file(file) as part:
        part.write_bytes(content)
    return sha256(content).hexdigest()


def main() -> None:
    """Runs the command."""
    exit_on_user_error(lambda: from_command_line(run))


if __name__ == "__main__":
    main()
