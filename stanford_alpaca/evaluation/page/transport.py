"""The transport view of a model.

For every reference token it holds what the model predicted in its place, how likely, and at what
cost. The emo of a token is sum_i p_i c_i over the vocabulary. The view holds the terms of the
likeliest predictions, and the sum of all others.
"""

from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.tokenize import IGNORE_INDEX, ExampleEncoder
from stanford_alpaca.errors import UserError
from stanford_alpaca.losses.backends import reference
from stanford_alpaca.losses.types import Head
from stanford_alpaca.objective.head import body_of, head_of

TOP = 8  # predictions and neighbours that are shown for a token
COST_ROWS = 256  # tokens whose logits and costs are held at a time


class Tokens(NamedTuple):
    """N supervised tokens as a model predicts them under teacher forcing.

    All tensors hold floats, except for the ids and the rank.
    """

    nll: Tensor  # [N]
    emo: Tensor  # [N] the sum of p c over the vocabulary
    p: Tensor  # [N] probability of the target
    rank: Tensor  # [N] rank of the target among the predictions, from 1 on
    mean_cost: Tensor  # [N] mean over the vocabulary: what a random prediction would cost
    top_ids: Tensor  # [N, k] the likeliest predictions
    top_p: Tensor  # [N, k]
    top_cost: Tensor  # [N, k]
    rest_p: Tensor  # [N] probability of all other predictions
    rest_emo: Tensor  # [N] the sum of p c over all other predictions


def predicted(
    hidden: Tensor,  # [N, H]
    head: Head,
    targets: Tensor,  # [N]
    cost: CostEmbedding,
    top: int = TOP,
) -> Tokens:
    """Returns what the model predicts in place of each target.

    The rest is a sum of its own. It is not computed as a difference.
    """
    logits = reference.logits_of(hidden, head).float()
    stats = reference.token_stats(logits, targets, cost)
    assert stats.log_emo is not None
    p, costs = logits.softmax(1), cost.costs(targets, logits.shape[1]).float()
    top_p, top_ids = p.topk(min(top, p.shape[1]), 1)
    p_target, others = p.gather(1, targets[:, None]), p.scatter(1, top_ids, 0.0)
    return Tokens(
        nll=stats.nll,
        emo=stats.log_emo.exp(),
        p=p_target.squeeze(1),
        rank=(p > p_target).sum(1) + 1,
        mean_cost=costs.mean(1),
        top_ids=top_ids,
        top_p=top_p,
        top_cost=costs.gather(1, top_ids),
        rest_p=others.sum(1),
        rest_emo=(others * costs).sum(1),
    )


@torch.inference_mode()
def view_of(
    name: str,  # the model's name, for messages
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Dataset,  # of any form, with references
    cost: CostEmbedding,
    encode: ExampleEncoder,
    top: int = TOP,
) -> dict[str, Any]:
    """Returns the view as JSON.

    Returns:
        ``records``: a list of tokens for each record (``_shown``).
        ``pieces``: the text of every id that occurs.
        ``neighbours``: for every target the nearest other tokens as [id, cost].
        ``tokens``: how many tokens the vocabulary has.

    Raises:
        UserError: the model's output layer is not understood, or does not fit the cost.
    """
    model.eval()
    try:
        head = head_of(model)
        cost.to(model.device).check(len(head.weight))
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    shown: list[list[dict[str, Any]]] = []
    for record in records:
        ids, texts = targets_of(encode, dict(record))
        if not texts:
            shown.append([])
            continue
        places = torch.tensor(list(texts), device=model.device)
        row = torch.tensor([ids], device=model.device)
        hidden = body_of(model)(input_ids=row, use_cache=False)[0][0, places - 1]
        found = [
            predicted(states, head, targets, cost, top)
            for states, targets in zip(
                hidden.split(COST_ROWS), row[0, places].split(COST_ROWS), strict=True
            )
        ]
        tokens = Tokens(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        shown.append(_shown(tokens, row[0, places].tolist(), list(texts.values())))
    near = neighbours(
        {token["id"] for tokens in shown for token in tokens}, cost, len(head.weight), top
    )
    used = {
        i
        for tokens in shown
        for token in tokens
        for i in [token["id"], *(row[0] for row in token["top"])]
    }
    used |= {i for rows in near.values() for i, _ in rows}
    return {
        "tokens": len(head.weight),
        "records": shown,
        "pieces": {i: piece_of(tokenizer, i) for i in sorted(used)},
        "neighbours": near,
    }


def targets_of(encode: ExampleEncoder, record: dict) -> tuple[list[int], dict[int, str]]:
    """Returns the token ids of a record, and the text of every supervised position.

    The texts include white space that belongs to no token. The text is empty for the end of a
    response, and for every part of a character but the first.
    """
    text, _, offsets, row = encode.in_parts(record)
    texts, end = {}, None
    for place, label in enumerate(row["labels"]):
        if label == IGNORE_INDEX or place == 0:
            continue
        start, stop = offsets[place]
        # whether another response of a conversation begins
        again = end is not None and row["labels"][place - 1] == IGNORE_INDEX
        texts[place] = ("\n\n" if again else "") + text[
            start if again or end is None else end : stop
        ]
        if label == encode.encoder.eos_id:
            texts[place] = ""
        end = stop
    return row["input_ids"], texts


def neighbours(
    targets: set[int], cost: CostEmbedding, vocab_size: int, top: int = TOP
) -> dict[int, list[list[float]]]:
    """Returns for every target the ids that cost least to move to it, with their cost.

    The nearest come first. A target is not its own neighbour.
    """
    near = {}
    device = "cpu" if cost.rows is None else cost.rows.device
    for part in torch.tensor(sorted(targets), dtype=torch.long, device=device).split(COST_ROWS):
        costs = cost.costs(part, vocab_size).scatter_(1, part[:, None], torch.inf)
        values, ids = costs.topk(min(top, vocab_size - 1), 1, largest=False)
        for target, row, prices in zip(part.tolist(), ids.tolist(), values.tolist(), strict=True):
            near[target] = [[i, rounded(price)] for i, price in zip(row, prices, strict=True)]
    return near


def piece_of(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """Returns a token as text, with the space it begins with.

    A token that is no text by itself (a part of a character) is returned as its name.
    """
    name = str(tokenizer.convert_ids_to_tokens(token_id) or f"[{token_id}]")
    text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    if not text or "\ufffd" in text:
        return name
    return f" {text}" if name.startswith("\u2581") and not text.startswith(" ") else text


def rounded(value: float) -> float:
    """Rounds to six significant digits: enough for the page, in a third of the characters."""
    return float(f"{value:.6g}")


def _shown(tokens: Tokens, targets: list[int], texts: list[str]) -> list[dict[str, Any]]:
    """Returns one dict per token.

    ``top`` has [id, p, cost] for each prediction, ``rest`` has [p, sum of p c] of all others.
    """
    plain = [[rounded(value) for value in column.tolist()] for column in tokens[:5]]
    tops = zip(
        tokens.top_ids.tolist(), tokens.top_p.tolist(), tokens.top_cost.tolist(), strict=True
    )
    rests = zip(tokens.rest_p.tolist(), tokens.rest_emo.tolist(), strict=True)
    rows = zip(targets, texts, *plain, tops, rests, strict=True)
    return [
        {
            "id": target,
            "text": text,
            "nll": nll,
            "emo": emo,
            "p": p,
            "rank": int(rank),
            "mean_cost": mean,
            "top": [[i, rounded(q), rounded(c)] for i, q, c in zip(*top, strict=True)],
            "rest": [rounded(value) for value in rest],
        }
        for target, text, nll, emo, p, rank, mean, top, rest in rows
    ]
