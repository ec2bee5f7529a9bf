"""Log-likelihoods of the endings of prompts.

``plain`` is the specification and scores one prompt at a time. The faster ways compute once what
prompts share, and their batches hold prompts of similar lengths. An experiment decides which of
them gives the same numbers.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from stanford_alpaca.console import say
from stanford_alpaca.errors import first_line
from stanford_alpaca.evaluation.fewshot.prompting import Choices
from stanford_alpaca.losses.backends.reference import logits_of
from stanford_alpaca.losses.types import Head
from stanford_alpaca.objective.head import LOGIT_ROWS, body_of, head_of

STEM = 16  # if all items share this many tokens, the shared tokens are computed once
# tokens in the contexts of a batch, limited by a core's cache and by the KV cache of a 7B model
BATCH_TOKENS = {"cpu": 768, "cuda": 4096}

Scores = list[list[float]]  # for every item and class


@torch.inference_mode()
def plain(model: PreTrainedModel, choices: list[Choices], whole: bool = False) -> Scores:
    """Returns log p of every ending given its context, in nats.

    With ``whole`` it returns log p of every prompt given its first token.
    """
    scores = []
    for context, endings, _ in choices:
        start, row = 1 if whole else len(context), []
        for ending in endings:
            ids = torch.tensor([context + ending], device=model.device)
            log_p = (
                model(input_ids=ids, use_cache=False)
                .logits[0, start - 1 : -1]
                .float()
                .log_softmax(1)
            )
            row.append(log_p.gather(1, ids[0, start:, None]).double().sum().item())
        scores.append(row)
    return scores


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    choices: list[Choices],
    batch_size: int | None = None,
    whole: bool = False,
    name: str = "",
) -> Scores:
    """Computes ``plain(model, choices, whole)`` faster.

    Args:
        batch_size: items at a time, by default as many as ``BATCH_TOKENS`` allows.
        name: the label of the progress bar.
    """
    model.eval()
    take = choose_way(model, choices, whole)
    scores: Scores = [[] for _ in choices]
    total = sum(len(item.endings) for item in choices)
    with tqdm(total=total, desc=name, unit=" prompts", disable=None) as bar:
        for rows in batches(
            [len(item.context) for item in choices],
            batch_size,
            BATCH_TOKENS.get(model.device.type, 4096),
        ):
            for i, found in zip(rows, take([choices[i] for i in rows]), strict=True):
                scores[i] = found
                bar.update(len(found))
    return scores


def batches(lengths: list[int], batch_size: int | None, tokens: int) -> Iterator[list[int]]:
    """Yields indices of items of similar lengths, the longest first.

    A batch has ``batch_size`` items, or as many as fit into ``tokens`` including padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        count = batch_size or max(1, tokens // max(1, lengths[order[0]]))
        yield order[:count]
        order = order[count:]


def choose_way(
    model: PreTrainedModel, choices: list[Choices], whole: bool
) -> Callable[[list[Choices]], Scores]:
    """Returns the fastest way that gives the same scores as ``plain``.

    Each way is tried on the longest and the shortest item together. Prints a line for each way that
    does not work.
    """
    lengths = [len(item.context) for item in choices]
    extremes = [choices[lengths.index(pick(lengths))] for pick in (max, min)]
    sample = [
        item._replace(endings=[item.endings[0], max(item.endings, key=len)]) for item in extremes
    ]
    want = torch.tensor(plain(model, sample, whole), dtype=torch.float64)
    scorer = Scorer(model, whole)
    stem = common_start([item.context for item in choices])[: min(lengths) - 1]
    ways = {
        "sharing what all items share": lambda batch: scorer.shared(batch, stem),
        "sharing what the classes share": scorer.shared,
        "batching": scorer.padded,
    }
    if len(stem) < STEM:
        del ways["sharing what all items share"]
    tolerance = max(1e-3, 16 * torch.finfo(model.dtype).eps)
    for name, way in ways.items():
        try:
            gap = (torch.tensor(way(sample), dtype=torch.float64) - want).abs().max().item()
            if gap <= tolerance + tolerance / 100 * want.abs().max().item():
                return way
            reason = f"log-likelihoods move by {gap:.2g}"
        except Exception as error:
            # architectures without a cache, or with another kind of cache, raise errors of any type
            reason = first_line(error)
        say(f"{type(model).__name__}: {name} does not work here ({reason}); done without")
    return lambda batch: plain(model, batch, whole)


def common_start(rows: list[list[int]]) -> list[int]:
    """Returns the tokens that all rows begin with."""
    least, most = min(rows), max(rows)  # every other row lies between and shares what they share
    return least[
        : next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))
    ]


class Scorer:
    """Scores with one model in faster ways than ``plain``."""

    def __init__(self, model: PreTrainedModel, whole: bool):
        self.whole, self.device = whole, model.device
        self.head: Head | None = None
        self.body: nn.Module = model
        # for another kind of output layer, the model itself computes the logits of all tokens
        with contextlib.suppress(ValueError):
            self.head, self.body = head_of(model), body_of(model)
        self.takes_positions = "position_ids" in inspect.signature(self.body.forward).parameters
        self.started: tuple[list[int], Any, Tensor, Tensor] | None = None

    def padded(self, batch: list[Choices]) -> Scores:
        """Scores whole prompts side by side, padded on the right."""
        prompts = [item.context + ending for item in batch for ending in item.endings]
        starts = torch.tensor(
            [1 if self.whole else len(item.context) for item in batch for _ in item.endings]
        )
        ids, mask = self._pad(prompts)
        states, _ = self._run(ids, mask, use_cache=False)
        scored = mask[:, 1:].bool() & (torch.arange(1, ids.shape[1]) >= starts[:, None]).to(
            self.device
        )
        sums = iter(self._sums(states[:, :-1], ids[:, 1:], scored).tolist())
        return [[next(sums) for _ in item.endings] for item in batch]

    def shared(self, batch: list[Choices], stem: list[int] = []) -> Scores:  # noqa: B006
        """Scores the contexts once, then each class's ending from their cache.

        The contexts are padded on the left. They follow ``stem``, the tokens that all of them begin
        with, which is also computed once.
        """
        ids, own = self._pad([item.context[len(stem) :] for item in batch], left=True)
        positions = len(stem) + (own.cumsum(1) - 1).clamp_min(0)
        mask = torch.cat([own.new_ones(len(batch), len(stem)), own], 1)
        cache, before = None, torch.zeros(len(batch), dtype=torch.float64, device=self.device)
        if stem:
            cache, total, log_p = self._after(stem)
            cache.batch_repeat_interleave(len(batch))
            if self.whole:
                # the first token of each row after its padding
                first = ids.gather(1, (own == 0).sum(1, keepdim=True)).squeeze(1)
                before += total + log_p[first]
        states, cache = self._run(ids, mask, positions, past_key_values=cache, use_cache=True)
        if self.whole:
            before += self._sums(states[:, :-1], ids[:, 1:], own[:, :-1].bool())
        log_p = self._log_p(states[:, -1])  # [items, V]
        scores = [
            [total + log_p[i, ending[0]].item() for ending in item.endings]
            for i, (item, total) in enumerate(zip(batch, before.tolist(), strict=True))
        ]
        rest = [
            (i, c)
            for i, item in enumerate(batch)
            for c, ending in enumerate(item.endings)
            if len(ending) > 1
        ]
        if rest:
            owners = torch.tensor([i for i, _ in rest], device=self.device)
            cache.batch_select_indices(owners)
            ids, own = self._pad([batch[i].endings[c] for i, c in rest])
            lengths = torch.tensor([[len(batch[i].context)] for i, _ in rest], device=self.device)
            positions = lengths + torch.arange(ids.shape[1], device=self.device)
            states, _ = self._run(
                ids,
                torch.cat([mask[owners], own], 1),
                positions,
                past_key_values=cache,
                use_cache=True,
            )
            more = self._sums(states[:, :-1], ids[:, 1:], own[:, 1:].bool()).tolist()
            for (i, c), log_p_rest in zip(rest, more, strict=True):
                scores[i][c] += log_p_rest
        return scores

    def _after(self, stem: list[int]) -> tuple[Any, Tensor, Tensor]:
        """Returns what the model computes for the stem.

        Returns:
            A copy of the cache after the stem, the log p of the stem's tokens [], and the log p of
            every token that may follow [V].
        """
        if self.started is None or self.started[0] != stem:
            ids, mask = self._pad([stem])
            states, cache = self._run(ids, mask, use_cache=True)
            total = self._sums(states[:, :-1], ids[:, 1:], mask[:, 1:].bool())[0]
            self.started = stem, cache, total, self._log_p(states[:, -1])[0]
        return copy.deepcopy(self.started[1]), *self.started[2:]

    def _pad(self, rows: list[list[int]], left: bool = False) -> tuple[Tensor, Tensor]:
        """Returns ids and mask [rows, longest]. Padding is an ordinary token behind a mask."""
        longest = max(map(len, rows))
        ids = [
            [0] * (longest - len(row)) + row if left else row + [0] * (longest - len(row))
            for row in rows
        ]
        gaps = torch.tensor([longest - len(row) for row in rows])[:, None]
        place = torch.arange(longest)
        mask = place >= gaps if left else place < longest - gaps
        return torch.tensor(ids, device=self.device), mask.long().to(self.device)

    def _run(
        self, ids: Tensor, mask: Tensor, positions: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Any]:
        """Returns the output layer's input [B, T, H] and the cache.

        If the output layer is not known, logits take the place of its input.
        """
        if positions is not None and self.takes_positions:
            options["position_ids"] = positions
        out = self.body(input_ids=ids, attention_mask=mask, return_dict=True, **options)
        return out[0], out.past_key_values if options["use_cache"] else None

    def _log_p(self, states: Tensor) -> Tensor:  # [N, H] -> [N, V] float32
        logits = states if self.head is None else logits_of(states, self.head)
        return logits.float().log_softmax(1)

    def _sums(
        self,
        states: Tensor,  # [B, T, H]
        targets: Tensor,  # [B, T]
        scored: Tensor,  # [B, T]
    ) -> Tensor:  # [B] float64
        """Returns the sum of log p over the scored tokens of each row."""
        picked = [
            self._log_p(rows).gather(1, wanted[:, None]).squeeze(1)
            for rows, wanted in zip(
                states[scored].split(LOGIT_ROWS), targets[scored].split(LOGIT_ROWS), strict=True
            )
        ]
        owners = scored.nonzero()[:, 0]
        sums = torch.zeros(len(scored), dtype=torch.float64, device=states.device)
        return sums.index_add_(0, owners, torch.cat(picked).double())
