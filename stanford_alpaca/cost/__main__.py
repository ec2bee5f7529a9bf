"""Makes a cost embedding: ``python -m stanford_alpaca.cost build --text FILE --tokenizer MODEL --out cost.safetensors``."""

import sys
from pathlib import Path
from typing import Any

import fire
from fire.decorators import SetParseFns

from stanford_alpaca.cost.build import describe, from_head, from_text, save
from stanford_alpaca.cost.cooccurrence import SMOOTHING, TextSettings
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import check_whole, check_writable, exit_on_user_error, refuse_unknown
from stanford_alpaca.models.check import check_model
from stanford_alpaca.models.load import load_tokenizer


@SetParseFns(text=str, head=str, tokenizer=str, out=str)  # fire would read "a, b" as a tuple
def build(
    *files: str,
    text: str | None = None,
    head: str | None = None,
    tokenizer: str | None = None,
    out: str | None = None,
    width: int = 128,
    window: int = 5,
    min_count: int = 1,
    shift: int = 1,
    vocab_size: int | None = None,
    verify: bool = False,
    **unknown: Any,
) -> None:
    """A cost embedding for --cost of training: from text, or from another model's output embedding.

    python -m stanford_alpaca.cost build --text FILE [FILE ...] --tokenizer MODEL --out cost.safetensors
    python -m stanford_alpaca.cost build --head MODEL [--tokenizer MODEL] --out cost.safetensors

    Args:
        text: files to count tokens in: .json and .jsonl with Alpaca records or a field "text", other files as plain text.
        head: a folder or a hub name; the rows of its output embedding are taken.
        tokenizer: the model that will be trained, or a folder with its tokenizer; with --head, the head's own by default.
        out: the safetensors file to write; it must not exist.
        width: numbers per row, 128 by default; window: tokens to each side that count as near, 5.
        min_count: tokens seen less often get a row of zeros, as unseen ones do; shift: log of it is taken off, 1.
        vocab_size: the number of logits, if it is more than the tokenizer's length (a padded head).
        verify: reads a large head's model again, to compare it with its manifest; one below 2 GiB is always read.
    """
    refuse_unknown(unknown, build)
    settings = TextSettings(width, window, min_count, shift)
    check_sources(text, files, head, tokenizer, settings)
    if out is None or out == "True" or Path(out).exists():
        raise UserError(f"--out {out}: give the name of a file that does not exist yet")
    check_writable("out", Path(out))
    check_whole("vocab_size", 1 if vocab_size is None else vocab_size, 1)
    texts = [] if text is None else [Path(str(file)).expanduser() for file in (text, *files)]
    for file in texts:
        if not file.is_file():
            raise UserError(f"--text {file}: no such file")
    if head is not None:
        check_model(head, verify=verify)
    target = None if tokenizer is None else load_tokenizer(tokenizer)
    source = target if head is None else load_tokenizer(head)
    own = target or source
    assert own is not None and source is not None  # one of them was asked for
    if vocab_size is not None and vocab_size < len(own):
        raise UserError(f"--vocab_size {vocab_size}: the tokenizer has {len(own)} tokens; give that or more")

    if head is None:
        if width >= (vocab_size or len(own)):
            raise UserError(f"--width {width}: give less than the {vocab_size or len(own)} tokens of the vocabulary")
        rows, order, report = from_text(texts, own, vocab_size or len(own), settings)
        method = f"SVD of positive PMI, {settings}, smoothing {SMOOTHING}"
    else:
        rows, order, report = from_head(head, source, target, vocab_size)
        method = "output embedding"
    save(rows, Path(out), source=head or " ".join(map(str, texts)), method=method, tokenizer=str(tokenizer or head))
    print(f"{out} from {head or ' '.join(map(str, texts))}: {report}.")
    print(describe(rows, order, own))


def check_sources(
    text: str | None, files: tuple[str, ...], head: str | None, tokenizer: str | None, settings: TextSettings
) -> None:
    """Raises UserError unless there is one source, with what it needs and nothing that it would not use."""
    if (text is None) == (head is None):
        raise UserError("give one source: --text FILE [FILE ...] or --head MODEL")
    if head is not None and (files or settings != TextSettings()):
        raise UserError("--width, --window, --min_count, --shift and files belong to --text: drop them or --head")
    if text is not None and tokenizer is None:
        raise UserError("--text needs --tokenizer: the model that will be trained, or a folder with its tokenizer")


def main() -> None:
    """The command."""
    exit_on_user_error(_run)


def _run() -> None:
    if sys.argv[1:2] not in (["build"], ["--help"]):
        raise UserError("give a command: python -m stanford_alpaca.cost build --help")
    fire.Fire({"build": build})


if __name__ == "__main__":
    main()
