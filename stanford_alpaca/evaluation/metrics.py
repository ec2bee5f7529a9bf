"""Measures checkpoints.

    python -m stanford_alpaca.evaluation.metrics CHECKPOINT [...] --data FILE [--out FOLDER]

Prints the measures with intervals in one column per checkpoint, the differences between the
checkpoints, and samples side by side.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stanford_alpaca.checkpoint.bounded import read_json
from stanford_alpaca.checkpoint.files import check_new, new_file
from stanford_alpaca.console import say, show
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.blocks import make_blocks
from stanford_alpaca.data.chat import stop_ids
from stanford_alpaca.data.formats import take_columns
from stanford_alpaca.data.records import form_of
from stanford_alpaca.data.report import DataReport
from stanford_alpaca.data.templates import IN_WORDS, follow
from stanford_alpaca.data.tokenize import ExampleEncoder, PromptEncoder, encode_records
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.comparison import (
    Margins,
    Measures,
    compare,
    tell_unknown,
    with_intervals,
)
from stanford_alpaca.evaluation.intervals import Items, Replicates
from stanford_alpaca.evaluation.measures.forced import Forced, teacher_forced
from stanford_alpaca.evaluation.measures.oracle import distances, oracle_perplexity
from stanford_alpaca.evaluation.measures.temperature import (
    REFITTED,
    TEMPERATURES,
    curve_of,
    matched,
    measured_half,
)
from stanford_alpaca.evaluation.response_measures import (
    REFERENCES,
    Responses,
    compared,
    measure_responses,
)
from stanford_alpaca.evaluation.settings import Settings, read_records
from stanford_alpaca.evaluation.tables import format_differences, format_results, short_names
from stanford_alpaca.flags import (
    check_whole,
    command,
    exit_on_user_error,
    from_command_line,
    part_of,
    words,
)
from stanford_alpaca.generation.prompts import encode_prompts
from stanford_alpaca.generation.responses import decode_response, generate_ids, load_for_generation
from stanford_alpaca.generation.writers import format_sample, sample_of, write_jsonl
from stanford_alpaca.objective.head import head_of, original_weight


class Evaluation(NamedTuple):
    """The content of the two files that the command writes."""

    metrics: dict[str, Any]  # metrics.json: data, records, settings, results, differences
    samples: list[dict[str, Any]]  # samples.jsonl: one per record and decoding


class Bench(NamedTuple):
    """What all checkpoints of an evaluation are measured with."""

    settings: Settings
    records: Dataset
    cost: CostEmbedding
    oracle: PreTrainedModel | None
    target: Forced | None  # the sums of the model of --match_entropy

    @property
    def asked(self) -> Dataset:
        """The records that are answered: with --match_entropy half of them, as is measured."""
        if self.target is None or form_of(self.records.column_names) == "text":
            return self.records
        return self.records.select(measured_half(len(self.records)))


class Answers(NamedTuple):
    """What was measured of one checkpoint."""

    measures: Measures
    responses: Responses  # none of running text
    prompts: str | None
    temperature: float
    curve: dict[str, list[float]]  # see ``curve_of``


def evaluate(names: list[str], records: Dataset, settings: Settings) -> Evaluation:
    """Measures checkpoints, the base model first, on the records that ``read_records`` returned.

    The checkpoints are loaded one after the other.
    """
    bench = make_bench(names[0], records, settings)
    each = {name: measure_checkpoint(name, bench) for name in names}
    found = {name: one.measures for name, one in each.items()}
    responses = {name: one.responses for name, one in each.items() if one.responses}
    for name, measures in measure_responses(bench.asked, responses, settings).items():
        found.setdefault(name, {}).update(measures)
    for name in names:
        found[name] |= training_figures(name)
    margins = Margins.parse(settings.margin)
    tell_unknown(margins, found)
    floors = {
        measure: 1 - float(value.values.min())
        for measure, value in found.get(REFERENCES, {}).items()
        if measure.startswith("mauve") and isinstance(value, Replicates)
    }
    metrics = {
        "data": settings.data,
        "records": len(bench.asked),
        "prompts": {name: one.prompts for name, one in each.items() if one.prompts},
        "settings": {name: value for name, value in asdict(settings).items() if name != "data"},
        "temperatures": {name: one.temperature for name, one in each.items()},
        "refitted": [*REFITTED] if bench.target is not None else [],
        "curves": {name: one.curve for name, one in each.items()},
        "results": with_intervals(found),
        "differences": compare({name: found[name] for name in names}, margins, floors),
    }
    return Evaluation(metrics, make_samples(bench.asked, responses, settings))


def make_bench(first: str, records: Dataset, settings: Settings) -> Bench:
    """Loads what all checkpoints are measured with. The first one prices tokens by default."""
    cost, oracle, target = cost_of(settings, first), None, None
    if settings.oracle is not None:
        oracle, _ = load_for_generation(settings.source(settings.oracle))
    if (name := settings.match_entropy) is not None:
        model, tokenizer = load_for_generation(settings.source(name))
        check_logits(name, model, cost)
        examples = make_examples(name, records, tokenizer, settings)
        if len(examples) < 2:
            raise UserError(f"--match_entropy {name}: {len(examples)} example has no two halves")
        target = teacher_forced(model, tokenizer, examples, cost, settings.batch_size)
    return Bench(settings, records, cost, oracle, target)


def cost_of(settings: Settings, first: str) -> CostEmbedding:
    """Returns the cost of the settings; by default that of the first checkpoint.

    Raises:
        UserError: --cost is no embedding.
    """
    kind = (settings.cost_kind, settings.cost_seed)
    if settings.cost_kind == "identity":
        return CostEmbedding(None, *kind)
    if settings.cost is not None and not settings.cost_is_model:
        try:
            return CostEmbedding.from_file(settings.cost, *kind)
        except Exception as error:  # no such file, not safetensors, or no embedding
            raise UserError(
                f"--cost {settings.cost}: no embedding in a safetensors file ({error})"
            ) from None
    base, _ = load_for_generation(settings.source(settings.cost or first))
    return CostEmbedding(original_weight(base), *kind)


def check_logits(
    name: str, model: PreTrainedModel, cost: CostEmbedding, oracle: PreTrainedModel | None = None
) -> None:
    """Raises UserError unless the model has a logit for each token of the cost and the oracle."""
    try:
        logits = len(head_of(model).weight)
        cost.check(logits)
        if oracle is not None and logits != (theirs := len(head_of(oracle).weight)):
            raise ValueError(
                f"has {logits} logits, the oracle {theirs}: distributions of one length are "
                "compared"
            )
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def measure_checkpoint(name: str, bench: Bench) -> Answers:
    """Returns what teacher forcing, the oracle and decoding say of one checkpoint."""
    settings, cost, oracle = bench.settings, bench.cost, bench.oracle
    model, tokenizer = load_for_generation(settings.source(name))
    check_logits(name, model, cost, oracle)
    examples = make_examples(name, bench.records, tokenizer, settings)
    forced = teacher_forced(
        model,
        tokenizer,
        examples,
        cost,
        settings.batch_size,
        settings.temperature,
        TEMPERATURES,
    )
    measures: Measures = {**forced.measures()}
    curve = curve_of(forced)
    if bench.target is not None:
        refitted = match(name, forced, bench)
        temperature = refitted["temperature"].value
        settings = replace(settings, temperature=temperature, match_entropy=None)
        examples = examples.select(measured_half(len(examples)))
        curve = curve_of(forced, measured_half(len(forced.tokens)))
        again = teacher_forced(
            model, tokenizer, examples, cost, settings.batch_size, settings.temperature
        )
        measures = {**again.measures(), **refitted}
    if oracle is not None:
        measures |= distances(
            model,
            oracle,
            examples,
            cost,
            batch_size=settings.batch_size,
            temperature=settings.temperature,
        )
    form = form_of(bench.records.column_names)
    if form == "text":  # running text has no prompts
        return Answers(measures, {}, None, settings.temperature, curve)
    prompts = IN_WORDS[follow(tokenizer, form, settings.template, settings.special_tokens).template]
    responses, more = respond(model, tokenizer, bench.asked, settings, oracle)
    return Answers(measures | more, responses, prompts, settings.temperature, curve)


def match(name: str, forced: Forced, bench: Bench) -> dict[str, Items]:
    """Returns the measures at the entropy of --match_entropy. Raises UserError if it cannot be."""
    other, target = bench.settings.match_entropy, bench.target
    assert target is not None
    if not np.array_equal(target.tokens, forced.tokens):
        raise UserError(
            f"{name} cuts the data into other tokens than --match_entropy {other}: "
            "entropies of one vocabulary are compared"
        )
    try:
        return matched(forced, target)
    except ValueError as error:
        raise UserError(f"{name}: --match_entropy {other}: {error}") from None


def make_examples(
    name: str, records: Dataset, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> Dataset:
    """Returns an example per record. Running text becomes blocks.

    Records without a target are kept, so that all models are compared on the same records.
    """
    form = form_of(records.column_names)
    if form == "text":
        return make_blocks(records, tokenizer, settings.max_length)[0]
    encode = ExampleEncoder.as_trained(
        tokenizer, form, settings.max_length, settings.template, settings.special_tokens
    )
    examples = encode_records(records, encode)
    report = DataReport.of(examples)
    if report.kept == 0:
        raise UserError(
            f"no reference has a token to measure: {report}; raise --max_length or mend the data"
        )
    if report.dropped or report.truncated:
        say(f"{name}: {report}")
    return examples


def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Dataset,
    settings: Settings,
    oracle: PreTrainedModel | None = None,
) -> tuple[Responses, Measures]:
    """Returns the model's responses for every way of decoding and seed.

    It also returns how the oracle, if there is one, measures them.
    """
    encode, stops = (
        PromptEncoder(tokenizer, settings.template, settings.special_tokens),
        stop_ids(tokenizer),
    )
    prompts = encode_prompts(model.config, encode, list(records), settings.max_new_tokens)
    responses: Responses = {}
    measures: Measures = {}
    for decoding, ways in settings.decodings().items():
        drawn = [
            generate_ids(
                model, tokenizer, prompts, sampling, batch_size=settings.batch_size, seed=seed
            )
            for sampling, seed in ways
        ]
        responses[decoding] = [
            [decode_response(tokenizer, ids, stops) for ids in answers] for answers in drawn
        ]
        if oracle is not None:
            options = {"pad_token_id": tokenizer.pad_token_id, "batch_size": settings.batch_size}
            found = [oracle_perplexity(oracle, prompts, answers, **options) for answers in drawn]
            # an item is a record, summed over its seeds
            summed = Items(np.sum([items.sums for items in found], axis=0), found[0].of)
            measures[settings.named("oracle_perplexity", decoding)] = summed
    return responses, measures


def make_samples(
    records: Dataset, responses: dict[str, Responses], settings: Settings
) -> list[dict[str, Any]]:
    """Returns a sample per record and decoding. Several seeds give a list of responses."""
    samples = []
    for i, record in enumerate(records if responses else []):
        for decoding, ways in settings.decodings().items():
            texts = {
                name: [answers[i] for answers in of[decoding]] for name, of in responses.items()
            }
            sample = sample_of(
                record, {name: of if len(ways) > 1 else of[0] for name, of in texts.items()}
            )
            samples.append(
                sample
                | {"reference": compared(sample["reference"], settings), "decoding": decoding}
            )
    return samples


def training_figures(checkpoint: str) -> dict[str, float]:
    """Returns the training's supervised tokens/s and peak memory, if the folder has them."""
    file = Path(checkpoint) / "train_results.json"
    try:
        figures = read_json(file)
    except (OSError, ValueError):
        return {}
    names = {
        "train_supervised_tokens_per_s": "supervised tokens/s",
        "train_peak_memory_mib": "peak memory, MiB",
    }
    return {shown: figures[name] for name, shown in names.items() if name in figures}


@dataclass(frozen=True)
class Options(Settings):
    """Evaluates checkpoints and shows samples.

    python -m stanford_alpaca.evaluation.metrics CHECKPOINT [...] --data FILE --FLAG VALUE ...

    Args:
        checkpoints: folders or hub names, the base model first.
        data: what training takes, with reference outputs. Running text gets the teacher-forced
            measures, in blocks of max_length tokens.
        documents: what begins a document of running text, as in training. By default a text file is
            one document.
        prefix_words: cuts each document of running text after this many words. What follows is the
            reference.
        continuation_words: how many words of references and responses are compared. By default all;
            with prefix_words half of max_new_tokens, which most responses reach.
        out: a folder for metrics.json and samples.jsonl. Neither may exist.
        samples: how many samples to print.
        limit: takes only the first records.
        detokenize: turns running text of word tokens, as WikiText's, into plain text. Sentences
            with <unk> are left out.
        equal_words: cuts the reference and all models' responses of a record to the words of the
            shortest of them.
        cost: the model whose output embedding defines the cost in emo, the same for all
            checkpoints, or a safetensors file. By default the first checkpoint.
        cost_kind: cosine, identity, shuffled or centred, as in training. A kind that no checkpoint
            was trained with tells meaning from what training looked at.
        cost_seed: of the kind shuffled.
        temperature: divides the logits, in teacher forcing and in sampling; 1 by default.
        match_entropy: a model. Each checkpoint gets the temperature at which its mean entropy on
            one half of the examples is that of this model, and is measured on the other half.
        decoding: greedy, sample (at --temperature, nothing cut off) or beam. Several are separated
            by commas.
        seeds: the seeds of sampling, separated by commas.
        num_beams: the number of beams of beam search.
        mauve: a causal LM or an encoder whose features MAUVE compares. Needs mauve-text. MAUVE
            between two halves of the references stands in their column: its noise floor.
        mauve_scale: MAUVE's scaling constant, 5 by default.
        energy: a causal LM or an encoder. The energy distance of its features, and the p-value of
            a permutation test, compare responses and references.
        margin: how large a difference has to be to matter: NAME=NUMBER for a measure, PERCENT% of
            the value for all others, with commas. Each difference is then seen, seen below the
            margin, not seen, or inconclusive.
        oracle: the model that the data were drawn from, with the same vocabulary. Measures
            distances to its distributions. Needs POT.
        prompt_template, special_tokens: as in training. By default each model is prompted as it was
            trained.
        columns: as in training.
        trust_remote_code: runs the code that comes with a checkpoint's folder or repository.
        verify: reads a large checkpoint again to compare it with its manifest. A checkpoint below
            2 GiB is always read.
    """

    checkpoints: tuple[str, ...] = words()
    out: str | None = None
    samples: int = 12
    verify: bool = False


def measure(options: Options) -> None:
    """Evaluates, writes the two files, and prints samples and tables."""
    columns, names = take_columns(
        str(options.columns) if options.columns else None, list(options.checkpoints)
    )
    names = list(dict.fromkeys(names))
    if not names or not options.data:
        raise UserError("give one or more checkpoints and --data FILE")
    check_whole("samples", options.samples, 0)
    if options.cost is not None and options.cost_kind == "identity":
        raise UserError(
            f"--cost {options.cost} would not be used: --cost_kind identity needs no embedding"
        )
    if options.cost_seed and options.cost_kind != "shuffled":
        raise UserError(f"--cost_seed {options.cost_seed} belongs to --cost_kind shuffled")
    settings = replace(part_of(options, Settings), columns=columns)
    files = (
        []
        if options.out is None
        else [Path(options.out) / name for name in ("metrics.json", "samples.jsonl")]
    )
    for file in files:
        check_new("out", str(file))
    records = read_records(names, settings, options.verify)
    metrics, shown = evaluate(names, records, settings)
    if files:
        with new_file(files[0]) as part:  # appears last: if metrics.json is there, both files are
            part.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
            write_jsonl(files[1], shown)
    for sample in shown[: options.samples]:
        show(format_sample(sample))
    show(
        f"{metrics['records']} {'examples' if shown else 'document(s)'} of {settings.data}, "
        "values with 95 % intervals"
    )
    for name, asked in metrics["prompts"].items():
        show(f"prompts of {name}: {asked}")
    show(format_results(metrics["results"]))
    for line in about_temperatures(metrics):
        show(line)
    if metrics["differences"]:
        show(f"\n{format_differences(metrics['differences'])}")


def about_temperatures(metrics: dict[str, Any]) -> list[str]:
    """Returns what a reader should know of temperatures, if any is not 1."""
    if metrics.get("refitted"):
        (other,) = short_names([metrics["settings"]["match_entropy"]])
        names = ", ".join(metrics["refitted"]).replace("_", " ")
        return [
            f"temperatures have the entropy of {other} on the other half of the examples; "
            f"intervals of {names} include the fit, all others are conditional on the temperature"
        ]
    found = set(metrics["temperatures"].values())
    return [f"temperature {t:g}, in teacher forcing and in sampling" for t in found if t != 1]


run = command(Options, measure)


def main() -> None:
    """Runs the command."""
    exit_on_user_error(lambda: from_command_line(run))


if __name__ == "__main__":
    main()
