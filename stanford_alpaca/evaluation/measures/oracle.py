"""Compares a checkpoint with the oracle, the model that the data were drawn from.

Their next-token distributions are compared over the whole vocabulary. With p the checkpoint's
distribution and q the oracle's, at every supervised position of a reference:

    forward_cross_entropy = -sum_i q_i log p_i      reverse_cross_entropy = -sum_i p_i log q_i
    total_variation       = 1/2 sum_i |p_i - q_i|   transport_cost        = sum_ij p_i q_j c_ij

``transport_cost`` is the exact expectation of emo over the oracle's tokens. It is the cost of the
independent coupling, and so an upper bound of ``optimal_transport``, the least cost of any coupling
of p and q (the earth mover's distance). That is a linear program, which is solved for some
positions only.

``oracle_perplexity`` is a measure of responses: exp of the mean nll that the oracle gives to their
tokens.
"""

import importlib.util
from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.cost.embedding import full_precision
from stanford_alpaca.data.batching import PadCollator
from stanford_alpaca.data.tokenize import IGNORE_INDEX
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.intervals import Items, mean_of
from stanford_alpaca.losses.backends import reference
from stanford_alpaca.models.check import check_model
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.objective.head import body_of, head_of

# the probability that optimal transport leaves out of each distribution: this changes its cost by
# at most 4 * LEFT_OUT
LEFT_OUT = 1e-3
# the most tokens of each distribution that it moves: the program grows with their product
MOST = 2048
EXACT = ("forward_cross_entropy", "reverse_cross_entropy", "total_variation", "transport_cost")


def check_oracle(oracle: ModelSource, models: list[ModelSource]) -> None:
    """Raises UserError unless POT is installed and the models have the oracle's tokens.

    It runs before any model is loaded.
    """
    if importlib.util.find_spec("ot") is None:
        raise UserError("--oracle needs a package of its own: pip install POT")
    check_model(oracle)
    tokens = oracle.tokenizer().get_vocab()
    for model in models:
        if model.tokenizer().get_vocab() != tokens:
            other = f"{model.path} has another vocabulary than the --oracle {oracle.path}"
            raise UserError(f"{other}: they have no distributions to compare")


@torch.inference_mode()
def distances(
    model: PreTrainedModel,
    oracle: PreTrainedModel,
    examples: Dataset,  # input_ids and labels
    cost: CostEmbedding,
    *,
    positions: int = 128,
    batch_size: int = 16,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, Items]:
    """Returns the distances of the module's docstring, with an item per example.

    Args:
        positions: how many supervised positions optimal transport is solved at. Equal numbers and
            seeds choose the same positions.
        temperature: divides the model's logits, and not the oracle's.
    """
    counts = np.array(
        [sum(label != IGNORE_INDEX for label in row["labels"][1:]) for row in examples]
    )
    chosen = np.zeros(counts.sum(), dtype=bool)
    chosen[np.random.default_rng(seed).permutation(len(chosen))[:positions]] = True
    first = np.concatenate([[0], counts.cumsum()])
    sums, solved = np.zeros((len(examples), len(EXACT))), np.zeros((len(examples), 2))
    cost.to(model.device)
    for number, _, (p, q) in _distributions([model, oracle], examples, 0, batch_size):
        p = p if temperature == 1 else (p / temperature).log_softmax(1)
        sums[number] += _exact(p, q, cost).sum(0).cpu().numpy()
        for row in np.flatnonzero(chosen[first[number] : first[number + 1]]):
            solved[number] += [optimal_transport(p[row].exp(), q[row].exp(), cost), 1]
    exact = {name: mean_of(sums[:, column], counts) for column, name in enumerate(EXACT)}
    return exact | ({"optimal_transport": mean_of(solved[:, 0], solved[:, 1])} if positions else {})


@torch.inference_mode()
def oracle_perplexity(
    oracle: PreTrainedModel,
    prompts: list[list[int]],
    responses: list[list[int]],  # token ids, as ``generate_ids`` gives them
    *,
    pad_token_id: int,
    batch_size: int = 16,
) -> Items:
    """Returns how likely the oracle finds the responses, with an item per response."""
    labels = [
        [IGNORE_INDEX] * len(ids) + response
        for ids, response in zip(prompts, responses, strict=True)
    ]
    ids = [ids + response for ids, response in zip(prompts, responses, strict=True)]
    sums = np.zeros((len(ids), 2))
    for number, targets, (log_q,) in _distributions(
        [oracle], Dataset.from_dict({"input_ids": ids, "labels": labels}), pad_token_id, batch_size
    ):
        sums[number] = [-log_q.gather(1, targets[:, None]).double().sum().item(), len(targets)]
    return Items(sums, lambda sums: np.exp(sums[..., 0] / np.maximum(sums[..., 1], 1)))


def optimal_transport(p: Tensor, q: Tensor, cost: CostEmbedding) -> float:  # [V], [V]
    """Returns the least expected cost of turning p into q.

    At most LEFT_OUT of each is left out, or more where MOST tokens do not hold the rest.
    """
    import ot  # POT; takes seconds to import

    (rows, mass), (columns, wanted) = _most(p), _most(q)
    prices = cost.costs(rows, len(p))[:, columns].double().cpu().numpy()
    return float(ot.emd2(mass.cpu().numpy(), wanted.cpu().numpy(), prices, numItermax=10_000_000))


def _exact(
    p: Tensor,  # [n, V] log probabilities
    q: Tensor,  # [n, V] log probabilities
    cost: CostEmbedding,
) -> Tensor:  # [n, 4]
    forward, reverse = (
        -torch.where(one > -torch.inf, one.exp() * other, 0.0).sum(1)
        for one, other in ((q, p), (p, q))
    )
    p, q = p.exp(), q.exp()
    variation = (p - q).abs().sum(1) / 2
    if cost.rows is None or cost.directed is None:
        transport = 1 - (p * q).sum(1)
    else:  # sum_ij p_i q_j (1 - u_i . u_j); a row of zeros has no cost to itself
        with full_precision(p.device.type):
            transport = (
                1 - ((p @ cost.rows) * (q @ cost.rows)).sum(1) - (p * q)[:, ~cost.directed].sum(1)
            )
    return torch.stack([forward, reverse, variation, transport.clamp(min=0)], 1).double()


# [V] -> ids [k], their float64 probabilities [k], made to sum to 1
def _most(p: Tensor) -> tuple[Tensor, Tensor]:
    ordered, ids = p.double().sort(descending=True)
    keep = min(int((ordered.cumsum(0) < (1 - LEFT_OUT) * ordered.sum()).sum()) + 1, MOST)
    return ids[:keep], ordered[:keep] / ordered[:keep].sum()


def _distributions(
    models: list[PreTrainedModel], examples: Dataset, pad_token_id: int, batch_size: int
) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
    """Yields every example's number, targets [n], and each model's log probabilities [n, V]."""
    collate, heads = PadCollator(pad_token_id), [head_of(model.eval()) for model in models]
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = collate([examples[i] for i in numbers])
        labels = batch.pop("labels")[:, 1:]
        hidden = [
            body_of(model)(**{k: v.to(model.device) for k, v in batch.items()}, use_cache=False)[0][
                :, :-1
            ]
            for model in models
        ]
        for row, number in enumerate(numbers):
            keep = labels[row] != IGNORE_INDEX
            logits = [
                reference.logits_of(states[row][keep.to(states.device)], head)
                for states, head in zip(hidden, heads, strict=True)
            ]
            yield (
                number,
                labels[row][keep].to(logits[0].device),
                [one.float().log_softmax(1) for one in logits],
            )
