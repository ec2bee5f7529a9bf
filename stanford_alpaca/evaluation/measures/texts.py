"""Measures of responses as texts: against their references, and by themselves.

White space separates words.
"""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np

from stanford_alpaca.evaluation.intervals import Items, Replicates, mean_of

# our names and rouge-score's
ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


def against_references(
    responses: list[list[str]],  # [seeds][n]
    references: list[str],  # [n]
) -> dict[str, Items]:
    """Returns exact match and F1 of ROUGE (Lin 2004).

    They are means over texts, and the value of a text is a mean over its seeds. Exact match ignores
    leading and trailing white space.
    """
    from rouge_score.rouge_scorer import RougeScorer  # takes a second to import

    scorer = RougeScorer(list(ROUGE.values()), tokenizer=_Words())
    found = {name: np.zeros(len(references)) for name in ("exact_match", *ROUGE)}
    for texts in responses:
        for i, (text, wanted) in enumerate(zip(texts, references, strict=True)):
            found["exact_match"][i] += exact_match([text], [wanted])
            scores = scorer.score(wanted, text)
            for name, theirs in ROUGE.items():
                found[name][i] += scores[theirs].fmeasure
    return {name: mean_of(values / len(responses)) for name, values in found.items()}


def by_themselves(responses: list[list[str]]) -> dict[str, Items | Replicates]:  # [seeds][n]
    """Returns measures of variety, repetition and length.

    Distinct-2 and self-BLEU are measures of the whole set, with a value per seed.
    """
    return {
        "distinct_2": Replicates(np.array([distinct(texts, 2) for texts in responses])),
        "self_bleu": Replicates(np.array([self_bleu(texts) for texts in responses])),
        "repetition_4": mean_of(
            np.mean([[repetition(text, 4) for text in texts] for texts in responses], axis=0)
        ),
        "length": length(responses),
    }


def length(responses: list[list[str]]) -> Items:  # [seeds][n]
    """Returns the mean number of words."""
    return mean_of(np.mean([[len(text.split()) for text in texts] for texts in responses], axis=0))


def equal_in_words(
    references: list[str],  # [n]
    responses: dict[str, list[list[str]]],  # of each model, [seeds][n]
) -> tuple[list[str], dict[str, list[list[str]]]]:
    """Cuts all texts of a record to as many words as the shortest of them has."""
    every = [references, *(texts for of in responses.values() for texts in of)]
    least = [min(len(text.split()) for text in texts) for texts in zip(*every, strict=True)]

    def cut(texts: list[str]) -> list[str]:
        return [
            first_words(text, words) if words else ""
            for text, words in zip(texts, least, strict=True)
        ]

    return cut(references), {name: [cut(texts) for texts in of] for name, of in responses.items()}


def exact_match(responses: list[str], references: list[str]) -> float:
    """Returns the share of responses that equal the reference.

    Leading and trailing white space is ignored.
    """
    equal = sum(
        response.strip() == text.strip()
        for response, text in zip(responses, references, strict=True)
    )
    return equal / len(references)


def distinct(texts: list[str], n: int) -> float:
    """Returns the share of different n-grams among the n-grams of all texts (Li et al. 2016).

    It is NaN if there are none.
    """
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else np.nan


def repetition(text: str, n: int) -> float:
    """Returns the share of a text's n-grams that repeat an earlier one in it (Welleck et al. 2020).

    It is 0 if the text is too short for any.
    """
    grams = list(_ngrams(text, n))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(texts: list[str]) -> float:
    """Returns the mean BLEU of each text with all others as its references (Zhu et al. 2018).

    It lies between 0 and 1, and is NaN for fewer than two texts. In linear time it computes, with
    sacrebleu's BLEU:

        np.mean([BLEU(effective_order=True).sentence_score(text, others).score / 100])

    A text's n-gram is matched at most as often as it occurs in any one of the others. The two
    largest counts over all texts give that limit.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.helpers import extract_all_word_ngrams

    if len(texts) < 2:
        return np.nan
    bleu = BLEU(effective_order=True)
    rows = [extract_all_word_ngrams(bleu.tokenizer(text.rstrip()), 1, 4) for text in texts]
    most: dict[tuple, tuple[int, int]] = {}
    for counts, _ in rows:
        for gram, count in counts.items():
            first, second = most.get(gram, (0, 0))
            most[gram] = (count, first) if count > first else (first, max(second, count))
    lengths = Counter(length for _, length in rows)
    scores = []
    for counts, length in rows:
        correct, total = [0] * 4, [0] * 4
        for gram, count in counts.items():
            first, second = most[gram]
            correct[len(gram) - 1] += min(count, second if count == first else first)
            total[len(gram) - 1] += count
        others = (
            other for other, texts_of_it in lengths.items() if other != length or texts_of_it > 1
        )
        nearest = min(others, key=lambda other: (abs(other - length), other))
        scores.append(
            BLEU.compute_bleu(
                correct, total, length, nearest, smooth_method="exp", effective_order=True
            ).score
        )
    return float(np.mean(scores)) / 100


def first_words(text: str, words: int) -> str:
    """Returns the text up to the end of this many words.

    If it has fewer, the whole text is returned.
    """
    ends = [match.end() for match in islice(re.finditer(r"\S+", text), words)]
    return text[: ends[-1]] if len(ends) == words else text


class _Words:
    """Like rouge-score's own tokenizer for ASCII, but keeps letters and digits of all scripts."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def _ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    words = text.split()
    return zip(*(words[start:] for start in range(n)), strict=False)
