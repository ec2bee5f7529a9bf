"""Shows runs on one page: ``python -m stanford_alpaca.evaluation.report RUN [...] --out FILE``.

The page shows their curves, their measures with intervals, and their responses side by side. For
every reference token it shows what each model predicted in its place and at what cost. The page is
one file that loads nothing else.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from stanford_alpaca import __version__
from stanford_alpaca.checkpoint.bounded import read_json, read_text
from stanford_alpaca.checkpoint.files import write_new
from stanford_alpaca.console import say
from stanford_alpaca.data.formats import parse_columns
from stanford_alpaca.data.prompts import as_shown
from stanford_alpaca.data.records import form_of
from stanford_alpaca.data.tokenize import ExampleEncoder
from stanford_alpaca.errors import UserError, first_line
from stanford_alpaca.evaluation.metrics import (
    Evaluation,
    about_temperatures,
    cost_of,
    evaluate,
)
from stanford_alpaca.evaluation.page import render
from stanford_alpaca.evaluation.page.curves import curves_of, recorded_flags, shown_flags
from stanford_alpaca.evaluation.page.transport import view_of
from stanford_alpaca.evaluation.page.verdicts import table_of
from stanford_alpaca.evaluation.response_measures import REFERENCES
from stanford_alpaca.evaluation.settings import Settings, read_records
from stanford_alpaca.evaluation.tables import short_names
from stanford_alpaca.flags import check_whole, command, exit_on_user_error, from_command_line, words
from stanford_alpaca.generation.responses import load_for_generation
from stanford_alpaca.generation.writers import check_outputs
from stanford_alpaca.models.check import check_model
from stanford_alpaca.models.load import ADAPTER_CONFIG, ModelSource


@dataclass(frozen=True)
class Options:
    """Writes a page about runs: python -m stanford_alpaca.evaluation.report RUN [...] --out FILE

    Args:
        runs: folders that training wrote, or base models. The first one's output embedding defines
            the cost in emo for all.
        out: the page, a file that does not exist yet.
        data: held-out records with references. By default those of the evaluation, or of the runs'
            own --eval_path. Without any, the page shows only the curves.
        evaluation: a folder that ``metrics --out`` wrote about these models. Nothing is generated
            again.
        transport_records: the number of records whose tokens the transport view shows. 0 leaves it
            out.
        limit: evaluates on the first records only.
        trust_remote_code: runs the code that comes with a checkpoint's folder or repository.
        verify: reads a large checkpoint again to compare it with its manifest. A checkpoint below
            2 GiB is always read.
    """

    runs: tuple[str, ...] = words()
    out: str | None = None
    data: str | None = None
    evaluation: str | None = None
    transport_records: int = 24
    limit: int | None = None
    trust_remote_code: bool = False
    verify: bool = False


def write_report(options: Options) -> None:
    """Reads or measures the runs, and writes the page."""
    if not options.runs or options.out is None:
        raise UserError("give one or more runs and --out FILE")
    file = check_outputs({"out": options.out})["out"]
    page = render(collect(options))
    write_new(file, page)
    say(f"report: {file.absolute()}")


def collect(options: Options) -> dict[str, Any]:
    """Reads or measures the runs, and returns all that the page shows."""
    names = list(dict.fromkeys(options.runs))
    check_whole("transport_records", options.transport_records, 0)
    check_whole("limit", 1 if options.limit is None else options.limit, 1)
    if options.evaluation is not None and options.limit is not None:
        raise UserError("--limit is about an evaluation yet to be made: drop it, or --evaluation")
    curves = {name: curves_of(name) for name in names}
    for name in names:
        if curves[name] is None:  # a base model
            source = ModelSource(name, remote_code=options.trust_remote_code)
            check_model(source, or_adapter=True, verify=options.verify)
    models = [name for name in names if curves[name] is None or has_model(name)]
    found = (
        None
        if options.evaluation is None
        else read_evaluation(Path(options.evaluation).expanduser(), models)
    )
    view, held_out = (
        None,
        options.data or (held_out_of(models) if found is None else found.metrics["data"]),
    )
    if held_out is None:
        say(
            "the page has the curves alone: train with --eval_path, or give --data FILE "
            "(held-out records) to emo report, to have the models measured and looked into"
        )
    elif models and (found is None or options.transport_records):
        settings = (
            settings_of_runs(held_out, models, options.limit)
            if found is None
            else settings_of(found)
        )
        settings = replace(settings, data=held_out, trust_remote_code=options.trust_remote_code)
        records = read_records(models, settings, options.verify)
        found = found or evaluate(models, records, settings)
        if options.transport_records:
            shown = records.select(range(min(options.transport_records, len(records))))
            view = transport(names, models, shown, settings)
    return page_data(names, curves, models, found, view)


run = command(Options, write_report)


def has_model(name: str) -> bool:
    """Returns whether there is a model to load.

    A run that has not ended has only checkpoints. What is no folder is taken for a hub name.
    """
    folder = Path(name).expanduser()
    return not folder.is_dir() or any(
        (folder / config).is_file() for config in ("config.json", ADAPTER_CONFIG)
    )


def held_out_of(runs: list[str]) -> str | None:
    """Returns the one source that the runs were evaluated on during training, if there was any.

    Raises:
        UserError: there were several.
    """
    paths = {str(path) for name in runs for path in recorded_flags(name).get("eval_path") or []}
    if len(paths) > 1:
        raise UserError(
            f"the runs had several --eval_path ({', '.join(sorted(paths))}): "
            "give --data FILE, to compare them on"
        )
    return paths.pop() if paths else None


def settings_of_runs(data: str, runs: list[str], limit: int | None) -> Settings:
    """Returns settings that measure the runs as they were trained.

    Their tokenizers say which prompts they were trained with.

    Raises:
        UserError: the runs were trained with different lengths or columns.
    """
    trained = [flags for name in runs if (flags := recorded_flags(name))]
    chosen: dict[str, Any] = {}
    for flag, default in {"model_max_length": 512, "columns": None}.items():
        values = [run.get(flag, default) for run in trained]
        if any(value != values[0] for value in values):
            raise UserError(
                f"the runs were trained with different --{flag} ({', '.join(map(str, values))}): "
                "measure them with stanford_alpaca.evaluation.metrics --out FOLDER, "
                "and give --evaluation FOLDER"
            )
        chosen[flag] = values[0] if values else default
    columns = parse_columns(chosen["columns"] or [])
    return Settings(data, columns, limit, max_length=chosen["model_max_length"])


def settings_of(evaluation: Evaluation) -> Settings:
    """Returns the settings of an evaluation, with its cost model by name.

    What needs further models is left out, because this command does not compute it again.
    """
    measured = evaluation.metrics
    cost = measured["settings"]["cost"] or next(iter(measured["results"]))
    without = dict.fromkeys(("mauve", "oracle", "energy", "match_entropy"))
    changed = {"cost": cost, "mauve_scale": Settings.mauve_scale, **without}
    return Settings(measured["data"], **measured["settings"] | changed)


def read_evaluation(folder: Path, models: list[str]) -> Evaluation:
    """Reads what the metrics command wrote, and gives the models the names that they have here.

    Raises:
        UserError: the files cannot be read, or are not about these models.
    """
    try:
        measured = read_json(folder / "metrics.json")
        # not splitlines: a text may hold other line ends
        lines = read_text(folder / "samples.jsonl").split("\n")
        samples = [json.loads(line) for line in lines if line]
        known = {Path(name).expanduser().resolve(): name for name in measured["results"]}
        theirs = {known.get(Path(name).expanduser().resolve(), name): name for name in models}
        for name in theirs:
            if name not in measured["results"]:
                raise UserError(
                    f"{folder} is not about {name}, only {', '.join(measured['results'])}: "
                    "evaluate them together"
                )
        for table in ("results", "prompts", "curves", "temperatures"):  # older files lack some
            measured[table] = {
                theirs.get(name, name): found for name, found in measured.get(table, {}).items()
            }
        for difference in measured["differences"]:
            difference |= {
                key: theirs.get(difference[key], difference[key]) for key in ("model", "minus")
            }
        for sample in samples:
            sample["responses"] = {
                theirs.get(name, name): text for name, text in sample["responses"].items()
            }
        found = Evaluation(measured, samples)
        settings_of(found)
        table_of(measured, models)
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"--evaluation {folder}: not what this version's metrics --out writes ({reason}); "
            "evaluate again"
        ) from None
    return found


def transport(
    names: list[str], models: list[str], records: Dataset, settings: Settings
) -> dict[str, Any]:
    """Returns the transport view of every run that has a model.

    The costs are those of the evaluation, by default those of the first model.
    """
    cost = cost_of(settings, models[0])
    form = form_of(records.column_names)
    views: dict[str, dict] = {}
    for name in models:
        model, tokenizer = load_for_generation(settings.source(name))
        encode = ExampleEncoder.as_trained(
            tokenizer, form, settings.max_length, settings.template, settings.special_tokens
        )
        views[name] = view_of(name, model, tokenizer, records, cost, encode)
        del model
    # running text has no questions
    questions = [{"instruction": "", "input": "", "reference": ""}] * len(records)
    if form != "text":
        questions = [as_shown(record) for record in records]
    return {"records": questions, "runs": [views.get(name) for name in names]}


def trained_on(run: str, data: str) -> bool:
    """Returns whether a run's flags name this file, folder or hub name as training data."""
    paths = recorded_flags(run).get("data_path") or []
    return Path(data).resolve() in [Path(str(path)).resolve() for path in paths]


def page_data(
    names: list[str],
    curves: dict[str, dict | None],
    models: list[str],
    evaluation: Evaluation | None,
    view: dict[str, Any] | None,
) -> dict[str, Any]:
    """Returns all that the page shows. Runs are identified by their index."""
    short = dict(zip(names, short_names(names), strict=True))
    prompts = {} if evaluation is None else evaluation.metrics["prompts"]
    runs = [
        {
            "name": short[name],
            "path": name,
            "flags": flags | ({"prompts": prompts[name]} if name in prompts else {}),
            "curves": curves[name],
            "model": name in models,
        }
        for name, flags in zip(
            names, shown_flags([recorded_flags(name) for name in names]), strict=True
        )
    ]
    data: dict[str, Any] = {
        "version": __version__,
        "runs": runs,
        "evaluation": None,
        "samples": None,
        "transport": view,
    }
    if evaluation is not None:
        measured, samples = evaluation
        data["evaluation"] = {
            "data": measured["data"],
            "records": measured["records"],
            "trained_on": any(trained_on(name, measured["data"]) for name in names),
            **table_of(measured, names, REFERENCES),
            "curves": [measured["curves"].get(name) for name in names],
            "temperatures": [measured["temperatures"].get(name) for name in names],
            "notes": about_temperatures(measured),
        }
        data["samples"] = [
            {
                key: sample.get(key) or ""
                for key in ("instruction", "input", "reference", "decoding")
            }
            | {"responses": [sample["responses"].get(name) for name in names]}
            for sample in samples
        ]
    return data


def main() -> None:
    """Runs the command."""
    exit_on_user_error(lambda: from_command_line(run))


if __name__ == "__main__":
    main()
