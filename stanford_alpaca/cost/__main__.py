"""Makes a cost embedding.

python -m stanford_alpaca.cost build --text FILE --tokenizer MODEL --out cost.safetensors
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import fire

from stanford_alpaca.cost.build import describe, from_head, from_text, save
from stanford_alpaca.cost.cooccurrence import SMOOTHING, TextSettings
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import (
    check_whole,
    check_writable,
    command,
    exit_on_user_error,
    part_of,
    words,
)
from stanford_alpaca.models.check import check_model
from stanford_alpaca.models.load import ModelSource


@dataclass(frozen=True)
class Options(TextSettings):
    """Makes a cost embedding for --cost of training, from text or from another model.

    With --head, the rows are those of the other model's output embedding.

    python -m stanford_alpaca.cost build --text FILE [FILE ...] --tokenizer MODEL --out OUT
    python -m stanford_alpaca.cost build --head MODEL [--tokenizer MODEL] --out OUT

    Args:
        text: files to count tokens in. Files named .json, .jsonl, .csv, .tsv or .parquet hold
            records, such as Alpaca's or a field "text"; other files are plain text.
        head: the other model, a folder or a hub name.
        tokenizer: the model that will be trained, or a folder with its tokenizer. With --head, the
            default is the head's own tokenizer.
        out: the safetensors file to write. It must not exist.
        width: numbers per row, 128 by default.
        window: tokens to each side that count as near, 5 by default.
        min_count: tokens seen less often get a row of zeros, as unseen tokens do; 1 by default.
        shift: its logarithm is subtracted from the mutual information; 1 by default.
        vocab_size: the number of logits, if it is more than the tokenizer's length (a padded head).
        verify: reads a large head's model again, to compare it with its manifest. A model below
            2 GiB is always read.
    """

    files: tuple[str, ...] = words()
    text: str | None = None
    head: str | None = None
    tokenizer: str | None = None
    out: str | None = None
    vocab_size: int | None = None
    verify: bool = False


def build_cost(options: Options) -> None:
    """Makes the rows, writes them, and prints a description of them."""
    settings, head, vocab_size = part_of(options, TextSettings), options.head, options.vocab_size
    check_options(options, settings)
    if options.out is None or options.out == "True" or Path(options.out).exists():
        raise UserError(f"--out {options.out}: give the name of a file that does not exist yet")
    check_writable("out", Path(options.out))
    check_whole("vocab_size", 1 if vocab_size is None else vocab_size, 1)
    texts = (
        []
        if options.text is None
        else [Path(file).expanduser() for file in (options.text, *options.files)]
    )
    for file in texts:
        if not file.is_file():
            raise UserError(f"--text {file}: no such file")
    if head is not None:
        check_model(ModelSource(head), verify=options.verify)
    target = None if options.tokenizer is None else ModelSource(options.tokenizer).tokenizer()
    source = target if head is None else ModelSource(head).tokenizer()
    own = target or source
    assert own is not None and source is not None  # one of them was asked for
    size = vocab_size or len(own)
    if size < len(own):
        raise UserError(
            f"--vocab_size {size}: the tokenizer has {len(own)} tokens; give that or more"
        )
    if head is None and settings.width >= size:
        raise UserError(
            f"--width {settings.width}: give less than the {size} tokens of the vocabulary"
        )

    if head is None:
        rows, order, report = from_text(texts, own, size, settings)
        method = f"SVD of positive PMI, {settings}, smoothing {SMOOTHING}"
    else:
        rows, order, report = from_head(head, source, target, vocab_size)
        method = "output embedding"
    name = head or " ".join(map(str, texts))
    save(
        rows,
        Path(options.out),
        source=name,
        method=method,
        tokenizer=str(options.tokenizer or head),
    )
    print(f"{options.out} from {name}: {report}.")
    print(describe(rows, order, own))


build = command(Options, build_cost)


def check_options(options: Options, settings: TextSettings) -> None:
    """Raises UserError unless there is one source with the flags it needs.

    A flag that the source would not use is an error, too.
    """
    if (options.text is None) == (options.head is None):
        raise UserError("give one source: --text FILE [FILE ...] or --head MODEL")
    if options.head is not None and (options.files or settings != TextSettings()):
        raise UserError(
            "--width, --window, --min_count, --shift and files belong to --text: "
            "drop them or --head"
        )
    if options.text is not None and options.tokenizer is None:
        raise UserError(
            "--text needs --tokenizer: the model that will be trained, "
            "or a folder with its tokenizer"
        )


def main() -> None:
    """Runs the command."""
    exit_on_user_error(_run)


def _run() -> None:
    if sys.argv[1:2] == ["--help"]:
        sys.argv[1:] = ["build", "--help"]
    if sys.argv[1:2] != ["build"]:
        raise UserError("give a command: python -m stanford_alpaca.cost build --help")
    fire.Fire({"build": build})


if __name__ == "__main__":
    main()
