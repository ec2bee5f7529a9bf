"""What decides an evaluation besides the checkpoints.

These are the flags, which are checked here, and the records that they select.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from datasets import Dataset

from stanford_alpaca.console import say
from stanford_alpaca.cost import COST_KINDS, is_embedding_file
from stanford_alpaca.data.documents import DOCUMENTS
from stanford_alpaca.data.formats import check_columns, load_records
from stanford_alpaca.data.records import FORMS, form_of
from stanford_alpaca.data.templates import check_template
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.comparison import Margins
from stanford_alpaca.evaluation.measures.mauve import SCALE, check_mauve, check_texts
from stanford_alpaca.evaluation.measures.oracle import check_oracle
from stanford_alpaca.evaluation.measures.texts import first_words
from stanford_alpaca.flags import MOST_SEED, check_choice, check_number, check_packages, check_whole
from stanford_alpaca.generation.prompts import check_prompts
from stanford_alpaca.generation.sampling import MOST_BEAMS, Sampling
from stanford_alpaca.models.check import check_model
from stanford_alpaca.models.load import ModelSource

DECODINGS = ("greedy", "sample", "beam")


@dataclass(frozen=True)
class Settings:
    """The flags of the commands that evaluate.

    Raises:
        UserError: a value is invalid.
    """

    data: str = ""
    # our names -> the names in the data; the text that was typed until it is parsed
    columns: Mapping[str, str] | str = field(default_factory=dict)
    limit: int | None = None
    documents: str = "auto"  # what begins a document of running text, as in training
    # running text: each document is cut after this many words, and continued
    prefix_words: int | None = None
    continuation_words: int | None = None  # see ``compared_words``
    detokenize: bool = False  # word tokens of running text become plain text, see ``detokenize``
    equal_words: bool = False  # texts of a record are cut to the words of the shortest one
    # the model whose output embedding defines the cost in emo, or a safetensors file; None: the
    # first checkpoint
    cost: str | None = None
    cost_kind: str = "cosine"  # one of ``COST_KINDS``
    cost_seed: int = 0  # of the kind shuffled
    temperature: float = 1.0  # divides the logits of teacher forcing and of sampling
    match_entropy: str | None = None  # the model whose entropy each gets, see ``temperature``
    max_length: int = 512  # tokens of prompt and reference
    max_new_tokens: int = 64
    prompt_template: str = "auto"  # auto: what each model was trained with
    special_tokens: str | None = None  # None: what each model was trained with
    batch_size: int = 32
    decoding: str = "greedy"  # names of ``DECODINGS``, separated by commas
    seeds: str = "0"  # of sampling, separated by commas
    num_beams: int = 4
    mauve: str | None = None  # the model whose features are compared
    mauve_scale: float = SCALE  # MAUVE's scaling constant
    energy: str | None = None  # the model whose features' energy distance is measured
    margin: str | None = None  # how large a difference has to be to matter, see ``Margins``
    oracle: str | None = None  # the model that the data were drawn from
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("prefix_words", 1), ("continuation_words", 1)):
            check_whole(name, least if getattr(self, name) is None else getattr(self, name), least)
        for name, least in (("batch_size", 1), ("max_length", 2)):
            check_whole(name, getattr(self, name), least)
        check_whole("num_beams", self.num_beams, 2, MOST_BEAMS)
        check_template(self.prompt_template, self.special_tokens or "text")
        check_choice("documents", self.documents, DOCUMENTS)
        check_choice("cost_kind", self.cost_kind, COST_KINDS)
        check_whole("cost_seed", self.cost_seed, 0, MOST_SEED)
        check_number("temperature", self.temperature, 1e-3)
        check_number("mauve_scale", self.mauve_scale, 1e-3)
        if self.match_entropy is not None and self.temperature != 1:
            raise UserError("--temperature and --match_entropy exclude each other: drop one")
        if self.mauve_scale != SCALE and self.mauve is None:
            raise UserError(f"--mauve_scale {self.mauve_scale} needs --mauve MODEL")
        self.decodings()
        Margins.parse(self.margin)

    @property
    def cost_is_model(self) -> bool:
        """Whether --cost names a model."""
        return self.cost is not None and not is_embedding_file(self.cost)

    @property
    def featurisers(self) -> list[str]:
        """The models whose features of texts are compared, each once."""
        return list(dict.fromkeys(name for name in (self.mauve, self.energy) if name is not None))

    def source(self, name: str) -> ModelSource:
        """Returns the source of a model of the evaluation."""
        return ModelSource(name, remote_code=self.trust_remote_code)

    @property
    def template(self) -> str:
        """The prompt template. By default the beginnings of documents get none."""
        return (
            "plain"
            if self.prefix_words is not None and self.prompt_template == "auto"
            else self.prompt_template
        )

    @property
    def compared_words(self) -> int | None:
        """How many words of responses and references are compared; None for all.

        The continuation of running text has no end. By default half of max_new_tokens words of it
        are compared, which most responses reach.
        """
        if self.continuation_words is None and self.prefix_words is not None:
            return max(1, self.max_new_tokens // 2)
        return self.continuation_words

    def decodings(self) -> dict[str, list[tuple[Sampling, int]]]:
        """Returns the requested ways of decoding.

        Each has, for every response, the settings by which it is chosen and the seed.
        """
        names = [name.strip() for name in self.decoding.split(",")]
        for name in names:
            if name not in DECODINGS:
                raise UserError(
                    f"--decoding {self.decoding}: choose from {', '.join(DECODINGS)}, with commas"
                )
        numbers = [
            int(seed) if re.fullmatch(r" *[0-9]{1,9} *", seed) else None
            for seed in self.seeds.split(",")
        ]
        if None in numbers or len(set(numbers)) < len(numbers):
            raise UserError(
                f"--seeds {self.seeds}: give different whole numbers from 0 on, with commas"
            )
        if self.seeds != "0" and "sample" not in names:
            raise UserError(
                f"--seeds {self.seeds} belongs to sampling: add --decoding greedy,sample"
            )
        plain = Sampling(max_new_tokens=self.max_new_tokens)
        # nothing is cut off, as in the EMO paper
        unbiased = Sampling(max_new_tokens=self.max_new_tokens, temperature=self.temperature)
        search = Sampling(max_new_tokens=self.max_new_tokens, num_beams=self.num_beams)
        ways = {
            "greedy": [(plain, 0)],
            "sample": [(unbiased, seed) for seed in numbers if seed is not None],
            "beam": [(search, 0)],
        }
        return {name: ways[name] for name in names}

    def named(self, measure: str, decoding: str) -> str:
        """Returns the name of a measure of responses.

        With several ways of decoding it includes the way.
        """
        return f"{measure} ({decoding})" if len(self.decodings()) > 1 else measure


def read_records(names: list[str], settings: Settings, verify: bool = False) -> Dataset:
    """Returns the records to evaluate on.

    Everything that could be wrong with them, the checkpoints and the settings is checked first.

    Raises:
        UserError: no model, no such data, or a prompt that does not fit into a model's context.
    """
    check_packages("measuring responses", "rouge_score", "sacrebleu")
    priced = settings.cost if settings.cost_is_model else None
    for name in dict.fromkeys([*names, priced or names[0], settings.match_entropy or names[0]]):
        check_model(settings.source(name), or_adapter=True, verify=verify)
    models = [settings.source(name) for name in names]
    columns = settings.columns
    assert not isinstance(columns, str)  # the command has parsed them
    check_columns([settings.data], columns)
    records = load_records(
        settings.data,
        columns=columns,
        documents=settings.documents,
        detokenize=settings.detokenize,
    )
    if settings.limit is not None:
        records = records.select(range(min(settings.limit, len(records))))
    is_text = form_of(records.column_names) == "text"
    if settings.detokenize and not is_text:
        raise UserError(f"--detokenize mends running text, and {settings.data} is none: drop it")
    if settings.prefix_words is not None:
        if not is_text:
            raise UserError(
                f"--prefix_words cuts running text, and {settings.data} has prompts of its own: "
                "leave it out"
            )
        records = continuations(records, settings.prefix_words)
    elif is_text and (settings.decoding != "greedy" or settings.featurisers):
        raise UserError(
            "running text asks nothing: "
            "give --prefix_words N to have each document continued after N words"
        )
    if settings.oracle is not None:
        check_oracle(settings.source(settings.oracle), models)
    measured = len(records) if settings.match_entropy is None else len(records) // 2
    if settings.mauve is not None:
        check_mauve(measured)
    elif settings.energy is not None:
        check_texts("energy", measured)
    for featuriser in settings.featurisers:
        check_model(settings.source(featuriser))
    if form_of(records.column_names) != "text":
        check_prompts(
            models,
            list(records),
            settings.max_new_tokens,
            settings.template,
            settings.special_tokens,
        )
    return records


def continuations(documents: Dataset, words: int) -> Dataset:
    """Turns documents into prompts (their first words) and completions (what follows).

    A completion begins with the white space after the prompt. Documents with no further word are
    left out, and their number is printed.

    Raises:
        UserError: no document is left.
    """
    rows = []
    for text in documents["text"]:
        prompt = first_words(text, words)
        if text[len(prompt) :].strip():
            rows.append({"prompt": prompt, "completion": text[len(prompt) :], "more": ""})
    if not rows:
        raise UserError(f"--prefix_words {words}: no document has a word after so many; give fewer")
    if len(rows) < len(documents):
        say(
            f"{len(documents) - len(rows)} of {len(documents)} documents have no word after "
            f"the first {words}: left out"
        )
    return Dataset.from_list(rows, features=FORMS["completion"])
