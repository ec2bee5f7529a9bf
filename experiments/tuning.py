"""Part E1 of ``real.py``: what each objective learns of running text, compared at equal entropy.

Each run trains LoRA with the package's own command, and measures nll, emo and entropy of every
held-out block at many temperatures. Everything else follows from these sums.
"""

import json
import signal
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from scipy.interpolate import CubicSpline

from experiments import smoothing, verdicts
from experiments.jobs import Jobs, Places, Run
from experiments.verdicts import Values, mean_over
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.blocks import make_blocks
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.evaluation.intervals import Items, mean_of
from stanford_alpaca.evaluation.measures.forced import BINS, Forced, teacher_forced
from stanford_alpaca.evaluation.measures.temperature import AROUND, OF_CURVE, TEMPERATURES, matched
from stanford_alpaca.generation.responses import load_for_generation
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.objective.head import original_weight
from stanford_alpaca.train import train

MODELS = ("smollm2-135m",)
TEXT = ("text/wikitext2_valid.txt",)
STEPS, BATCH, LENGTH = 48, 4, 256  # steps, blocks a step, tokens a block: 49,152 tokens
BLOCK = 128  # tokens of a held-out block
SEEDS, RATE, OTHERS = (0, 1, 2), 5e-4, (1.5e-4, 1.5e-3)
ARMS = {
    "mle": ["--mode", "mle"],
    "emo": ["--mode", "emo"],
    "emo2": ["--mode", "emo2"],
    "emo-identity": ["--mode", "emo", "--cost_kind", "identity"],
    "emo2-identity": ["--mode", "emo2", "--cost_kind", "identity"],
}
ONCE = {  # one seed, no verdict
    "emo-shuffled": ["--mode", "emo", "--cost_kind", "shuffled"],
    "emo-capped": ["--mode", "emo", "--emo_ratio_cap", "3"],  # as one version of the authors' code
    "emo-centred": ["--mode", "emo", "--cost_kind", "centred"],
    "emd": ["--mode", "emd"],
    "dft": ["--mode", "dft"],
    "smoothing": [],  # of labels, not by the package
}
LATER = ("emo-shuffled",)  # of these, with all seeds; decided after the first verdicts
CHECKED = ("mle", "emo", "emo2")  # at the other rates, too
CONTROLS = {"emo": "emo-identity", "emo2": "emo2-identity"}
MATCHED = ("nll", "emo", "costly_mass")  # measured at the entropy of ``mle``
MARGINS = {"nll": 0.02, "emo": 0.003, "token_accuracy": 0.5, "nll_at_best_tau": 0.02}
AFTERWARDS = (  # differences that no rule asked for before the first verdicts
    ("emo", "mle"),
    ("emo-identity", "mle"),
    ("emo2", "mle"),
    ("emo2-identity", "mle"),
    ("emo", "emo-identity"),
    ("emo2", "emo2-identity"),
    ("emo2", "emo"),
    ("emo-shuffled", "mle"),
    ("emo", "emo-shuffled"),
)
PILOT, PILOT_STEPS, PILOT_BLOCKS = 100, 12, 40  # seed, steps, blocks of what ``plan`` measures
SHARED = (
    "--lora True --lora_r 16 --lora_alpha 32 --lora_dropout 0 --bf16 True --lr_scheduler_type "
    "cosine --warmup_steps 0.1 --logging_steps 8 --save_strategy no --report_to none --resume auto"
).split()
SUMS = ("tokens", "nll", "emo", "correct", "costly", "entropy", "curve")


class Tuned(NamedTuple):
    """One training run."""

    arm: str
    rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """The name of its folder and of its file."""
        return f"{self.arm}-{self.rate:g}-{self.seed}"

    def folder(self, places: Places) -> Path:
        """Returns where its adapter is."""
        return places.work / "E1" / "models" / f"{self.name}-{self.steps}"


def jobs(places: Places) -> Jobs:
    """Returns the runs of the part by name."""
    runs = [Tuned(arm, RATE, seed, STEPS) for seed in SEEDS for arm in ARMS]
    once = [(arm, seed) for arm in ONCE for seed in (SEEDS if arm in LATER else SEEDS[:1])]
    runs += [Tuned(arm, RATE, seed, STEPS) for arm, seed in once]
    runs += [Tuned(arm, rate, SEEDS[0], STEPS) for rate in OTHERS for arm in CHECKED]
    return {run.name: partial(measure, places, run) for run in runs}


def pilots(places: Places) -> Jobs:
    """Returns the short runs that ``plan`` needs, with a seed of their own."""
    runs = [Tuned(arm, RATE, PILOT, PILOT_STEPS) for arm in ARMS]
    return {f"plan-{run.name}": partial(measure, places, run, PILOT_BLOCKS) for run in runs}


def measure(places: Places, run: Tuned, most: int | None = None) -> Run:
    """Trains a run, and returns the sums of every held-out block, or of evenly spaced ones."""
    began = time.process_time()
    folder = run.folder(places)
    (smooth if run.arm == "smoothing" else tune)(places, run, folder)
    trained = time.process_time()
    model, tokenizer = load_for_generation(ModelSource(str(folder)))
    cost = CostEmbedding(original_weight(model))
    examples, _ = make_blocks(texts(places)["test"], tokenizer, BLOCK)
    whole = len(examples) // 2 * 2  # two halves
    count = whole if most is None else min(most, whole)
    examples = examples.select(np.linspace(0, whole - 1, count).round().astype(int))
    forced = teacher_forced(model, tokenizer, examples, cost, 8, 1.0, TEMPERATURES)
    sums = {name: rounded(getattr(forced, name)) for name in SUMS}
    seconds = [round(trained - began), round(time.process_time() - trained)]
    return run._asdict() | {"blocks": whole, "cpu_seconds": seconds} | sums


def tune(places: Places, run: Tuned, folder: Path) -> None:
    """Trains with the package's command."""
    flags = {
        "model_name_or_path": places.models / MODELS[0],
        "data_path": train_file(places),
        "output_dir": folder,
        "block_size": LENGTH,
        "per_device_train_batch_size": BATCH,
        "max_steps": run.steps,
        "learning_rate": run.rate,
        "seed": run.seed,
    }
    train_here(flags, [*ARMS.get(run.arm, ONCE.get(run.arm, [])), *SHARED])


def train_here(flags: dict[str, Any], words: Sequence[str]) -> None:
    """Trains with the package's command, in this process. Signals then work as before."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    try:
        train([*given, *words])
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def load_merged(source: ModelSource) -> tuple[Any, Any]:
    """Loads a model for generation, with its adapter merged, which is faster."""
    model, tokenizer = load_for_generation(source)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    return model, tokenizer


def smooth(places: Places, run: Tuned, folder: Path) -> None:
    """Trains with label smoothing, on the same blocks and with the same flags."""
    source = ModelSource(str(places.models / MODELS[0]))
    blocks, _ = make_blocks(texts(places)["train"], source.tokenizer(), LENGTH)
    settings = {
        "per_device_train_batch_size": BATCH,
        "max_steps": run.steps,
        "learning_rate": run.rate,
        "seed": run.seed,
    }
    smoothing.train(source, blocks, folder, settings)


@lru_cache(maxsize=1)
def texts(places: Places) -> dict[str, Dataset]:
    """Returns the articles as plain text; every fifth is for the test."""
    records = load_records(places.data / TEXT[0], documents="wikitext", detokenize=True)
    test = [i for i in range(len(records)) if i % 5 == 4]
    train = [i for i in range(len(records)) if i % 5 != 4]
    return {"train": records.select(train), "test": records.select(test)}


def train_file(places: Places) -> Path:
    """Writes the articles to train on, one JSON object a line, and returns the file."""
    file = places.work / "E1" / "train.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        part = file.with_suffix(f".{time.time_ns()}")
        part.write_text("".join(json.dumps(row) + "\n" for row in texts(places)["train"]))
        part.replace(file)
    return file


def forced_of(run: Run) -> Forced:
    """Returns the sums that a run has left."""
    sums = {name: np.array(run[name], dtype=np.float64) for name in SUMS}
    return Forced(**sums, bins=np.zeros((len(sums["tokens"]), BINS, 3)))


def at_entropy(forced: Forced, other: Forced, name: str) -> Items:
    """Returns a measure at the entropy of another model.

    tau is fitted on each half of the blocks, and the measure is that of the other half.
    """
    found = matched(forced, other)[name]
    back = matched(_reversed(forced), _reversed(other))[name]
    return mean_over([found, Items(back.sums[::-1], back.of)])


def at_best_tau(forced: Forced) -> Items:
    """Returns nll at the temperature of least nll, each half with the temperature of the other."""
    places, column = np.arange(len(forced.tokens)), OF_CURVE.index("nll")
    sums = np.concatenate([forced.tokens[:, None], forced.curve[:, :, column]], 1)
    halves = [np.where((places % 2 == half)[:, None], sums, 0) for half in (0, 1)]
    return Items(np.concatenate(halves, 1), _best)


def _best(sums: np.ndarray) -> np.ndarray:  # [..., 2 * (1 + temperatures)] -> [...]
    one, other = np.split(sums, 2, axis=-1)
    curves = []
    for half in (one, other):
        values = np.log(half[..., 1:] / np.maximum(half[..., :1], 1))
        curves.append(CubicSpline(np.log(TEMPERATURES), values, axis=-1)(AROUND))
    chosen = [np.expand_dims(curve.argmin(-1), -1) for curve in curves]
    found = [np.take_along_axis(curves[1 - k], chosen[k], -1)[..., 0] for k in (0, 1)]
    return np.exp(found).mean(0)


def values_of(runs: Sequence[Run], base: Sequence[Run]) -> dict[str, Values]:
    """Returns each measure of an arm, a value a seed; ``base`` has the entropies of ``mle``."""
    ours, theirs = [forced_of(run) for run in runs], [forced_of(run) for run in base]
    pairs = list(zip(ours, theirs, strict=True))
    return {
        **{name: [at_entropy(a, b, name) for a, b in pairs] for name in MATCHED},
        "token_accuracy": [mean_of(100 * one.correct, one.tokens) for one in ours],
        "nll_at_best_tau": [at_best_tau(one) for one in ours],
        "tau": [at_entropy(a, b, "temperature").value for a, b in pairs],
        "nll_at_tau_1": [float(one.nll.sum() / one.tokens.sum()) for one in ours],
        "entropy_at_tau_1": [float(one.entropy.sum() / one.tokens.sum()) for one in ours],
    }


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Returns the runs of each arm by seed, up to the first seed that is not finished."""
    by_name = {(run["arm"], run["rate"], run["seed"]): run for run in runs}
    found: dict[str, list[Run]] = {}
    for arm, rate in dict.fromkeys((run["arm"], run["rate"]) for run in runs):
        seeds = SEEDS if rate == RATE else SEEDS[:1]
        name = arm if rate == RATE else f"{arm}, rate {rate:g}"
        for seed in seeds:
            if (arm, rate, seed) not in by_name or ("mle", rate, seed) not in by_name:
                break
            found.setdefault(name, []).append(by_name[arm, rate, seed])
    return found


def summary(runs: list[Run]) -> dict[str, Any]:
    """Returns the verdicts of the part, and the temperatures of each arm."""
    arms = grouped(runs)
    found, controls = {}, {}
    for arm, each in arms.items():
        base = "mle" + arm.removeprefix(each[0]["arm"])
        found[arm] = values_of(each, arms[base][: len(each)])
        if arm != base:
            controls[arm] = [base, *([CONTROLS[arm]] if arm in CONTROLS else [])]
    known = {a: of for a, of in controls.items() if a not in LATER and set(of) <= found.keys()}
    rows = verdicts.compare(found, known, MARGINS, "nll")
    more = ("tau", "nll_at_tau_1", "entropy_at_tau_1")
    return {
        "steps": STEPS,
        "tokens": STEPS * BATCH * LENGTH,
        "blocks": runs[0]["blocks"],
        "test_tokens": sum(runs[0]["tokens"]),
        "cpu_minutes": round(sum(sum(run["cpu_seconds"]) for run in runs) / 60),
        "margins": MARGINS,
        "arms": {arm: {name: values[name] for name in more} for arm, values in found.items()},
        "rows": rows,
        "afterwards": verdicts.afterwards(found, AFTERWARDS, (*MATCHED, "token_accuracy")),
    }


def table(found: dict[str, Any]) -> str:
    """Returns a table a measure, one of AFTERWARDS, and one of the arms before they are matched."""
    parts = [verdicts.table(found["rows"], MARGINS), verdicts.table_afterwards(found["afterwards"])]
    return "\n\n".join([*parts, _before(found["arms"])])


def _before(arms: dict[str, dict[str, list[float]]]) -> str:
    head = ["arm", "tau of each seed", "nll at tau 1", "entropy at tau 1"]
    rows = [
        [
            arm,
            ", ".join(f"{tau:.3f}" for tau in of["tau"]),
            *(f"{np.mean(of[name]):.4f}" for name in ("nll_at_tau_1", "entropy_at_tau_1")),
        ]
        for arm, of in arms.items()
    ]
    return f"**temperatures**\n\n{verdicts.markdown(head, rows)}"


def plot(found: dict[str, Any], file: Path) -> None:
    """Draws each arm minus ``mle``."""
    verdicts.plot(found["rows"], MARGINS, file)


def plan(runs: list[Run]) -> str:
    """Returns each margin beside the half-width over all blocks that pilots of a seed give."""
    share = len(runs[0]["tokens"]) / runs[0]["blocks"]
    by_arm = {run["arm"]: run for run in runs}
    found = {arm: values_of([run], [by_arm["mle"]]) for arm, run in by_arm.items()}
    pairs = [(arm, "mle") for arm in found if arm != "mle"] + list(CONTROLS.items())
    halves: dict[str, dict[str, float]] = {}
    for arm, other in pairs:
        halves[f"{arm} - {other}"] = {
            name: float(np.sqrt(share)) * verdicts.half_width(found[arm][name], found[other][name])
            for name in MARGINS
        }
    return verdicts.planned(halves, MARGINS)


def rounded(values: np.ndarray) -> Any:
    """Returns five significant digits of each number."""
    return np.vectorize(lambda value: float(f"{value:.5g}"))(values).tolist() if values.size else []


def _reversed(forced: Forced) -> Forced:
    return Forced(*(values[::-1] for values in forced))
