"""Compares losses on one model and one data set: ``emo compare --loss mle,emo,FILE.py:NAME``.

Every loss is trained on the same batches. Its learning rate is chosen among the same rates, on a
part of the training data, by the least nll there. Then each is trained from several seeds, and all
are measured on the held-out data. One page shows the result.
"""

import json
import os
import shlex
import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from stanford_alpaca.bench.tables import Run, differences_of, means_of, rates_of
from stanford_alpaca.bench.trials import Pool, Trial, best_rates, run_module, tried
from stanford_alpaca.checkpoint.bounded import read_json
from stanford_alpaca.checkpoint.manifest import file_sha256, write_whole
from stanford_alpaca.console import align, say, show
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.sources import identify
from stanford_alpaca.errors import UserError, first_line
from stanford_alpaca.evaluation import report
from stanford_alpaca.evaluation.page import render
from stanford_alpaca.evaluation.settings import Settings, read_records
from stanford_alpaca.flags import (
    RECORD_LIMIT,
    check_number,
    check_packages,
    check_whole,
    check_writable,
    command,
    exit_on_user_error,
    from_command_line,
)
from stanford_alpaca.losses.objectives import MODES
from stanford_alpaca.losses.own import read_loss
from stanford_alpaca.models.check import check_model
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.run.config_file import with_config
from stanford_alpaca.run.legacy_flags import split_flags
from stanford_alpaca.run.parse import parse
from stanford_alpaca.run.where import Devices, Where, where_to_run

MEASURES = ("nll", "emo", "perplexity", "token_accuracy", "exact_match", "rouge_l", "ece")
LEAST, MOST = 1e-6, 0.5  # of --development
OURS = {  # flags that the comparison itself sets
    "mode", "loss", "learning_rate", "seed", "output_dir", "data_path", "eval_path",
    "eval_fraction", "resume", "resume_from_checkpoint", "model_name_or_path", "engine",
    "fsdp", "deepspeed", "report_to", "save_only_model",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Compares losses on one model: emo compare --loss mle,emo,FILE.py:NAME --model M --data D ...

    Args:
        loss: modes, and losses of your own as FILE.py:NAME, with commas. Differences are from the
            first.
        model: the base model, a folder or a hub name.
        data: what is trained on. A part of it is the development set.
        eval_path: held-out records, on which the trained models are measured.
        out: a folder for everything; the same command goes on in it.
        rates: learning rates, with commas. Every loss is tried at each.
        seeds: whole numbers, with commas. Rates are chosen with the first.
        development: the share of the data that rates are chosen on.
        limit: measures on the first records of eval_path only.
        max_new_tokens: of responses.
        transport_records: records of the page's transport view.
        flags: further flags of training for all, in quotes, also of a YAML file by --config.
            Without any, the published recipe.
        processes: trainings at a time. By default one for each GPU, or one.
        trust_remote_code: runs the code that comes with the model.
    """

    loss: str | None = None
    model: str | None = None
    data: str | None = None
    eval_path: str | None = None
    out: str = "output/compare"
    rates: str = "1e-5,2e-5,4e-5"
    seeds: str = "0,1,2"
    development: float = 0.1
    limit: int | None = None
    max_new_tokens: int = 64
    transport_records: int = 24
    flags: str = ""
    processes: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Plan:
    """A comparison whose options have been checked.

    Attributes:
        losses: the flags of each loss, by its name.
    """

    options: Options
    folder: Path
    losses: dict[str, list[str]]
    rates: list[float]
    seeds: list[int]
    environments: list[dict[str, str]]


def plan_of(options: Options) -> Plan:
    """Checks the options, and puts files of losses into the folder. Raises UserError."""
    for name in ("loss", "model", "data", "eval_path"):
        if getattr(options, name) is None:
            raise UserError(f"give --{name}; emo compare --help says what it is")
    check_packages("emo compare", "rouge_score", "sacrebleu")
    rates, seeds = _numbers("rates", options.rates, float), _numbers("seeds", options.seeds, int)
    for rate in rates:
        check_number("rates", rate, 1e-12, 1.0)
    for seed in seeds:
        check_whole("seeds", seed, 0)
    check_number("development", options.development, LEAST, MOST)
    for name in ("limit", "processes", "max_new_tokens"):
        check_whole(name, 1 if getattr(options, name) is None else getattr(options, name), 1)
    check_whole("transport_records", options.transport_records, 0)
    try:
        words, _ = with_config(shlex.split(options.flags))
    except ValueError as error:  # a quote is open
        raise UserError(f"--flags {options.flags}: {first_line(error)}") from None
    for flag in sorted({flag.name for flag in split_flags(words)} & OURS):
        raise UserError(f"--flags: --{flag} is set by the comparison; drop it")
    options = replace(options, flags=shlex.join(words))
    folder = Path(options.out).expanduser().absolute()
    check_writable("out", folder)
    check_model(ModelSource(str(options.model), remote_code=options.trust_remote_code))
    losses, sources = _losses(options, folder)
    plan = Plan(options, folder, losses, rates, seeds, _devices(options))
    _check_data(plan)
    _check_same(options, folder, sources)
    return plan


def _numbers(name: str, text: str, kind: Any) -> list[Any]:
    try:
        found = [kind(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--{name} {text}: give numbers, with commas") from None
    if len(set(found)) < len(found):
        raise UserError(f"--{name} {text}: one is there twice")
    return found


def _check_data(plan: Plan) -> None:
    """Raises UserError for flags of training that do not exist, and for data of no use."""
    options = plan.options
    trial = Trial("", plan.rates[0], plan.seeds[0])
    run = parse(_flags(plan, trial, plan.folder / "runs" / trial.name, ["--mode", "mle"], {}).flags)
    records = load_records(
        str(options.data),
        run.training.cache_dir,
        columns=run.data.column_names(),
        documents=run.data.documents,
        train_history=run.data.train_history,
    )
    if not round(len(records) * options.development):
        raise UserError(
            f"--development {options.development} of {len(records)} records is none; give more"
        )
    read_records(
        [str(options.model)],
        Settings(
            data=str(options.eval_path),
            limit=options.limit,
            max_new_tokens=options.max_new_tokens,
            trust_remote_code=options.trust_remote_code,
        ),
    )


def _losses(options: Options, folder: Path) -> tuple[dict[str, list[str]], dict[Path, bytes]]:
    """Returns the flags of each loss, and the files to copy, so that all trials train the same."""
    found: dict[str, list[str]] = {}
    sources: dict[Path, bytes] = {}
    for asked in str(options.loss).split(","):
        name, flags = asked, ["--mode", asked]
        if asked not in MODES:
            try:
                own = read_loss(asked)
            except ValueError as error:
                raise UserError(f"--loss {asked}: {error}; modes are {', '.join(MODES)}") from None
            copy = folder / "losses" / f"{own.name}.py"
            name, flags, sources[copy] = own.name, ["--loss", f"{copy}:{own.name}"], own.source
            say(f"--loss {asked}: the code of this file runs with your rights")
        if name in found:
            raise UserError(f"--loss {options.loss}: {name} is there twice")
        found[name] = flags
    if len(found) < 2:
        raise UserError(f"--loss {options.loss}: give two losses or more, with commas")
    return found, sources


def _check_same(options: Options, folder: Path, sources: dict[Path, bytes]) -> None:
    """Writes what decides the result into the folder. Raises UserError if it was another there."""
    free = ("processes", "out", "transport_records")
    asked = {name: value for name, value in asdict(options).items() if name not in free}
    for name in ("data", "eval_path"):
        asked[f"content of {name}"] = identify(str(getattr(options, name)))
    file = folder / "settings.json"
    if file.exists():
        try:
            before = dict(read_json(file))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file}: cannot be read ({first_line(error)})") from None
        changed = [name for name in asked if before.get(name) != asked[name]]
        changed += [
            f"the file of {copy.stem}"
            for copy, source in sources.items()
            if not copy.is_file() or copy.read_bytes() != source
        ]
        if changed:
            raise UserError(f"--out {folder} has another comparison: {', '.join(changed)} differs")
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--out {folder} is not empty, and no comparison; give another")
    folder.mkdir(parents=True, exist_ok=True)
    for copy, source in sources.items():
        copy.parent.mkdir(exist_ok=True)
        write_whole(copy, source)
    write_whole(file, json.dumps(asked, indent=1) + "\n")


def _devices(options: Options) -> list[dict[str, str]]:
    """Returns the environment of each process: a GPU of those that are visible, or some cores."""
    found = Devices.found()
    count = options.processes or max(1, found.gpus)
    if found.gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(found.gpus)))
        names = [name.strip() for name in visible.split(",")]
        return [{"CUDA_VISIBLE_DEVICES": names[i % found.gpus]} for i in range(count)]
    return [{"OMP_NUM_THREADS": str(max(1, found.cores // count))}] * count


def _flags(
    plan: Plan, trial: Trial, output: Path, loss: list[str], environment: dict[str, str]
) -> Where:
    """Returns the command line of a trial, and where it runs."""
    options = plan.options
    remote = ["--trust_remote_code", "True"] if options.trust_remote_code else []
    flags = [
        *("--model_name_or_path", options.model, "--data_path", options.data),
        *("--output_dir", output, "--learning_rate", trial.learning_rate, "--seed", trial.seed),
        *("--eval_fraction", options.development, "--report_to", "none"),
        *("--max_record_mib", RECORD_LIMIT.mib),
        *loss,
        *remote,
        *shlex.split(options.flags),
    ]
    return where_to_run(
        [str(word) for word in flags], {"NPROC": "1", **environment}, Devices.found(), True
    )


def train(plan: Plan, trial: Trial, environment: dict[str, str], output: Path) -> None:
    """Trains one trial into a folder."""
    where = _flags(plan, trial, output, plan.losses[trial.loss], environment)
    log = plan.folder / "log.txt"
    run_module(log, ["stanford_alpaca.train", *where.flags], where.environment | environment)


def measure(plan: Plan, seed: int, runs: dict[str, Path], environment: dict[str, str]) -> Path:
    """Measures the base and the runs of one seed, unless that is done. Returns the folder."""
    options, out = plan.options, plan.folder / f"evaluation-{seed}"
    if not (out / "metrics.json").exists():
        show(f"measuring seed {seed}")
        shutil.rmtree(out, ignore_errors=True)  # an interrupted one of ours
        words: list[object] = ["stanford_alpaca.evaluation.metrics", options.model, *runs.values()]
        words += ["--data", options.eval_path, "--out", out, "--samples", 0]
        words += ["--max_new_tokens", options.max_new_tokens]
        words += ["--max_record_mib", RECORD_LIMIT.mib]
        words += [] if options.limit is None else ["--limit", options.limit]
        words += ["--trust_remote_code"] if options.trust_remote_code else []
        run_module(plan.folder / "log.txt", words, environment)
    return out


def compare(options: Options) -> None:
    """Runs the comparison, and writes compare.json and compare.html."""
    plan = plan_of(options)
    with Pool(plan.environments) as pool:

        def start(trial: Trial) -> Any:
            return pool.submit(
                lambda own: tried(trial, plan.folder, partial(train, plan, trial, own))
            )

        first = plan.seeds[0]
        asked = [start(Trial(loss, rate, first)) for loss in plan.losses for rate in plan.rates]
        trials = [each.result() for each in asked]
        best = best_rates(trials)
        chosen = {
            (loss, seed): Trial(loss, best[loss], seed)
            for seed in plan.seeds
            for loss in plan.losses
        }
        for each in trials:  # of the others the small files are enough
            other = Trial(each["loss"], each["learning_rate"], each["seed"])
            if other not in chosen.values():
                shutil.rmtree(plan.folder / "runs" / other.name, ignore_errors=True)
        made = {key: start(trial) for key, trial in chosen.items()}
        found = {key: each.result() for key, each in made.items()}
        folders = {
            seed: {loss: plan.folder / "runs" / chosen[loss, seed].name for loss in plan.losses}
            for seed in plan.seeds
        }
        measured = [pool.submit(partial(measure, plan, seed, folders[seed])) for seed in plan.seeds]
        evaluations = [each.result() for each in measured]
    runs = runs_of(plan, folders, evaluations, found)
    write(plan, trials, runs, folders[first], evaluations[0])


def runs_of(
    plan: Plan,
    folders: dict[int, dict[str, Path]],
    evaluations: list[Path],
    found: dict[tuple[str, int], dict[str, Any]],
) -> list[Run]:
    """Returns the measures and costs of every run."""
    runs = []
    for seed, evaluation in zip(plan.seeds, evaluations, strict=True):
        results = json.loads((evaluation / "metrics.json").read_text())["results"]
        for loss, folder in folders[seed].items():
            values = results[str(folder)]
            measures = {name: values[name]["value"] for name in MEASURES if name in values}
            costs = {name: found[loss, seed][name] for name in ("seconds", "peak_memory_mib")}
            runs.append(
                {"setting": "held out", "arm": loss, "seed": seed, "measures": measures | costs}
            )
    return runs


def write(
    plan: Plan, trials: list[dict], runs: list[Run], folders: dict[str, Path], evaluation: Path
) -> None:
    """Writes compare.json and compare.html, and prints the tables."""
    base = next(iter(plan.losses))
    tables = [
        ("Mean and standard deviation over the seeds", means_of(runs)),
        (f"Minus {base}, paired by seed, with Student's 95 % interval; * excludes 0",
         differences_of(runs, base)),
        ("nll on the development set by learning rate; the least, in **, is chosen",
         rates_of(trials)),
    ]  # fmt: skip
    lines = [
        f"Every loss was tried at {len(plan.rates)} learning rates with seed {plan.seeds[0]}. The "
        "one with the least nll on the development set was trained from all seeds: "
        f"{', '.join(map(str, plan.seeds))}.",
        f"The development set is {plan.options.development:g} of the training data. The seed "
        "decides it and the order of the batches, so losses see the same.",
        f"Measures, responses and transport below are those of seed {plan.seeds[0]}.",
    ]
    for loss, rate in best_rates(trials).items():
        if rate in (min(plan.rates), max(plan.rates)) and len(plan.rates) > 1:
            lines.append(f"{loss}: the chosen rate is at an edge of those tried; try more.")
    about = {
        "settings": json.loads((plan.folder / "settings.json").read_text()),
        "losses": {
            loss: f"sha256:{file_sha256(Path(flags[1].rpartition(':')[0]))}"
            for loss, flags in plan.losses.items()
            if flags[0] == "--loss"
        },
        "trials": trials,
        "runs": runs,
    }
    write_whole(plan.folder / "compare.json", json.dumps(about, indent=1) + "\n")
    data = report.collect(
        report.Options(
            (str(plan.options.model), *map(str, folders.values())),
            data=plan.options.eval_path,
            evaluation=str(evaluation),
            transport_records=plan.options.transport_records,
            trust_remote_code=plan.options.trust_remote_code,
        )
    )
    data["bench"] = {
        "lines": lines,
        "tables": [{"title": title, "head": rows[0], "rows": rows[1:]} for title, rows in tables],
    }
    data["sections"] = ["bench", "training", "measures", "responses", "transport"]
    write_whole(plan.folder / "compare.html", render(data))
    for title, rows in tables:
        say(f"\n{title}\n{align(rows)}")
    for line in lines:
        say(line)
    say(f"page: {plan.folder / 'compare.html'}")


run = command(Options, compare)


def main() -> None:
    """Runs the command."""
    exit_on_user_error(lambda: from_command_line(run))


if __name__ == "__main__":
    main()
