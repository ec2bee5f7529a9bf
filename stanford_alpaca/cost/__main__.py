"""Makes a cost embedding, or looks into one.

python -m stanford_alpaca.cost build --text FILE --tokenizer MODEL --out cost.safetensors
python -m stanford_alpaca.cost describe MODEL
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import fire

from stanford_alpaca.checkpoint.files import check_new, new_file
from stanford_alpaca.console import show
from stanford_alpaca.cost import description
from stanford_alpaca.cost.build import (
    describe,
    first_words,
    from_head,
    from_text,
    neighbours,
    save,
)
from stanford_alpaca.cost.cooccurrence import SMOOTHING, TextSettings
from stanford_alpaca.cost.embedding import CostEmbedding
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import (
    MOST_SEED,
    check_packages,
    check_whole,
    command,
    exit_on_user_error,
    part_of,
    word,
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

    To look into the costs of a model:

    python -m stanford_alpaca.cost describe MODEL [--tokens " Monday, three"]

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
    out = check_new("out", options.out)
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
        out,
        source=name,
        method=method,
        tokenizer=str(options.tokenizer or head),
    )
    show(f"{options.out} from {name}: {report}.")
    show(describe(rows, order, own))


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


@dataclass(frozen=True)
class Looked:
    """Describes the costs that a model's output embedding gives: a table, neighbours, a plot.

    python -m stanford_alpaca.cost describe MODEL [--tokens " Monday, three"] [--plot FILE]

    The table has a column for each kind of cost (cosine, centred, shuffled). Its rows are the costs
    of pairs of tokens, drawn uniformly and by frequency; the share of their variance that single
    tokens and their frequencies explain; mean costs between frequent tokens (the first 1 % of the
    vocabulary), rare ones (the last 90 %) and those between; and the cosine of EMO's gradient with
    that under the identity cost. A token's frequency is its mean probability in texts.

    Args:
        model: a folder or a hub name.
        tokens: words of one token each, separated by commas, whose nearest tokens are shown. Most
            begin with a space. By default frequent words.
        text: a file, as for build, whose beginnings give contexts. By default the model writes
            them.
        contexts: how many texts, of at most 64 tokens; 16 by default.
        seed: of what the model writes, and of the kind shuffled.
        plot: a picture to write, as FILE.png. It must not exist. Needs matplotlib.
        trust_remote_code: runs the code that comes with the model's folder or repository.
        verify: reads a large model again, to compare it with its manifest. A model below 2 GiB is
            always read.
    """

    model: str | None = word()
    tokens: str | None = None
    text: str | None = None
    contexts: int = 16
    seed: int = 0
    plot: str | None = None
    trust_remote_code: bool = False
    verify: bool = False


def describe_costs(options: Looked) -> None:
    """Prints the table and the neighbours, and draws the plot."""
    if options.model is None:
        raise UserError("give a model: python -m stanford_alpaca.cost describe MODEL")
    check_whole("contexts", options.contexts, 1)
    check_whole("seed", options.seed, 0, MOST_SEED)
    text = None if options.text is None else Path(options.text).expanduser()
    if text is not None and not text.is_file():
        raise UserError(f"--text {text}: no such file")
    plot = None
    if options.plot is not None:
        check_packages("--plot", "matplotlib")
        plot = check_new("plot", options.plot)
    source = ModelSource(options.model, remote_code=options.trust_remote_code)
    check_model(source, verify=options.verify)
    tokenizer = source.tokenizer(may_grow=False)
    asked = None if options.tokens is None else description.tokens_of(options.tokens, tokenizer)
    model = source.load().eval()
    if model.get_output_embeddings() is None:
        raise UserError(f"{options.model}: this model has no output embedding")
    rows = description.texts_of(model, tokenizer, text, options.contexts, options.seed)
    found, frequency = description.describe(model, rows, seed=options.seed)
    show(description.table(found))
    order = frequency.argsort(descending=True).tolist()
    for kind in ("cosine", "centred"):
        cost = CostEmbedding(model.get_output_embeddings().weight, kind)
        show(f"{kind}:")
        for line in neighbours(cost, asked or first_words(order, tokenizer), tokenizer):
            show(line)
    if plot is not None:
        with new_file(plot) as part:
            description.plot(found, part)


look = command(Looked, describe_costs)


def main() -> None:
    """Runs the command."""
    exit_on_user_error(_run)


def _run() -> None:
    if sys.argv[1:2] == ["--help"]:
        sys.argv[1:] = ["build", "--help"]
    if sys.argv[1:2] not in (["build"], ["describe"]):
        raise UserError(
            "give a command: python -m stanford_alpaca.cost build --help, or describe --help"
        )
    fire.Fire({"build": build, "describe": look})


if __name__ == "__main__":
    main()
