"""Few-shot in-context learning on classification tasks.

    python icl.py --model_path MODEL [--model_path OTHER]

Each class of a test item is written after a few examples, and the class with the likeliest text is
the prediction. Prints the accuracies, in one column per model, and whether the models differ.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stanford_alpaca import __version__
from stanford_alpaca.checkpoint.files import check_new, write_new
from stanford_alpaca.console import say, show
from stanford_alpaca.data.reading import exists
from stanford_alpaca.errors import UserError, nearest
from stanford_alpaca.evaluation.fewshot.accuracy import (
    accuracies,
    accuracy_table,
    compare_accuracy,
    comparison_table,
    right_by_task,
)
from stanford_alpaca.evaluation.fewshot.predict import (
    SCORES,
    Examples,
    FewShotSettings,
    choose_examples,
    predict,
)
from stanford_alpaca.evaluation.fewshot.retrieval import (
    ENCODER,
    RETRIEVERS,
    SIMILAR,
    Featurize,
    bm25,
    load_encoder,
    means_of,
    tfidf,
)
from stanford_alpaca.evaluation.fewshot.tasks import TaskData, choose_tasks, load_task, read_tasks
from stanford_alpaca.evaluation.tables import short_names
from stanford_alpaca.flags import (
    check_packages,
    check_whole,
    command,
    exit_on_user_error,
    from_command_line,
    word,
)
from stanford_alpaca.generation.responses import load_for_generation
from stanford_alpaca.generation.writers import append_jsonl
from stanford_alpaca.models.check import check_model
from stanford_alpaca.models.load import ModelSource

BETWEEN = "\n"  # separates the models in one --model_path
Rows = dict[str, list[dict[str, Any]]]  # the predictions of every model


@dataclass(frozen=True)
class Options:
    """Evaluates models by few-shot in-context learning: python icl.py --model_path MODEL [...] ...

    Args:
        model_path: a folder, an adapter's folder, or a hub name. Give the flag again for more
            models. Each is compared with the first.
        tasks: names of tasks, separated by commas: tweet_eval, trec, sst2, subj, cr, rt, ag_news.
            By default all, or those that data_dir has.
        data_dir: a folder with TASK_train.jsonl and TASK_test.jsonl. A record has text and label
            (the number of the class). By default the data come from the hub.
        templates: a folder with YAML files for tasks of your own, like those in
            stanford_alpaca/evaluation/fewshot/templates.
        limit: takes only the first records of each test set.
        shots: examples before the question, 8 by default.
        retriever: how examples are chosen. By similarity, with the nearest last: sentence
            (embeddings, the default), tfidf (used if there is no encoder), bm25, or model (the
            evaluated model's own hidden states). Otherwise: random (drawn for each item) or fixed
            (one set for all).
        encoder: what sentence-transformers loads for sentence, all-mpnet-base-v2 by default.
        pool: looks for similar examples among this many training records, which each seed draws. By
            default among all.
        seeds: the seeds of what is drawn, 0,1,2 by default. Accuracies are means over the seeds,
            with the standard deviation.
        score: likelihood of what differs between the classes, given all before it, or perplexity of
            the whole prompt.
        batch_size: test items at a time. By default as many as have 768 tokens together on a CPU,
            4,096 on a GPU.
        out: a folder for predictions.jsonl and results.json. Neither may exist.
        trust_remote_code: runs the code that comes with a checkpoint's folder or repository.
        verify: reads a large checkpoint again to compare it with its manifest. A checkpoint below
            2 GiB is always read.
    """

    model_path: str | None = word()
    tasks: str | None = None
    data_dir: str | None = None
    templates: str | None = None
    limit: int | None = None
    shots: int = 8
    retriever: str | None = None
    encoder: str | None = None
    pool: int | None = None
    seeds: str = "0,1,2"
    score: str = "likelihood"
    batch_size: int | None = None
    out: str | None = None
    trust_remote_code: bool = False
    verify: bool = False


def evaluate_few_shot(options: Options) -> None:
    """Predicts every test item with every model, writes the predictions, and prints the tables."""
    models = _models(options.model_path)
    settings = _settings(options)
    if options.encoder is not None and settings.retriever != "sentence":
        unused = f"--encoder {options.encoder} would not be used: --retriever {settings.retriever}"
        raise UserError(f"{unused}; drop one of them")
    files = _check_files(options.out)
    folder = None if options.data_dir is None else Path(options.data_dir).expanduser()
    known = read_tasks(None if options.templates is None else Path(options.templates).expanduser())
    chosen = choose_tasks(options.tasks, known, folder)
    sources = [ModelSource(name, remote_code=options.trust_remote_code) for name in models]
    for source in sources:
        check_model(source, or_adapter=True, verify=options.verify)
    sets = [load_task(task, folder, options.limit) for task in chosen]
    for data in sets:
        _check_sizes(data, settings)
    if settings.seeds == [None]:
        more = " (--pool N draws some to choose from)" * (options.shots > 0)
        say(f"the examples are the same for every seed, so there is one run{more}")
    named = options.retriever is not None or options.encoder is not None
    settings, featurize = _load_retriever(settings, named, options.encoder or ENCODER)

    lines = files[1] if files else None
    rows = _predict_all(sources, sets, settings, featurize, lines)
    right = {name: right_by_task(found) for name, found in rows.items()}
    columns = {name: accuracies(values) for name, values in right.items()}
    compared = {name: compare_accuracy(right[models[0]], right[name]) for name in models[1:]}
    if files:
        about = settings._asdict() | (
            {"encoder": options.encoder or ENCODER} if settings.retriever == "sentence" else {}
        )
        results = {
            "settings": about
            | {"data": options.data_dir or "hub", "limit": options.limit, "version": __version__},
            "tasks": {data.task.name: data.described() for data in sets},
            "accuracy": columns,
            f"against {models[0]}": compared,
        }
        write_new(files[0], json.dumps(results, indent=1) + "\n")
    short = dict(zip(models, short_names(models), strict=True))
    show(
        f"\n{_heading(sets, settings)}\n"
        f"{accuracy_table({short[name]: column for name, column in columns.items()})}"
    )
    for name, found in compared.items():
        show(f"\n{comparison_table(short[models[0]], short[name], found)}")


run = command(Options, evaluate_few_shot)


def _models(model_path: str | None) -> list[str]:
    """Returns the models of --model_path, as ``join_models`` joined them.

    A value that is no existing path may hold several models, separated by commas.
    """
    given = str(model_path or "").split(BETWEEN)
    names = [name for path in given for name in ([path] if exists(Path(path)) else path.split(","))]
    if not all(names):
        raise UserError("give a model: --model_path MODEL, a folder or a hub name")
    if len({*names}) < len(names):
        raise UserError(
            f"--model_path {', '.join(names)}: one of them stands there twice; give each once"
        )
    return names


def _settings(options: Options) -> FewShotSettings:
    """Returns the settings of these flags. Raises UserError for an invalid value."""
    shots, pool, seeds, score = options.shots, options.pool, options.seeds, options.score
    retriever = options.retriever or SIMILAR[0]
    check_whole("shots", shots, 0)
    for name in ("pool", "batch_size", "limit"):
        check_whole(name, 1 if getattr(options, name) is None else getattr(options, name), 1)
    for flag, value, known in (("retriever", retriever, RETRIEVERS), ("score", score, SCORES)):
        if value not in known:
            raise UserError(
                f"--{flag} {value}: there is none of this name{nearest(value, list(known))}; "
                f"choose from {', '.join(known)}"
            )
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", seeds.replace(" ", "").strip("()[]")):
        raise UserError(f"--seeds {seeds}: give whole numbers from 0 on, with commas, as 0,1,2")
    numbers = [int(number) for number in re.findall(r"\d+", seeds)]
    if len({*numbers}) < len(numbers):
        raise UserError(f"--seeds {seeds}: one of them stands there twice; give each once")
    if pool is not None and retriever not in SIMILAR:
        raise UserError(
            f"--pool {pool}: {retriever} draws from all training records; drop it, or choose from "
            f"{', '.join(SIMILAR)}"
        )
    if retriever in ("tfidf", "bm25"):
        check_packages(f"--retriever {retriever}", "sklearn")
    same = shots == 0 or (retriever in SIMILAR and pool is None)
    return FewShotSettings(
        shots, retriever, pool, [None] if same else list(numbers), score, options.batch_size
    )


def _check_files(out: str | None) -> list[Path]:
    """Returns the paths of results.json and predictions.jsonl in the folder.

    Raises:
        UserError: one of them exists already, or cannot be written.
    """
    files = (
        [Path(out) / name for name in ("results.json", "predictions.jsonl")]
        if out is not None
        else []
    )
    for file in files:
        check_new("out", str(file))
    return files


def _check_sizes(data: TaskData, settings: FewShotSettings) -> None:
    size = len(data.train.texts)
    for flag, value, most in (
        ("pool", settings.pool, size),
        ("shots", settings.shots, settings.pool or size),
    ):
        if value is not None and value > most:
            raise UserError(
                f"--{flag} {value}: task {data.task.name} has {most} to choose from; "
                f"give {most} or fewer"
            )


def _load_retriever(
    settings: FewShotSettings, asked_for: bool, encoder: str
) -> tuple[FewShotSettings, Featurize | None]:
    """Returns the settings, and the function that compares texts.

    The function is None if nothing is compared or if the models compare. If no encoder was asked
    for and the default one cannot be loaded, TF-IDF takes its place.
    """
    if settings.retriever != "sentence" or not settings.shots:
        return settings, {"tfidf": tfidf, "bm25": bm25}.get(settings.retriever)
    try:
        return settings, load_encoder(encoder)
    except UserError as error:
        if asked_for:
            raise
        say(f"examples are chosen by TF-IDF: {error}")
        return settings._replace(retriever="tfidf"), tfidf


def _predict_all(
    sources: list[ModelSource],
    sets: list[TaskData],
    settings: FewShotSettings,
    featurize: Featurize | None,
    file: Path | None,
) -> Rows:
    """Returns the predictions of all models, which are loaded one after the other.

    The predictions of a task are written to the file as soon as they are made.
    """
    shared: dict[str, Examples] = {}
    if settings.retriever != "model":
        shared = {data.task.name: choose_examples(data, settings, featurize) for data in sets}
    rows: Rows = {source.path: [] for source in sources}
    for source in sources:
        name = source.path
        # a new token would take probability from the others
        model, tokenizer = load_for_generation(source, may_grow=False)
        own = means_of(model, tokenizer)
        for data in sets:
            examples = shared.get(data.task.name) or choose_examples(data, settings, own)
            found = predict(model, tokenizer, data, examples, settings)
            rows[name] += found
            if file is not None:
                append_jsonl(file, [{"model": name} | row for row in found])
        del model, own
    return rows


def _heading(sets: list[TaskData], settings: FewShotSettings) -> str:
    """Returns the line above the table, which says how the accuracies came about."""
    chosen = {
        "random": "drawn for each item",
        "fixed": "drawn once",
        "tfidf": "by TF-IDF",
        "bm25": "by BM25",
        "sentence": "by sentence embeddings",
        "model": "by the model's hidden states",
    }[settings.retriever]
    pool = f" among {settings.pool} drawn records" if settings.pool is not None else ""
    several = ", mean ± standard deviation" if len(settings.seeds) > 1 else ""
    seeds = (
        ""
        if settings.seeds == [None]
        else f"; seeds {', '.join(map(str, settings.seeds))}{several}"
    )
    sizes = ", ".join(f"{data.task.name} {len(data.test.texts):,}" for data in sets)
    examples = f"{settings.shots} examples {chosen}{pool}" if settings.shots else "no examples"
    return f"accuracy in %, {examples}, scored by {settings.score}{seeds}; test items: {sizes}"


def join_models(words: list[str]) -> list[str]:
    """Joins the --model_path flags of a command line into one: fire would take only the last."""
    models, others, rest = [], [], iter(words)
    for given in rest:
        flag, equals, value = given.partition("=")
        if flag.replace("-", "_") == "__model_path":
            models.append(value if equals else next(rest, ""))
        else:
            others.append(given)
    return [*others, f"--model_path={BETWEEN.join(models)}"] if models else others


def main() -> None:
    """Runs the command."""
    exit_on_user_error(
        lambda: from_command_line(run, join_models(sys.argv[1:])),
        interrupted="stopped; with --out, predictions.jsonl has the tasks that were done",
    )


if __name__ == "__main__":
    main()
