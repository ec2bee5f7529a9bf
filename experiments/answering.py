"""Part E3 of ``real.py``: what each objective answers after instruction tuning.

Questions and sentences of two classification sets become instructions in Alpaca's form, with the
class in words as the response. A run trains LoRA on few of them, and answers every test item
greedily. On GSM8K a run trains all weights by the published recipe, and held-out responses are
measured.
"""

import json
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

from experiments import tuning, verdicts
from experiments.jobs import Jobs, Places, Run
from experiments.verdicts import Values
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.fewshot.tasks import Split, load_task, read_tasks
from stanford_alpaca.evaluation.intervals import mean_of
from stanford_alpaca.evaluation.measures.forced import teacher_forced
from stanford_alpaca.evaluation.measures.temperature import TEMPERATURES
from stanford_alpaca.evaluation.measures.texts import exact_match
from stanford_alpaca.evaluation.metrics import make_examples
from stanford_alpaca.evaluation.settings import Settings
from stanford_alpaca.generation.responses import generate_batch, load_for_generation
from stanford_alpaca.generation.sampling import Sampling
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.objective.head import original_weight
from stanford_alpaca.run.where import PUBLISHED

MODELS = ("smollm2-135m",)
TASKS = {
    "trec": "Which kind of answer does the question ask for: {}?",
    "subj": "Which kind of sentence is it: {}?",
}
GSM8K = "sft/gsm8k_alpaca.json"
TEXT = ("icl/trec_train.jsonl", "icl/trec_test.jsonl", "icl/subj_train.jsonl")
TEXT += ("icl/subj_test.jsonl", GSM8K)
ARMS = {
    "mle": ["--mode", "mle"],
    "emo": ["--mode", "emo"],
    "emo-adaptive": ["--mode", "emo", "--cost", "adaptive"],
    "emo-identity": ["--mode", "emo", "--cost_kind", "identity"],
}
CONTROLS = {"emo": "emo-identity", "emo-adaptive": "emo-identity"}
LIVE = "emo-adaptive"  # the same as ``emo`` where LoRA leaves the output layer as it is
LOWER, LOWER_ARMS = tuning.OTHERS[0], ("mle", "emo")  # a check, with one seed and few examples
COUNTS, SEEDS = (100, 400), (0, 1, 2)
SEEN, BATCH = 400, 10  # examples that a run sees, and of a step: with 100, each is seen four times
ANSWER, AT_ONCE = 8, 50  # tokens of an answer, prompts of a batch
TRAINED, STEP, HELD_OUT = 256, 32, 100  # records of GSM8K
SETTINGS = [(task, count) for task in TASKS for count in COUNTS] + [("gsm8k", TRAINED)]
MARGINS = {
    **{f"trec, {count}": 3.0 for count in COUNTS},  # exact match, points
    **{f"subj, {count}": 2.0 for count in COUNTS},
    "gsm8k, nll": 0.02,
    "gsm8k, costly mass": 0.01,
}
PILOT, PILOT_ARMS, PILOT_ITEMS = 100, ("mle", "emo"), 200  # seed, arms, test items of ``plan``


class Answered(NamedTuple):
    """One training run."""

    task: str
    count: int
    arm: str
    seed: int
    lower: bool = False  # whether it trains at LOWER

    @property
    def name(self) -> str:
        """The name of its folder and of its file."""
        return "-".join(map(str, self[:4])) + ("-lower" if self.lower else "")

    def folder(self, places: Places) -> Path:
        """Returns where its model is until it is measured."""
        return places.work / "E3" / "models" / self.name


def jobs(places: Places) -> Jobs:
    """Returns the runs of the part by name."""
    runs = [Answered(*of, arm, seed) for of in SETTINGS for seed in SEEDS for arm in arms_of(of[0])]
    runs += [Answered(task, min(COUNTS), a, SEEDS[0], True) for task in TASKS for a in LOWER_ARMS]
    found: Jobs = {run.name: partial(measure, places, run) for run in runs}
    return found | {"base": partial(of_base, places)}


def arms_of(task: str) -> list[str]:
    """Returns the arms of a task."""
    return [arm for arm in ARMS if task == "gsm8k" or arm != LIVE]


def pilots(places: Places) -> Jobs:
    """Returns the runs that ``plan`` needs, with a seed of their own and few test items."""
    few = [of for of in SETTINGS if of[1] != max(COUNTS)]
    runs = [Answered(*of, arm, PILOT) for of in few for arm in PILOT_ARMS]
    return {f"plan-{run.name}": partial(measure, places, run, PILOT_ITEMS) for run in runs}


def measure(places: Places, run: Answered, most: int | None = None) -> Run:
    """Trains a run, and returns what is measured of every test item, or of the first ones."""
    began, folder = time.process_time(), run.folder(places)
    data = write_data(places, run, folder.with_name(f"{folder.name}-data"))
    reasons = run.task == "gsm8k"
    flags = {
        "model_name_or_path": places.models / MODELS[0],
        "data_path": data["train"],
        "output_dir": folder,
        "seed": run.seed,
    }
    tuning.train_here(flags | (_recipe() if reasons else _few(run.lower)), ARMS[run.arm])
    trained = time.process_time()
    of = _forced(places, folder, data["test"], most) if reasons else _right(folder, data, most)
    seconds = [round(trained - began), round(time.process_time() - trained)]
    for used in (folder, data["train"].parent):
        shutil.rmtree(used)
    return run._asdict() | {"cpu_seconds": seconds} | of


def of_base(places: Places) -> Run:
    """Returns what is measured of GSM8K's held-out responses before any training."""
    data = write_data(places, Answered("gsm8k", 0, "base", 0), places.work / "E3" / "base-data")
    return Answered("gsm8k", 0, "base", 0)._asdict() | _forced(
        places, places.models / MODELS[0], data["test"], None
    )


def write_data(places: Places, run: Answered, folder: Path) -> dict[str, Path]:
    """Writes what a run trains on, drawn by its seed, and what it is measured on."""
    if run.task == "gsm8k":
        records = json.loads((places.data / GSM8K).read_text())
        known, test = records[:-HELD_OUT], records[-HELD_OUT:]
    else:
        task = read_tasks()[run.task]
        found = load_task(task, places.data / "icl")
        known, test = (_records(run.task, task.classes, of) for of in (found.train, found.test))
    drawn = np.random.default_rng(run.seed).permutation(len(known))[: run.count]
    files = {"train": folder / "train.json", "test": folder / "test.json"}
    folder.mkdir(parents=True, exist_ok=True)
    for file, of in zip(files.values(), ([known[i] for i in drawn], test), strict=True):
        if not file.exists():  # a run that goes on has a record of its data
            file.write_text(json.dumps(of))
    return files


def _records(task: str, classes: list[str], split: Split) -> list[dict[str, str]]:
    asked = TASKS[task].format(" or ".join([", ".join(classes[:-1]), classes[-1]]))
    return [
        {"instruction": asked, "input": text, "output": classes[label]}
        for text, label in zip(*split, strict=True)
    ]


def _few(lower: bool) -> dict[str, Any]:
    words = tuning.SHARED
    known = {name.removeprefix("--"): value for name, value in zip(*[iter(words)] * 2, strict=True)}
    return known | {
        "learning_rate": LOWER if lower else tuning.RATE,
        "per_device_train_batch_size": BATCH,
        "max_steps": SEEN // BATCH,
    }


def _recipe() -> dict[str, Any]:
    changed = {"num_train_epochs": 1, "global_batch": STEP, "save_strategy": "no"}
    kept = {name: value for name, value in PUBLISHED.items() if not name.startswith("save_")}
    return kept | changed | {"bf16": True, "report_to": "none", "resume": "auto"}


def _right(folder: Path, data: dict[str, Path], most: int | None) -> Run:
    """Answers greedily, in bfloat16 as in training, and returns what is an exact match."""
    model, tokenizer = tuning.load_merged(ModelSource(str(folder)))
    test = json.loads(data["test"].read_text())
    chosen = [test[i] for i in _spread(len(test), most)]
    answers = generate_batch(
        model.to(torch.bfloat16), tokenizer, chosen, Sampling(ANSWER), batch_size=AT_ONCE
    )
    wanted = [record["output"] for record in chosen]
    right = [int(exact_match([a], [b])) for a, b in zip(answers, wanted, strict=True)]
    return {"items": len(test), "right": right}


def _forced(places: Places, folder: Path, test: Path, most: int | None) -> Run:
    """Measures held-out responses with the cost of the base, in float32."""
    base, _ = load_for_generation(ModelSource(str(places.models / MODELS[0])))
    cost = CostEmbedding(original_weight(base).clone())
    model, tokenizer = load_for_generation(ModelSource(str(folder)))
    records: Dataset = load_records(test)
    chosen = records.select(_spread(len(records), most))
    examples = make_examples(str(folder), chosen, tokenizer, Settings(str(test)))
    forced = teacher_forced(model, tokenizer, examples, cost, 8, 1.0, TEMPERATURES)
    sums = {name: tuning.rounded(getattr(forced, name)) for name in tuning.SUMS}
    return {"items": len(records), **sums}


def _spread(count: int, most: int | None) -> np.ndarray:
    return np.linspace(0, count - 1, min(count, most or count)).round().astype(int)


def values_of(runs: Sequence[Run], base: Sequence[Run]) -> dict[str, Values]:
    """Returns each measure of an arm, a value a seed; of settings without a run there is none.

    ``base`` has the entropies of ``mle`` on GSM8K.
    """
    entropies = {run["seed"]: tuning.forced_of(run) for run in base if run["task"] == "gsm8k"}
    found: dict[str, list] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        if run["task"] == "gsm8k":
            forced, other = tuning.forced_of(run), entropies[run["seed"]]
            for name in ("nll", "costly_mass"):
                value = tuning.at_entropy(forced, other, name)
                found.setdefault(f"gsm8k, {name.replace('_', ' ')}", []).append(value)
        else:
            right = mean_of(100 * np.array(run["right"]))
            found.setdefault(f"{run['task']}, {run['count']}", []).append(right)
    return found


def complete(runs: Sequence[Run]) -> list[Run]:
    """Returns the runs of each setting and seed of which all arms are finished."""
    arms: dict[tuple, set[str]] = {}
    usual = [run for run in runs if not run["lower"]]
    for run in usual:
        arms.setdefault((run["task"], run["count"], run["seed"]), set()).add(run["arm"])
    return [r for r in usual if arms[r["task"], r["count"], r["seed"]] == {*arms_of(r["task"])}]


def summary(runs: list[Run]) -> dict[str, Any]:
    """Returns the verdicts of the part; nothing of it is primary."""
    whole = complete(runs)
    if not whole:
        raise UserError("no task of E3 has a seed of which all arms are finished")
    of_arm = {arm: [run for run in whole if run["arm"] == arm] for arm in ARMS}
    found = {arm: values_of(each, of_arm["mle"]) for arm, each in of_arm.items()}
    margins = {name: margin for name, margin in MARGINS.items() if name in found["mle"]}
    controls = {arm: ["mle", *([CONTROLS[arm]] if arm in CONTROLS else [])] for arm in ARMS}
    del controls["mle"]
    return {
        "steps": SEEN // BATCH,
        "items": {run["task"]: run["items"] for run in whole},
        "cpu_minutes": round(sum(sum(run["cpu_seconds"]) for run in whole) / 60),
        "lower_rate": {
            f"{run['task']}, {run['arm']}": round(100 * float(np.mean(run["right"])), 1)
            for run in runs
            if run["lower"]
        },
        "gsm8k": {
            arm: _at_tau_1(each)
            for arm, each in (
                {"base": [run for run in runs if run["arm"] == "base"]} | of_arm
            ).items()
        },
        "margins": margins,
        "rows": verdicts.compare(found, controls, margins),
    }


def _at_tau_1(runs: Sequence[Run]) -> dict[str, float]:
    """Returns nll and entropy on GSM8K before temperatures, as means over the runs."""
    chosen = [tuning.forced_of(run) for run in runs if run["task"] == "gsm8k"]
    return {
        name: round(float(np.mean([of.sum() / one.tokens.sum() for one, of in sums])), 4)
        for name in ("nll", "entropy")
        if (sums := [(one, getattr(one, name)) for one in chosen])
    }


def table(found: dict[str, Any]) -> str:
    """Returns a table a measure, and those of GSM8K before temperatures and of the lower rate."""
    rows = [[arm, *map(str, of.values())] for arm, of in found["gsm8k"].items() if of]
    checks = [[name, str(right)] for name, right in found["lower_rate"].items()]
    head = [f"{min(COUNTS)} examples at rate {LOWER:g}, one seed", "exact match"]
    tables = [verdicts.table(found["rows"], found["margins"])]
    tables += [verdicts.markdown(["gsm8k at tau 1", "nll", "entropy"], rows)] if rows else []
    tables += [verdicts.markdown(head, checks)] if checks else []
    return "\n\n".join(tables)


def plot(found: dict[str, Any], file: Path) -> None:
    """Draws each arm minus ``mle``."""
    verdicts.plot(found["rows"], found["margins"], file)


def plan(runs: list[Run]) -> str:
    """Returns each margin beside the half-width over all items that pilots of a seed give."""
    of_arm = {arm: [run for run in runs if run["arm"] == arm] for arm in PILOT_ARMS}
    found = {arm: values_of(each, of_arm["mle"]) for arm, each in of_arm.items()}
    share = {run["task"]: len(run.get("right", run.get("nll"))) / run["items"] for run in runs}
    ours, theirs = found["emo"], found["mle"]
    halves = {
        name: float(np.sqrt(share[name.split(",")[0]]))
        * verdicts.half_width(ours[name], theirs[name])
        for name in theirs
    }
    return verdicts.planned({"emo - mle": halves}, {name: MARGINS[name] for name in halves})
