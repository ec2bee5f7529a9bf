"""Teacher forcing: what a model makes of every token of the references, in sums per record from which the measures follow."""

from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.batching import PadCollator
from stanford_alpaca.data.tokenize import IGNORE_INDEX
from stanford_alpaca.evaluation.intervals import Items, mean_of
from stanford_alpaca.losses.backends import reference
from stanford_alpaca.objective.head import body_of, head_of

ROWS = 1024  # supervised tokens whose logits are held at a time
BINS = 15  # of equal width, of the top-1 probability


class Forced(NamedTuple):
    """Sums over the supervised tokens of each record, float64; zeros for a record without any."""

    tokens: np.ndarray  # [n]
    nll: np.ndarray  # [n]
    emo: np.ndarray  # [n]
    correct: np.ndarray  # [n]
    costly: np.ndarray  # [n]
    bins: np.ndarray  # [n, BINS, 3] tokens, their top-1 probability, whether it was right

    def measures(self) -> dict[str, Items | int]:
        """Means per supervised token, perplexity and calibration error: sums first, then one division, also in a resample."""
        return {
            "nll": mean_of(self.nll, self.tokens),
            "emo": mean_of(self.emo, self.tokens),
            "perplexity": Items(np.stack([self.nll, self.tokens], 1), _perplexity),
            "token_accuracy": mean_of(self.correct, self.tokens),
            "ece": Items(self.bins.reshape(len(self.bins), -1), _calibration_error, biased=True),
            "costly_mass": mean_of(self.costly, self.tokens),
            "supervised_tokens": int(self.tokens.sum()),
        }


@torch.inference_mode()
def teacher_forced(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,  # input_ids and labels
    cost: CostEmbedding,
    batch_size: int = 16,
) -> Forced:
    """The sums of every example. The batch size does not matter.

    The model's logits are computed for supervised tokens only; ValueError if ``recognise_head`` does not know its head.
    """
    collate, device = PadCollator(tokenizer.pad_token_id), model.device
    cost.to(device)
    model.eval()
    head = head_of(model)
    sums = torch.zeros(len(examples), 5, dtype=torch.float64, device=device)
    bins = torch.zeros(len(examples) * BINS, 3, dtype=torch.float64, device=device)
    lengths = [len(ids) for ids in examples["input_ids"]]
    supervised = [
        i
        for i, labels in enumerate(examples["labels"])
        if any(label != IGNORE_INDEX for label in labels[1:])
    ]
    order = sorted(supervised, key=lengths.__getitem__)
    for start in tqdm(range(0, len(order), batch_size), desc="Evaluating"):
        chosen = order[start : start + batch_size]
        batch = collate([examples[i] for i in chosen])
        labels = batch.pop("labels")[:, 1:].to(device)
        hidden = body_of(model)(**{k: v.to(device) for k, v in batch.items()}, use_cache=False)[0][
            :, :-1
        ]
        keep = labels != IGNORE_INDEX
        records = torch.tensor(chosen, device=device)[keep.nonzero()[:, 0]]
        for rows, targets, of in zip(
            hidden[keep].split(ROWS), labels[keep].split(ROWS), records.split(ROWS), strict=True
        ):
            found = _of_tokens(reference.logits_of(rows, head), targets, cost)
            sums.index_add_(0, of, found[:, :5])
            places = (found[:, 5] * BINS).ceil().long().clamp(1, BINS) - 1
            bins.index_add_(0, of * BINS + places, found[:, [0, 5, 3]])
    tokens, nll, emo, correct, costly = sums.T.cpu().numpy()
    return Forced(tokens, nll, emo, correct, costly, bins.view(-1, BINS, 3).cpu().numpy())


def _of_tokens(
    logits: Tensor, targets: Tensor, cost: CostEmbedding
) -> Tensor:  # [N, V], [N] -> [N, 6] float64
    """Of every token 1, nll, emo, whether the most probable token is the target, the probability of costly tokens, and that
    of the most probable one. Costly is what costs at least the mean over the vocabulary: no nearer than an average token."""
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
        top,
    ]
    return torch.stack([values.double() for values in found], 1)


def _perplexity(sums: np.ndarray) -> np.ndarray:  # [..., 2]
    return np.exp(np.minimum(sums[..., 0] / np.maximum(sums[..., 1], 1), 700.0))


def _calibration_error(sums: np.ndarray) -> np.ndarray:  # [..., BINS * 3]
    """Guo et al. 2017, equation 3: |accuracy - confidence|, averaged over the tokens' bins."""
    tokens, confidence, right = np.moveaxis(sums.reshape(*sums.shape[:-1], BINS, 3), -1, 0)
    return np.abs(confidence - right).sum(-1) / np.maximum(tokens.sum(-1), 1)
