"""Teacher forcing: how a model predicts every token of the references.

The results are sums per record, from which the measures follow.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.cost.embedding import full_precision
from stanford_alpaca.data.batching import PadCollator
from stanford_alpaca.data.tokenize import IGNORE_INDEX
from stanford_alpaca.evaluation.intervals import Items, mean_of
from stanford_alpaca.losses.backends import reference
from stanford_alpaca.objective.head import LOGIT_ROWS, body_of, head_of

BINS = 15  # bins of the top-1 probability, of equal width
CURVE_ROWS = 32  # tokens whose distributions at all temperatures are held at a time


class Forced(NamedTuple):
    """Float64 sums over the supervised tokens of each record. A record without any has zeros."""

    tokens: np.ndarray  # [n]
    nll: np.ndarray  # [n]
    emo: np.ndarray  # [n]
    correct: np.ndarray  # [n]
    costly: np.ndarray  # [n] the probability of costly tokens
    entropy: np.ndarray  # [n] of the distribution of the next token, in nats
    bins: np.ndarray  # [n, BINS, 3] tokens, their top-1 probability, how many were right
    # [n, temperatures, 4] nll, emo, entropy and costly at each of several temperatures
    curve: np.ndarray = np.zeros((0, 0, 4))

    def measures(self) -> dict[str, Items | int]:
        """Returns means per supervised token, perplexity and calibration error.

        Sums are taken first and divided once, in a resample too.
        """
        return {
            "nll": mean_of(self.nll, self.tokens),
            "emo": mean_of(self.emo, self.tokens),
            "perplexity": Items(np.stack([self.nll, self.tokens], 1), _perplexity),
            "token_accuracy": mean_of(self.correct, self.tokens),
            "ece": Items(self.bins.reshape(len(self.bins), -1), _calibration_error, biased=True),
            "costly_mass": mean_of(self.costly, self.tokens),
            "entropy": mean_of(self.entropy, self.tokens),
            "supervised_tokens": int(self.tokens.sum()),
        }


@torch.inference_mode()
def teacher_forced(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,  # input_ids and labels
    cost: CostEmbedding,
    batch_size: int = 16,
    temperature: float = 1.0,
    temperatures: Sequence[float] = (),
) -> Forced:
    """Returns the sums of every example. They do not depend on the batch size.

    The model's logits are computed for supervised tokens only.

    Args:
        temperature: divides the logits.
        temperatures: of ``Forced.curve``.

    Raises:
        ValueError: ``recognise_head`` does not know the model's output layer.
    """
    collate, device = PadCollator(tokenizer.pad_token_id), model.device
    cost.to(device)
    model.eval()
    head = head_of(model)
    sums = torch.zeros(len(examples), 6, dtype=torch.float64, device=device)
    curve = torch.zeros(len(examples), len(temperatures), 4, dtype=torch.float64, device=device)
    bins = torch.zeros(len(examples) * BINS, 3, dtype=torch.float64, device=device)
    lengths = [len(ids) for ids in examples["input_ids"]]
    supervised = [
        i
        for i, labels in enumerate(examples["labels"])
        if any(label != IGNORE_INDEX for label in labels[1:])
    ]
    order = sorted(supervised, key=lengths.__getitem__)
    for start in tqdm(range(0, len(order), batch_size), desc="Evaluating", disable=None):
        chosen = order[start : start + batch_size]
        batch = collate([examples[i] for i in chosen])
        labels = batch.pop("labels")[:, 1:].to(device)
        hidden = body_of(model)(**{k: v.to(device) for k, v in batch.items()}, use_cache=False)[0][
            :, :-1
        ]
        keep = labels != IGNORE_INDEX
        records = torch.tensor(chosen, device=device)[keep.nonzero()[:, 0]]
        kept = (hidden[keep], labels[keep], records)
        for rows, targets, of in zip(*(part.split(LOGIT_ROWS) for part in kept), strict=True):
            logits = reference.logits_of(rows, head)
            found = _of_tokens(logits / temperature, targets, cost)
            sums.index_add_(0, of, found[:, :6])
            places = (found[:, 6] * BINS).ceil().long().clamp(1, BINS) - 1
            bins.index_add_(0, of * BINS + places, found[:, [0, 6, 3]])
            if temperatures:
                curve.index_add_(0, of, _at_temperatures(logits, targets, cost, temperatures))
    tokens, nll, emo, correct, costly, entropy = sums.T.cpu().numpy()
    whole = bins.view(-1, BINS, 3).cpu().numpy()
    return Forced(tokens, nll, emo, correct, costly, entropy, whole, curve.cpu().numpy())


def _of_tokens(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    cost: CostEmbedding,
) -> Tensor:  # [N, 7] float64
    """Returns seven numbers for every token.

    They are 1, nll, emo, whether the most probable token is the target, the probability of costly
    tokens, the entropy, and the probability of the most probable token. A token is costly if it
    costs at least the mean over the vocabulary: it is no nearer than an average token.
    """
    stats = reference.token_stats(logits, targets, cost)
    assert stats.log_emo is not None
    costs = cost.costs(targets, logits.shape[1])
    p = logits.float().softmax(1)
    costly = torch.where(costs >= costs.mean(1, keepdim=True), p, 0.0).sum(1)
    top, best = p.max(1)
    found = [
        torch.ones_like(stats.nll),
        stats.nll,
        stats.log_emo.exp(),
        best == targets,
        costly,
        torch.special.entr(p).sum(1),
        top,
    ]
    return torch.stack([values.double() for values in found], 1)


def _at_temperatures(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    cost: CostEmbedding,
    temperatures: Sequence[float],  # [G]
) -> Tensor:  # [N, G, 4] float64
    """Returns nll, emo, entropy and the probability of costly tokens at each temperature."""
    inverse = torch.tensor([1 / t for t in temperatures], device=logits.device)
    held = logits.new_empty(CURVE_ROWS, len(inverse), logits.shape[1], dtype=torch.float32)
    found = []
    for z, y in zip(logits.float().split(CURVE_ROWS), targets.split(CURVE_ROWS), strict=True):
        z = (z - z.max(1, keepdim=True).values).clamp_min(torch.finfo(z.dtype).min)
        costs = cost.costs(y, z.shape[1]).float()
        costly = (costs >= costs.mean(1, keepdim=True)).float()
        columns = torch.stack([torch.ones_like(z), z, costs, costly], 2)  # [n, V, 4]
        # [n, G, V] not yet divided by its sum; numbers below 1e-38 would take 20 times as long
        p = torch.mul(z[:, None], inverse[:, None], out=held[: len(z)]).clamp_min_(-80).exp_()
        with full_precision(z.device.type):
            total, of_z, of_costs, of_costly = (p @ columns).double().unbind(2)  # [n, G]
        nll = total.log() - z.gather(1, y[:, None]) * inverse
        entropy = total.log() - of_z / total * inverse
        found.append(torch.stack([nll, of_costs / total, entropy, of_costly / total], 2))
    return torch.cat(found)


def _perplexity(sums: np.ndarray) -> np.ndarray:  # [..., 2]
    return np.exp(np.minimum(sums[..., 0] / np.maximum(sums[..., 1], 1), 700.0))


def _calibration_error(sums: np.ndarray) -> np.ndarray:  # [..., BINS * 3]
    """Returns the expected calibration error (Guo et al. 2017, equation 3).

    It is |accuracy - confidence|, averaged over the tokens' bins.
    """
    tokens, confidence, right = np.moveaxis(sums.reshape(*sums.shape[:-1], BINS, 3), -1, 0)
    return np.abs(confidence - right).sum(-1) / np.maximum(tokens.sum(-1), 1)
