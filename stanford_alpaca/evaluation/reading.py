"""What a model makes of records before it is trained on them: nll and emo of each token.

Figures of a record are means over its supervised tokens. Its ``ratio`` is emo / nll. Its
``distance`` is emo / (1 - p_y), the mean cost of the probability that lies elsewhere. Where a
record is unlikely, a small distance means that the model expected other words of a similar meaning,
and a large one that it expected another meaning. (The ratio cannot tell: emo is at most 2, so it
falls with nll.)
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.tokenize import ExampleEncoder
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.page.transport import targets_of
from stanford_alpaca.losses.functional import linear_loss_and_stats
from stanford_alpaca.losses.objectives import Objective
from stanford_alpaca.objective.head import body_of, head_of

UNLIKELY = 0.75  # quantile of nll from which on a record counts as unlikely
NEIGHBOURS = 8  # records with the most similar prompts
FAR = 3.0  # robust standard deviations above the neighbours that make a label suspicious
LEAST = 3 * NEIGHBOURS  # records that are needed to say so
MEANING, WORDING = "another meaning", "another wording"


class Reading(NamedTuple):
    """A record as the model reads it; n supervised tokens."""

    texts: list[str]  # [n]
    nll: np.ndarray  # [n] nats
    emo: np.ndarray  # [n]
    prompt: np.ndarray  # [H] mean hidden state of what is not trained, or of all if all is

    @property
    def ratio(self) -> float:
        """emo / nll; 0 where the model is certain of all tokens."""
        nll = float(self.nll.sum())
        return float(self.emo.sum()) / nll if nll > 0 else 0.0

    @property
    def distance(self) -> float:
        """emo / (1 - p); 0 where the model is certain of all tokens."""
        elsewhere = float(-np.expm1(-self.nll).sum())
        return float(self.emo.sum()) / elsewhere if elsewhere > 0 else 0.0


@torch.inference_mode()
def read_with(
    model: PreTrainedModel,
    records: Iterable[Mapping],
    cost: CostEmbedding,
    encode: ExampleEncoder,
) -> list[Reading | None]:
    """Returns how the model reads each record. None for one without a token to predict.

    Raises:
        ValueError: the model's output layer is not understood, or does not fit the cost.
    """
    model.eval()
    head = head_of(model)
    cost.to(model.device).check(len(head.weight))
    found: list[Reading | None] = []
    for record in tqdm(records, desc="Reading", disable=None):
        try:
            ids, texts = targets_of(encode, dict(record))
        except UserError:  # the template cannot write it; the tables above count such records
            ids, texts = [], {}
        if not texts:
            found.append(None)
            continue
        row = torch.tensor([ids], device=model.device)
        places = torch.tensor(list(texts), device=model.device)
        hidden = body_of(model)(input_ids=row, use_cache=False)[0][0]
        _, stats = linear_loss_and_stats(
            hidden[places - 1], head, row[0, places], cost, "mle", reduction="sum"
        )
        assert stats.log_emo is not None
        masked = torch.ones(len(ids), dtype=torch.bool, device=model.device)
        masked[places] = False
        prompt = hidden[masked] if masked[1:].any() else hidden
        numbers = (stats.nll, stats.log_emo.exp(), prompt.float().mean(0))
        found.append(Reading(list(texts.values()), *(each.cpu().numpy() for each in numbers)))
    return found


def kinds_of(readings: list[Reading]) -> list[str]:
    """Returns of each unlikely record whether its meaning or its wording is, and "" of others.

    A record is unlikely if its nll lies in the upper quarter. Its meaning is, if its distance lies
    above the median of all.
    """
    nll = np.array([reading.nll.mean() for reading in readings])
    distance = np.array([reading.distance for reading in readings])
    least, middle = np.quantile(nll, UNLIKELY), np.median(distance)
    return [
        (MEANING if own > middle else WORDING) if unlikely else ""
        for own, unlikely in zip(distance, nll >= least, strict=True)
    ]


def suspicion_of(readings: list[Reading]) -> np.ndarray:  # [n]
    """Returns how far the labels stand out: the lesser of two distances, of nll and of emo.

    Each is how much the record lies above the median of the ``NEIGHBOURS`` records with the most
    similar prompts, by the cosine of their centred mean hidden states. Its unit is the robust
    standard deviation (1.4826 times the median absolute deviation) of that over all records. A
    label is suspicious from ``FAR`` on. All are 0 if there are fewer than ``LEAST`` records.
    """
    if len(readings) < LEAST:
        return np.zeros(len(readings))
    prompts = np.stack([reading.prompt for reading in readings])
    prompts = prompts - prompts.mean(0)
    prompts /= np.maximum(np.linalg.norm(prompts, axis=1, keepdims=True), 1e-12)
    similar = prompts @ prompts.T
    np.fill_diagonal(similar, -np.inf)
    near = np.argsort(-similar, axis=1, kind="stable")[:, :NEIGHBOURS]
    distances = []
    for values in (
        np.array([reading.nll.mean() for reading in readings]),
        np.array([reading.emo.mean() for reading in readings]),
    ):
        above = values - np.median(values[near], axis=1)
        spread = 1.4826 * np.median(np.abs(above - np.median(above)))
        distances.append(above / max(spread, 1e-9))
    return np.minimum(*distances)


def weights_of(readings: list[Reading], objective: Objective) -> np.ndarray:  # [n]
    """Returns each record's share of an objective's pull, in units of its share under mle.

    The pull on a target is minus the derivative of the loss by the target's logit: with a and b the
    derivatives by nll and log emo it is a (1 - p_y) + b p_y, and under mle 1 - p_y.
    """
    pulls = {
        name: np.array([pull_on(reading, each).sum() for reading in readings])
        for name, each in (("ours", objective), ("mle", Objective("mle")))
    }
    shares = {name: pull / max(float(pull.sum()), 1e-30) for name, pull in pulls.items()}
    return shares["ours"] / np.maximum(shares["mle"], 1e-30)


def pull_on(reading: Reading, objective: Objective) -> np.ndarray:  # [n]
    """Returns the pull of an objective on every target of a record."""
    nll = torch.tensor(reading.nll, dtype=torch.float64, requires_grad=True)
    log_emo = torch.tensor(reading.emo, dtype=torch.float64).log().requires_grad_()
    objective(nll, log_emo).sum().backward()
    a, b = (_or_zeros(each) for each in (nll, log_emo))
    p = torch.exp(-nll.detach())
    return (a * -torch.expm1(-nll.detach()) + b * p).numpy()


def _or_zeros(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.nan_to_num(0.0)


def rows_of(places: list[Any], readings: list[Reading | None]) -> list[dict[str, Any]]:
    """Returns a row for each record that has tokens, with all that is said of it."""
    kept = [(place, reading) for place, reading in zip(places, readings, strict=True) if reading]
    read = [reading for _, reading in kept]
    if not read:
        return []
    columns = zip(
        kept,
        kinds_of(read),
        suspicion_of(read),
        weights_of(read, Objective("emo")),
        weights_of(read, Objective("emo2")),
        strict=True,
    )
    return [
        {
            "source": source,
            "record": number + 1,
            "tokens": len(reading.nll),
            "nll": float(reading.nll.mean()),
            "emo": float(reading.emo.mean()),
            "ratio": reading.ratio,
            "distance": reading.distance,
            "kind": kind,
            "suspicion": float(suspicion),
            "suspicious": bool(suspicion >= FAR),
            "weight": {"emo": float(emo), "emo2": float(emo2)},
        }
        for ((source, number), reading), kind, suspicion, emo, emo2 in columns
    ]
