"""Part E0 of ``real.py``: where each objective comes to rest on a real next-token distribution.

A model gives the distribution q of the next token after a context, cut to its TOP tokens. The
logits of p, over the same tokens, descend the objective's expectation over targets drawn from q,
with detached weights as in training, from p = q on. A proper objective stays there. What is left
of another one is compared with the temperature of equal entropy: tau with H(q^(1/tau)) = H(p).
"""

from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.jobs import Jobs, Places
from experiments.tables import markdown
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.cost.build import documents
from stanford_alpaca.evaluation.intervals import mean_of
from stanford_alpaca.losses.objectives import Objective
from stanford_alpaca.models.load import ModelSource

MODELS = ("smollm2-135m", "gemma3-270m")
TEXT = ("text/english.txt.gz",)
CONTEXTS, LENGTH, TOP = 100, 64, 500  # tokens of a context, tokens of q
COSTS = ("cosine", "identity", "shuffled", "centred")
PRICED = ("emo", "emo2", "mix", "emd")
UNPRICED = ("mle", "tailr", "mixce", "dft")
STEPS, RATE = 200, 0.1
MEASURES = ("tau", "r2", "slope", "tv", "tv_tau", "residual")


class Distributions(NamedTuple):
    """What a model expects after each context."""

    log_q: Tensor  # [contexts, TOP] float32, summing to 1
    ids: Tensor  # [contexts, TOP]
    head: Tensor  # [V, D]


def jobs(places: Places) -> Jobs:
    """Returns the runs of the part by name."""
    found: Jobs = {}
    for model in MODELS:
        for mode in (*UNPRICED, *PRICED):
            for cost in COSTS if mode in PRICED else ("-",):
                name = f"{model}-{mode}" + (f"-{cost}" if cost != "-" else "")
                found[name] = partial(
                    rest, places.models / model, places.data / TEXT[0], mode, cost
                )
    return found


def rest(model: Path, text: Path, mode: str, cost: str) -> dict[str, Any]:
    """Returns each measure of where the objective comes to rest, a value a context."""
    log_q, ids, head = distributions(model, text)
    prices = prices_of(head, ids, cost) if cost not in ("-", "identity") else None
    log_p, residual = descend(Objective(mode), log_q, prices, STEPS)
    measured = describe(log_q, log_p) | {"residual": residual}
    contexts = {name: [float(f"{v:.4g}") for v in measured[name].tolist()] for name in MEASURES}
    return {"model": model.name, "mode": mode, "cost": cost, "contexts": contexts}


@lru_cache(maxsize=1)
@torch.inference_mode()
def distributions(folder: Path, text: Path) -> Distributions:
    """Returns the model's next-token distributions after contexts of the text."""
    source = ModelSource(str(folder))
    model, tokenizer = source.load().eval(), source.tokenizer()
    first = tokenizer("")["input_ids"][:1]  # what the tokenizer puts before a text
    logits = []
    for ids in contexts(text, tokenizer):
        logits.append(model(torch.tensor([[*first, *ids]])).logits[0, -1].float())
    top, ids = torch.stack(logits).topk(TOP)
    return Distributions(top.log_softmax(1), ids, model.get_output_embeddings().weight.clone())


def contexts(text: Path, tokenizer: Any) -> Iterator[list[int]]:
    """Yields the first LENGTH tokens of CONTEXTS paragraphs drawn from the text."""
    paragraphs = list(documents(text))
    order = np.random.default_rng(0).permutation(len(paragraphs))
    drawn = (tokenizer(paragraphs[i], add_special_tokens=False)["input_ids"] for i in order)
    return islice((ids[:LENGTH] for ids in drawn if len(ids) > LENGTH), CONTEXTS)


def prices_of(head: Tensor, ids: Tensor, kind: str) -> Tensor:  # [V, D], [n, k] -> [n, k, k]
    """Returns the costs between the tokens of each context."""
    rows = CostEmbedding(head, kind).rows
    assert rows is not None
    found = [CostEmbedding.of_rows(rows[each]) for each in ids]
    return torch.stack(
        [
            cost.costs(torch.arange(len(each)), len(each))
            for cost, each in zip(found, ids, strict=True)
        ]
    )


def descend(
    objective: Objective,
    log_q: Tensor,  # [n, k]
    prices: Tensor | None,  # [n, k, k] symmetric; None: every other token costs 1
    steps: int,
) -> tuple[Tensor, Tensor]:  # log p [n, k], residual [n]
    """Descends the expected objective with Adam, its rate falling to 0.

    The residual is the sum of the last gradient's absolute values, which is 0 at rest.
    """
    z, q = log_q.clone().requires_grad_(), log_q.exp()
    adam = torch.optim.Adam([z], lr=RATE, eps=1e-12)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for step in range(steps + 1):
        log_p = z.log_softmax(1)
        p = log_p.exp()
        emo = -torch.expm1(log_p) if prices is None else (p[:, None] @ prices).squeeze(1)
        loss = (q * objective(-log_p, emo.clamp_min(1e-30).log())).sum()
        (z.grad,) = torch.autograd.grad(loss, z)
        if step < steps:
            adam.step()
            schedule.step()
    return log_p.detach(), z.grad.abs().sum(1)


def describe(log_q: Tensor, log_p: Tensor) -> dict[str, Tensor]:  # [n, k], [n, k] -> [n] each
    """Compares p with q and with q at the temperature tau that has the entropy of p."""
    log_q, log_p = log_q.double(), log_p.double()
    tau = equal_entropy(log_q, entropy(log_p))
    tempered = (log_q / tau[:, None]).log_softmax(1)
    x, y = (each - each.mean(1, keepdim=True) for each in (log_q, log_p))
    covariance = (x * y).sum(1)
    return {
        "tau": tau,
        "r2": covariance**2 / (x.pow(2).sum(1) * y.pow(2).sum(1)),
        "slope": covariance / x.pow(2).sum(1),
        "tv": (log_p.exp() - log_q.exp()).abs().sum(1) / 2,
        "tv_tau": (log_p.exp() - tempered.exp()).abs().sum(1) / 2,
    }


def entropy(log_p: Tensor) -> Tensor:  # [n, k] -> [n] nats
    return -(log_p.exp() * log_p).sum(1)


def equal_entropy(log_q: Tensor, wanted: Tensor) -> Tensor:  # [n, k], [n] -> [n]
    """Returns tau with H(q^(1/tau)) = wanted, by bisection between 0.001 and 1000."""
    low, high = (torch.full_like(wanted, bound) for bound in (-3.0, 3.0))
    for _ in range(60):
        middle = (low + high) / 2
        below = entropy((log_q / 10 ** middle[:, None]).log_softmax(1)) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return 10 ** ((low + high) / 2)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the mean over contexts of each measure, with its 95 % interval, run by run."""
    rows = []
    for run in runs:
        means = {
            name: [float(f"{v:.4g}") for v in mean_of(np.array(values)).measured()]
            for name, values in run["contexts"].items()
        }
        rows.append({key: run[key] for key in ("model", "mode", "cost")} | means)
    return {"contexts": CONTEXTS, "length": LENGTH, "top": TOP, "steps": STEPS, "runs": rows}


def table(found: dict[str, Any]) -> str:
    """Returns a table with a row for each objective and cost, and columns for each model."""
    head = ["objective", "cost"]
    for model in MODELS:
        head += [f"{model}: tau", "slope, 1/tau", "r²", "TV to q", "TV to q^(1/tau)"]
    rows: dict[tuple[str, str], list[str]] = {}
    for run in found["runs"]:
        tau = "{:.2f} [{:.2f}, {:.2f}]".format(*run["tau"])
        slope = f"{run['slope'][0]:.2f}, {1 / run['tau'][0]:.2f}"
        means = (f"{run[name][0]:.3f}" for name in ("r2", "tv", "tv_tau"))
        rows.setdefault((run["mode"], run["cost"]), []).extend([tau, slope, *means])
    return markdown(head, [[f"`{mode}`", cost, *cells] for (mode, cost), cells in rows.items()])


def plot(found: dict[str, Any], file: Path) -> None:
    """Draws tau, and what it does not explain, for each objective and cost and each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.6), layout="constrained")
    panels = figure.subplots(2, len(MODELS), sharex=True, sharey="row")
    names = {"tau": "tau of equal entropy", "tv_tau": "TV to q^(1/tau)"}
    for row, (name, label) in zip(panels, names.items(), strict=True):
        row[0].set(ylabel=label)
        for panel, model in zip(row, MODELS, strict=True):
            for run in found["runs"]:
                if run["model"] == model and run["mode"] in PRICED:
                    number, place = COSTS.index(run["cost"]), PRICED.index(run["mode"])
                    value, low, high = run[name]
                    panel.errorbar(
                        place + 0.15 * (number - 1.5),
                        value,
                        [[value - low], [high - value]],
                        fmt="o",
                        color=f"C{number}",
                        label=run["cost"] if place == 0 else None,
                    )
            panel.set(xticks=range(len(PRICED)), xticklabels=PRICED)
        row[0].set_ylim(bottom=0)
    for panel, model in zip(panels[0], MODELS, strict=True):
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set(title=model)
    panels[0][0].legend()
    figure.savefig(file, dpi=110)
