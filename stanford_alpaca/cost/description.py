"""Looks into the costs that a model's output embedding gives.

With unit rows u_i, the cost of a pair is c_ij = 1 - u_i . u_j. So the moments of the costs over all
pairs follow from the mean row and the second moments of the rows, and no pair is drawn. Rows of
zeros are left out.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stanford_alpaca.console import align
from stanford_alpaca.cost.build import documents
from stanford_alpaca.cost.embedding import TILE, CostEmbedding
from stanford_alpaca.errors import UserError

DESCRIBED = ("cosine", "centred", "shuffled")
CLASSES = {"frequent": 0.01, "middle": 0.1, "rare": 1.0}  # up to this share of the vocabulary
GROUPS = 10  # of equally many tokens, by frequency
LENGTH = 64  # tokens that a context grows to
PAIRS = 200_000  # drawn for quantiles and histograms


@dataclass(frozen=True)
class Pairs:
    """The costs of pairs of tokens, both drawn from one distribution over the vocabulary."""

    mean: float
    deviation: float
    # shares of the variance: of what the two tokens add each by itself, and of their frequencies
    by_token: float
    by_frequency: float


@dataclass(frozen=True)
class Description:
    """What one kind of cost looks like."""

    uniform: Pairs
    unigram: Pairs
    drawn: dict[str, np.ndarray]  # costs [PAIRS] of uniform and unigram pairs
    classes: dict[str, float]  # mean costs between classes of tokens
    # mean cosine of the gradient by the logits with that of the identity cost
    emo_term: float
    mode_emo: float


@torch.inference_mode()
def describe(
    model: PreTrainedModel, rows: list[list[int]], kinds: Iterable[str] = DESCRIBED, seed: int = 0
) -> tuple[dict[str, Description], Tensor]:  # the frequencies [V] sum to 1
    """Returns what each kind of cost looks like, and how frequent the model finds each token.

    Args:
        rows: token ids of texts. A token's frequency is its mean probability after each beginning
            of each text.
    """
    head = model.get_output_embeddings().weight
    costs = {kind: CostEmbedding(head, kind, seed) for kind in kinds}
    frequency = torch.zeros(len(head), dtype=torch.float64)
    cosines: dict[str, list[Tensor]] = {kind: [] for kind in costs}
    for row in rows:
        p = model(torch.tensor([row])).logits[0, :-1, : len(head)].double().softmax(1)
        targets = torch.tensor(row[1:])
        frequency += p.sum(0)
        plain = gradients(p, targets, CostEmbedding(None, "identity"))
        for kind, cost in costs.items():
            found = gradients(p, targets, cost)
            cosines[kind].append(torch.cosine_similarity(found, plain, dim=2))
    frequency /= frequency.sum()
    described = {}
    for kind, cost in costs.items():
        term, whole = torch.cat(cosines[kind], dim=1).mean(1).tolist()
        described[kind] = _described(cost, frequency, term, whole)
    return described, frequency


def gradients(p: Tensor, targets: Tensor, cost: CostEmbedding) -> Tensor:  # [2, n, V]
    """Returns the gradients by the logits of emo and of mode ``emo`` (see ``Objective``).

    p has the model's probabilities, [n, V] float64.
    """
    column = targets[:, None]
    costs = cost.costs(targets, p.shape[1]).double()
    emo = (p * costs).sum(1, keepdim=True)
    others = p.scatter(1, column, 0.0)
    nll = -p.gather(1, column).log()
    towards = others.scatter(1, column, -others.sum(1, keepdim=True))  # p minus the target's 1
    tilted = torch.where(emo > 0, p * costs / emo, 0.0)
    term = p * (costs - emo)
    return torch.stack([term, (towards + nll * (tilted - p)) / 2])


def _described(cost: CostEmbedding, frequency: Tensor, term: float, whole: float) -> Description:
    assert cost.rows is not None and cost.directed is not None
    units, weights = cost.rows[cost.directed], frequency[cost.directed]
    order = weights.argsort(descending=True)
    weights = weights / weights.sum()
    uniform = torch.full_like(weights, 1 / len(weights))
    random = np.random.default_rng(0)
    drawn = {}
    for name, of in (("uniform", uniform), ("unigram", weights)):
        chance = of.numpy() / of.numpy().sum()
        i, j = (torch.from_numpy(random.choice(len(of), PAIRS, p=chance)) for _ in range(2))
        parts = zip(i.split(TILE), j.split(TILE), strict=True)
        costs = torch.cat([1 - (units[a] * units[b]).sum(1) for a, b in parts]).clamp_min(0)
        drawn[name] = torch.where(i == j, 0.0, costs).numpy()
    ends = [max(1, round(share * len(order))) for share in CLASSES.values()]
    means = {
        name: units[order[start:end]].double().mean(0)
        for name, start, end in zip(CLASSES, [0, *ends], ends, strict=False)
    }
    classes = {
        f"{one}-{other}": 1 - (means[one] @ means[other]).item()
        for place, one in enumerate(CLASSES)
        for other in list(CLASSES)[place:]
    }
    return Description(
        pairs_of(units, uniform, order),
        pairs_of(units, weights, order),
        drawn,
        classes,
        term,
        whole,
    )


def pairs_of(units: Tensor, weights: Tensor, order: Tensor) -> Pairs:  # [n, D], [n], [n]
    """Returns the moments of 1 - u_i . u_j, with i and j drawn by the weights, which sum to 1.

    Args:
        order: the tokens from the most frequent one on.
    """
    units = units.double()
    mean_row = weights @ units
    moments = units.T @ (weights[:, None] * units)
    square = mean_row @ mean_row
    variance = moments.pow(2).sum() - square**2
    effect = mean_row @ moments @ mean_row - square**2
    groups = order.tensor_split(GROUPS)
    parts = torch.stack([weights[each] @ units[each] for each in groups])
    masses = torch.stack([weights[each].sum() for each in groups])
    # the variance of the means of pairs of groups: parts are sums, so their products have weights
    between = ((parts @ parts.T).pow(2) / torch.outer(masses, masses)).sum() - square**2
    return Pairs(
        1 - square.item(),
        variance.sqrt().item(),
        (2 * effect / variance).item(),
        (between / variance).item(),
    )


def texts_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Path | None,
    count: int,
    seed: int = 0,
) -> list[list[int]]:
    """Returns ``count`` rows of LENGTH tokens, from the beginnings of a file's texts.

    Without a file the model writes them, at temperature 1.
    """
    first = tokenizer("")["input_ids"][:1] or [tokenizer.bos_token_id or tokenizer.eos_token_id]
    if text is not None:
        rows: list[list[int]] = []
        for document in documents(text):
            ids = [*first, *tokenizer(document, add_special_tokens=False)["input_ids"]]
            if len(ids) > 1:
                rows.append(ids[:LENGTH])
            if len(rows) == count:
                break
        if not rows:
            raise UserError(f"--text {text}: there is no text in it")
        return rows
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        written = model.generate(
            torch.tensor([first] * count),
            attention_mask=torch.ones(count, len(first), dtype=torch.long),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=LENGTH - len(first),
            max_new_tokens=LENGTH - len(first),
            pad_token_id=tokenizer.pad_token_id,
        )
    return written.tolist()


def table(found: dict[str, Description]) -> str:
    """Formats a column for each kind of cost."""
    each = list(found.values())
    rows = [["", *found]]
    for name in ("uniform", "unigram"):
        pairs = [getattr(one, name) for one in each]
        rows.append(
            [
                f"cost of {name} pairs, mean (deviation)",
                *(f"{one.mean:.2f} ({one.deviation:.2f})" for one in pairs),
            ]
        )
        spread = [np.quantile(one.drawn[name], [0.05, 0.5, 0.95]) for one in each]
        rows.append(
            ["  5 %, 50 %, 95 %", *(" ".join(f"{v:.2f}" for v in values) for values in spread)]
        )
        rows.append(["  variance from single tokens", *(f"{one.by_token:.0%}" for one in pairs)])
        rows.append(["  variance from frequency", *(f"{one.by_frequency:.0%}" for one in pairs)])
    for name in each[0].classes:
        rows.append([f"mean cost, {name}", *(f"{one.classes[name]:.2f}" for one in each)])
    rows.append(["gradient of emo, cosine with identity's", *(f"{o.emo_term:.2f}" for o in each)])
    rows.append(["gradient of mode emo, the same", *(f"{one.mode_emo:.2f}" for one in each)])
    return align(rows)


def tokens_of(words: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the token of each of several words, separated by commas.

    Raises:
        UserError: a word is no single token.
    """
    found = []
    for word in words.split(","):
        ids: Any = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise UserError(
                f"--tokens {word!r} is {len(ids)} tokens: give words of one token each, most "
                'begin with a space, as " Monday, three"'
            )
        found += ids
    return found


def plot(found: dict[str, Description], file: Path) -> None:
    """Draws the distributions of the costs of uniform and of unigram pairs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    for panel, name in zip(panels, ("uniform", "unigram"), strict=True):
        for kind, one in found.items():
            panel.hist(one.drawn[name], bins=80, histtype="step", density=True, label=kind)
        panel.set(title=f"{name} pairs of tokens", xlabel="cost")
    panels[0].legend()
    figure.savefig(file, dpi=130)
