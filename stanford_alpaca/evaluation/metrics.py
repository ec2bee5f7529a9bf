"""Measures checkpoints.

    python -m stanford_alpaca.evaluation.metrics CHECKPOINT [...] --data FILE [--out FOLDER]

Prints the measures with intervals in one column per checkpoint, the differences between the
checkpoints, and samples side by side.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import fire
import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stanford_alpaca.checkpoint.manifest import write_whole
from stanford_alpaca.console import say
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.blocks import make_blocks
from stanford_alpaca.data.chat import stop_ids
from stanford_alpaca.data.formats import take_columns
from stanford_alpaca.data.prompts import as_shown
from stanford_alpaca.data.records import form_of
from stanford_alpaca.data.report import DataReport
from stanford_alpaca.data.templates import IN_WORDS, follow
from stanford_alpaca.data.tokenize import ExampleEncoder, PromptEncoder, encode_records
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.comparison import Measures, compare, with_intervals
from stanford_alpaca.evaluation.intervals import Items, Replicates
from stanford_alpaca.evaluation.measures.forced import teacher_forced
from stanford_alpaca.evaluation.measures.mauve import load_featuriser, mauve
from stanford_alpaca.evaluation.measures.oracle import distances, oracle_perplexity
from stanford_alpaca.evaluation.measures.texts import against_references, by_themselves, first_words
from stanford_alpaca.evaluation.settings import Settings, read_records
from stanford_alpaca.evaluation.tables import format_differences, format_results
from stanford_alpaca.flags import (
    check_whole,
    check_writable,
    command,
    exit_on_user_error,
    part_of,
    words,
)
from stanford_alpaca.generation.prompts import encode_prompts
from stanford_alpaca.generation.responses import decode_response, generate_ids, load_for_generation
from stanford_alpaca.generation.writers import format_sample, sample_of, write_jsonl
from stanford_alpaca.objective.head import head_of, original_weight

REFERENCES = "(references)"  # the column for the references measured by themselves
Responses = dict[str, list[list[str]]]  # of a model: decoding -> [seeds][records]


class Evaluation(NamedTuple):
    """The content of the two files that the command writes."""

    metrics: dict[str, Any]  # metrics.json: data, records, settings, results, differences
    samples: list[dict[str, Any]]  # samples.jsonl: one per record and decoding


def evaluate(names: list[str], records: Dataset, settings: Settings) -> Evaluation:
    """Measures checkpoints, the base model first, on the records that ``read_records`` returned.

    The checkpoints are loaded one after the other.
    """
    base, _ = load_for_generation(settings.source(settings.cost or names[0]))
    cost = CostEmbedding(original_weight(base))
    del base
    oracle = (
        None
        if settings.oracle is None
        else load_for_generation(settings.source(settings.oracle))[0]
    )
    found: dict[str, Measures] = {}
    responses: dict[str, Responses] = {}
    prompts: dict[str, str] = {}
    form = form_of(records.column_names)
    for name in names:
        model, tokenizer = load_for_generation(settings.source(name))
        try:
            logits = len(head_of(model).weight)
            cost.check(logits)
            if oracle is not None and logits != (theirs := len(head_of(oracle).weight)):
                raise ValueError(
                    f"has {logits} logits, the oracle {theirs}: "
                    "distributions of one length are compared"
                )
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
        examples = make_examples(name, records, tokenizer, settings)
        found[name] = {
            **teacher_forced(model, tokenizer, examples, cost, settings.batch_size).measures()
        }
        if oracle is not None:
            options = {"pad_token_id": tokenizer.pad_token_id, "batch_size": settings.batch_size}
            found[name] |= distances(model, oracle, examples, cost, **options)
        if form != "text":  # running text has no prompts
            prompts[name] = IN_WORDS[
                follow(tokenizer, form, settings.template, settings.special_tokens).template
            ]
            responses[name], measures = respond(model, tokenizer, records, settings, oracle)
            found[name] |= measures
        del model
    for name, measures in measure_responses(records, responses, settings).items():
        found.setdefault(name, {}).update(measures)
    for name in names:
        found[name] |= training_figures(name)
    metrics = {
        "data": settings.data,
        "records": len(records),
        "prompts": prompts,
        "settings": {name: value for name, value in asdict(settings).items() if name != "data"},
        "results": with_intervals(found),
        "differences": compare({name: found[name] for name in names}),
    }
    return Evaluation(metrics, make_samples(records, responses, settings))


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


def measure_responses(
    records: Dataset, responses: dict[str, Responses], settings: Settings
) -> dict[str, Measures]:
    """Returns the measures of every model's responses, and of the references by themselves.

    With several ways of decoding, the name of a measure includes the way.
    """
    if not responses:
        return {}
    references = [compared(as_shown(record)["reference"], settings) for record in records]
    found: dict[str, Measures] = {name: {} for name in (*responses, REFERENCES)}
    if settings.mauve is not None:
        featurize = load_featuriser(settings.source(settings.mauve))
        wanted = featurize(_with_prompts(references, records))
    for decoding, ways in settings.decodings().items():
        for name, of in responses.items():
            texts = [[compared(answer, settings) for answer in answers] for answers in of[decoding]]
            measures = {**against_references(texts, references), **by_themselves(texts)}
            if settings.compared_words is not None:
                del measures["exact_match"]  # it depends on where a text is cut
            if settings.mauve is not None:
                features = [featurize(_with_prompts(answers, records)) for answers in texts]
                values = [
                    mauve(wanted, given, seed)
                    for given, (_, seed) in zip(features, ways, strict=True)
                ]
                measures["mauve"] = Replicates(np.array(values))
            found[name] |= {
                settings.named(measure, decoding): value for measure, value in measures.items()
            }
        found[REFERENCES] |= {
            settings.named(name, decoding): value
            for name, value in by_themselves([references]).items()
        }
    return found


def compared(text: str, settings: Settings) -> str:
    """Returns the part of a response or a reference that is compared."""
    words = settings.compared_words
    return text if words is None else first_words(text, words)


def _with_prompts(texts: list[str], records: Dataset) -> list[str]:
    """Returns the texts whose features MAUVE compares.

    Continuations are compared together with their prompts, answers to instructions alone.
    """
    if form_of(records.column_names) != "completion":
        return texts
    return [
        f"{prompt} {text.strip()}" for prompt, text in zip(records["prompt"], texts, strict=True)
    ]


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
    figures = json.loads(file.read_text()) if file.is_file() else {}
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
        cost: the model whose output embedding defines the cost in emo, the same for all
            checkpoints. By default the first checkpoint.
        decoding: greedy, sample (temperature 1, nothing cut off) or beam. Several are separated by
            commas.
        seeds: the seeds of sampling, separated by commas.
        num_beams: the number of beams of beam search.
        mauve: a causal LM or an encoder whose features MAUVE compares. Needs mauve-text.
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
    settings = replace(part_of(options, Settings), columns=columns)
    files = (
        []
        if options.out is None
        else [Path(options.out) / name for name in ("metrics.json", "samples.jsonl")]
    )
    for file in files:
        if file.exists():
            raise UserError(f"{file} exists: give another --out or remove it")
        check_writable("out", file)
    records = read_records(names, settings, options.verify)
    metrics, shown = evaluate(names, records, settings)
    if files:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(files[1], shown)
        # written last: if metrics.json is there, both files are
        write_whole(files[0], json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    for sample in shown[: options.samples]:
        print(format_sample(sample))
    print(
        f"{len(records)} {'examples' if shown else 'document(s)'} of {settings.data}, "
        "values with 95 % intervals"
    )
    for name, asked in metrics["prompts"].items():
        print(f"prompts of {name}: {asked}")
    print(format_results(metrics["results"]))
    if metrics["differences"]:
        print(f"\n{format_differences(metrics['differences'])}")


run = command(Options, measure)


def main() -> None:
    """Runs the command."""
    exit_on_user_error(lambda: fire.Fire(run))


if __name__ == "__main__":
    main()
