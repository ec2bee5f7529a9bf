"""Computes the lengths of tokenized data, and what each limit on the length would cost."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from stanford_alpaca.data.report import EMPTY, REFUSED, note_counts
from stanford_alpaca.data.tokenize import IGNORE_INDEX

WHOLE = 2**31 - 1  # a length at which nothing is cut
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
BUDGETS = (128, 256, 512, 1024, 2048, 4096)


def statistics_of(
    encoded: Dataset, max_length: int, budgets: Sequence[int] = BUDGETS
) -> dict[str, Any]:
    """Returns statistics of a source at max_length tokens, and what other lengths would cost.

    Args:
        encoded: rows of ``tokenize.encode_records`` whose examples were not cut.
        budgets: the other lengths, in tokens.
    """
    labels = encoded.data["labels"].combine_chunks()
    lengths = np.diff(labels.offsets.to_numpy())
    trained = labels.values.to_numpy() != IGNORE_INDEX
    position = np.arange(len(trained)) - np.repeat(labels.offsets.to_numpy()[:-1], lengths)
    row = np.repeat(np.arange(len(lengths)), lengths)
    fate, straddling = encoded.data["fate"].to_numpy(), encoded.data["straddling"].to_numpy()

    def cut_at(budget: int) -> dict[str, int]:
        targets = trained & (position > 0) & (position < budget)
        supervised = np.bincount(row[targets], minlength=len(lengths))
        kept = supervised > 0
        return {
            "kept": int(kept.sum()),
            "truncated": int((kept & (lengths > budget)).sum()),
            "tokens": int(np.minimum(lengths, budget)[kept].sum()),
            "straddling": int(straddling[kept].sum()),
            "supervised_tokens": int(supervised.sum()),
        }

    whole, now = cut_at(WHOLE), cut_at(max_length)
    seen = lengths[(fate != EMPTY) & (fate != REFUSED)]
    levels = np.quantile(seen, QUANTILES, method="inverted_cdf") if len(seen) else np.zeros(0)
    named = [f"{level:.0%}" for level in QUANTILES]
    refused = np.flatnonzero(fate == REFUSED)
    return {
        "records": len(encoded),
        **now,
        "dropped": {
            "no_response": int((fate == EMPTY).sum()),
            "prompt_fills_the_length": whole["kept"] - now["kept"],
            "refused_by_the_template": len(refused),
        },
        "notes": note_counts(encoded),
        "first_refusal": f"record {refused[0] + 1}: {encoded[int(refused[0])]['refusal']}"
        if len(refused)
        else "",
        "supervised_share": now["supervised_tokens"] / max(1, now["tokens"]),
        "token_quantiles": dict(zip(named, levels.astype(int).tolist(), strict=False))
        | {"max": int(seen.max(initial=0))},
        "budgets": {
            budget: {
                **cut,
                "supervised_lost": 1
                - cut["supervised_tokens"] / max(1, whole["supervised_tokens"]),
            }
            for budget in sorted({*budgets, max_length})
            for cut in [cut_at(budget)]
        },
    }
