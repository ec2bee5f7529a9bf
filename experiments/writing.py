"""Part E1-text of ``real.py``: what the models of part E1 write, compared at equal entropy.

``emo`` and ``emo2`` are sampled at temperature 1. ``mle`` and the identity controls are sampled at
the temperature at which they have the same entropy on the held-out blocks.
"""

import json
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from experiments import tuning, verdicts
from experiments.jobs import Jobs, Places, Run
from experiments.verdicts import Values
from stanford_alpaca.data.blocks import DocumentEncoder
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.intervals import mean_of
from stanford_alpaca.evaluation.measures.energy import Clouds
from stanford_alpaca.evaluation.measures.mauve import load_featuriser, mauve, mauve_of_halves
from stanford_alpaca.evaluation.measures.oracle import oracle_perplexity
from stanford_alpaca.evaluation.measures.texts import distinct, repetition
from stanford_alpaca.generation.responses import generate_ids, load_for_generation
from stanford_alpaca.generation.sampling import Sampling
from stanford_alpaca.models.load import ModelSource

MODELS, FEATURES, JUDGE = ("smollm2-135m", "minilm", "gemma3-270m"), "minilm", "gemma3-270m"
TEXT = tuning.TEXT
PREFIXES, PREFIX, LENGTH = 400, 32, 64  # texts, tokens
JUDGED = 100  # texts of which Gemma's nll is measured
BATCH = 100  # texts that are sampled at once
PAIRS = (  # who writes, and whose entropy it has
    ("mle", "mle"),
    ("mle", "emo"),
    ("mle", "emo2"),
    ("emo", "emo"),
    ("emo2", "emo2"),
    ("emo-identity", "emo"),
    ("emo2-identity", "emo2"),
)
MARGINS = {
    "energy_distance": 0.01,
    "mauve": 0.06,
    "distinct_2": 0.02,
    "repetition_4": 0.01,
    "gemma_nll": 0.1,
}
AFTERWARDS = (  # as the paper compares: each at temperature 1; and ``mle`` cooled
    ("emo as emo", "mle as mle"),
    ("emo2 as emo2", "mle as mle"),
    ("mle as emo", "mle as mle"),
    ("mle as emo2", "mle as mle"),
)
WHOLE = ("energy_distance", "mauve", "distinct_2")  # measures of a whole set of texts


class Texts(NamedTuple):
    """Prefixes and what follows them, in ids of the base and as text."""

    prefixes: list[list[int]]
    before: list[str]
    after: list[str]


def jobs(places: Places) -> Jobs:
    """Returns the runs of the part by name: each set of texts, and the references."""
    found: Jobs = {"references": partial(of_references, places)}
    for seed in tuning.SEEDS:
        for arm, other in PAIRS:
            found[f"{arm}-as-{other}-{seed}"] = partial(write, places, arm, other, seed)
    return found


def pilots(places: Places) -> Jobs:
    """Returns what ``plan`` needs: the base's own texts, with three seeds."""
    return {f"plan-base-{seed}": partial(of_base, places, seed) for seed in tuning.SEEDS}


def of_references(places: Places) -> Run:
    """Returns the measures of the references by themselves, and MAUVE's noise floor."""
    truth = references(places)
    features, judge = models(places)
    halves = mauve_of_halves(features(_whole(truth.before, truth.after)))
    found = {"arm": "references", "as": "", "seed": 0, "mauve": 1 - float(halves.values.min())}
    return found | _of_texts(truth.before, truth.after, judge)


def of_base(places: Places, seed: int) -> Run:
    """Returns the measures of the base at temperature 1."""
    source = ModelSource(str(places.models / MODELS[0]))
    return {"arm": "base", "as": "base", "seed": seed} | sampled(places, source, 1.0, seed)


def write(places: Places, arm: str, other: str, seed: int) -> Run:
    """Returns the measures of an arm's texts at the entropy of another arm."""
    run = tuning.Tuned(arm, tuning.RATE, seed, tuning.STEPS)
    forced = []
    for each in (run, run._replace(arm=other)):
        file = places.runs / "E1" / f"{each.name}.json"
        if not file.exists():
            raise UserError(f"{file} is missing: run --part E1 first, with the same --runs")
        forced.append(tuning.forced_of(json.loads(file.read_text())))
    tau = 1.0 if arm == other else tuning.at_entropy(*forced, "temperature").value
    source = ModelSource(str(run.folder(places)))
    found = {"arm": arm, "as": other, "seed": seed, "tau": round(tau, 4)}
    return found | sampled(places, source, tau, seed)


def sampled(places: Places, source: ModelSource, tau: float, seed: int) -> dict[str, Any]:
    """Samples a text after each prefix, and returns its measures."""
    truth = references(places)
    model, tokenizer = tuning.load_merged(source)
    sampling = Sampling(LENGTH, temperature=tau)
    ids = generate_ids(model, tokenizer, truth.prefixes, sampling, batch_size=BATCH, seed=seed)
    after = tokenizer.batch_decode(ids, skip_special_tokens=True)
    features, judge = models(places)
    theirs, ours = (features(_whole(truth.before, of)) for of in (truth.after, after))
    return {
        "energy_distance": Clouds(theirs, ours[None]).measured().value,
        "mauve": mauve(theirs, ours, seed),
    } | _of_texts(truth.before, after, judge)


@lru_cache(maxsize=1)
def references(places: Places) -> Texts:
    """Returns evenly spaced prefixes of the held-out articles, and what follows them."""
    tokenizer = ModelSource(str(places.models / MODELS[0])).tokenizer()
    encode = DocumentEncoder.of(tokenizer)
    articles = [encode.ids(text).tolist() for text in tuning.texts(places)["test"]["text"]]
    size = PREFIX + LENGTH
    starts = [(of, place) for of, ids in enumerate(articles) for place in range(len(ids) - size)]
    chosen = [starts[k] for k in np.linspace(0, len(starts) - 1, PREFIXES).round().astype(int)]
    windows = [articles[of][place : place + size] for of, place in chosen]
    prefixes = [ids[:PREFIX] for ids in windows]
    return Texts(
        prefixes,
        tokenizer.batch_decode(prefixes),
        tokenizer.batch_decode([ids[PREFIX:] for ids in windows], skip_special_tokens=True),
    )


@lru_cache(maxsize=1)
def models(places: Places) -> tuple[Any, Any]:
    """Returns the featuriser, and the model and tokenizer that judge texts."""
    return (
        load_featuriser(ModelSource(str(places.models / FEATURES))),
        load_for_generation(ModelSource(str(places.models / JUDGE))),
    )


def _whole(before: Sequence[str], after: Sequence[str]) -> list[str]:
    return [a + b for a, b in zip(before, after, strict=True)]


def _of_texts(before: list[str], after: list[str], judge: Any) -> dict[str, Any]:
    """Returns the measures of texts by themselves; those of each text as a list."""
    model, tokenizer = judge
    every = len(after) // JUDGED or 1
    chosen = [(a, b) for a, b in zip(before[::every], after[::every], strict=True)]
    prompts = [tokenizer(a)["input_ids"] for a, _ in chosen]
    responses = [tokenizer(b, add_special_tokens=False)["input_ids"] for _, b in chosen]
    judged = oracle_perplexity(
        model, prompts, responses, pad_token_id=tokenizer.pad_token_id, batch_size=8
    )
    return {
        "distinct_2": distinct(after, 2),
        "repetition_4": [round(repetition(text, 4), 5) for text in after],
        "gemma_nll": [[round(nll, 3), tokens] for nll, tokens in judged.sums.tolist()],
    }


def values_of(runs: Sequence[Run]) -> dict[str, Values]:
    """Returns each measure of a set of texts, a value a seed."""
    nll = [np.array(run["gemma_nll"]) for run in runs]
    return {name: [run[name] for run in runs] for name in WHOLE} | {
        "repetition_4": [mean_of(np.array(run["repetition_4"])) for run in runs],
        "gemma_nll": [mean_of(sums[:, 0], sums[:, 1]) for sums in nll],
    }


def summary(runs: list[Run]) -> dict[str, Any]:
    """Returns the verdicts of the part; nothing of it is primary."""
    sets: dict[str, list[Run]] = {}
    for run in sorted(runs[1:], key=lambda run: run["seed"]):
        sets.setdefault(f"{run['arm']} as {run['as']}", []).append(run)
    found = {name: values_of(each) for name, each in sets.items()}
    controls = {}
    for arm, other in PAIRS:
        beside = ["mle", *([tuning.CONTROLS[arm]] if arm in tuning.CONTROLS else [])]
        names = [f"{each} as {other}" for each in beside]
        if arm != "mle" and {f"{arm} as {other}", *names} <= found.keys():
            controls[f"{arm} as {other}"] = names
    own = values_of([runs[0] | {"energy_distance": 0.0}])
    return {
        "prefixes": PREFIXES,
        "length": LENGTH,
        "judged": JUDGED,
        "margins": MARGINS,
        "mauve_floor": runs[0]["mauve"],
        # windows of the references overlap, so their bigrams are not compared with those of samples
        "references": {name: verdicts.mean(own[name]) for name in MARGINS if name not in WHOLE},
        "taus": {name: [run["tau"] for run in each] for name, each in sets.items()},
        "rows": verdicts.compare(found, controls, MARGINS),
        "afterwards": verdicts.afterwards(found, AFTERWARDS, list(MARGINS)),
    }


def table(found: dict[str, Any]) -> str:
    """Returns a table a measure, with the references' own values below."""
    own = ", ".join(f"{name} {value:.4f}" for name, value in found["references"].items())
    rows = [[name, ", ".join(map(str, taus))] for name, taus in found["taus"].items()]
    return "\n\n".join(
        [
            verdicts.table(found["rows"], MARGINS),
            verdicts.table_afterwards(found["afterwards"]),
            f"References: {own}. MAUVE's noise floor: {found['mauve_floor']:.4f}.",
            verdicts.markdown(["texts", "tau of each seed"], rows),
        ]
    )


def plot(found: dict[str, Any], file: Path) -> None:
    """Draws each arm minus ``mle`` at the arm's entropy."""
    verdicts.plot(found["rows"], MARGINS, file)


def plan(runs: list[Run]) -> str:
    """Returns each margin beside the half-width that the base's own spread over seeds gives."""
    values, halves = values_of(runs), {}
    for name in MARGINS:
        spread = np.std([verdicts.mean([one]) for one in values[name]], ddof=1)
        halves[name] = float(stats.t.ppf(0.975, len(runs) - 1) * spread * np.sqrt(2 / len(runs)))
    return verdicts.planned({"base": halves}, MARGINS)
