"""Co-occurrence counts and mutual information equal plain dictionaries.

The rows follow what the text says.
"""

import math
import random
from collections import Counter

import numpy as np
import pytest
from scipy.sparse import csr_array

from stanford_alpaca.cost.cooccurrence import TextSettings, count_pairs, embed, positive_pmi
from stanford_alpaca.errors import UserError

DOCUMENTS = [[1, 2, 3, 1, 4], [2], [], [5, 1, 2, 2, 3, 3, 1], [4, 5]]


def naive_pairs(documents, window):
    pairs = Counter()
    for document in documents:
        for i, token in enumerate(document):
            for j, other in enumerate(document):
                if i != j and abs(i - j) <= window:
                    pairs[token, other] += 1 / abs(i - j)
    return pairs


def naive_pmi(pairs, shift):
    words, contexts, total = Counter(), Counter(), sum(pairs.values())
    for (word, context), weight in pairs.items():
        words[word] += weight
        contexts[context] += weight
    smooth = {context: weight**0.75 for context, weight in contexts.items()}
    pmi = {
        (word, context): math.log(
            weight / total / (words[word] / total * smooth[context] / sum(smooth.values())) / shift
        )
        for (word, context), weight in pairs.items()
    }
    return {pair: value for pair, value in pmi.items() if value > 0}


def as_dict(matrix):
    table = matrix.tocoo()
    return {
        (int(row), int(column)): value
        for row, column, value in zip(*table.coords, table.data, strict=True)
    }


@pytest.mark.parametrize(
    "chunks", [[DOCUMENTS], [DOCUMENTS[:2], DOCUMENTS[2:]], [[d] for d in DOCUMENTS]]
)
@pytest.mark.parametrize("window", [1, 3, 9])
def test_counts_and_mutual_information_equal_dictionaries(chunks, window):
    pairs, counts = count_pairs(chunks, 7, window)
    want = naive_pairs(DOCUMENTS, window)
    assert as_dict(pairs) == pytest.approx(dict(want))
    assert counts.tolist() == [0, 4, 4, 3, 2, 2, 0]
    for shift in (1, 2):
        assert as_dict(positive_pmi(pairs, shift)) == pytest.approx(naive_pmi(want, shift))
    assert 0 < len(naive_pmi(want, 2)) < len(want)


def cosine(rows, a, b):
    return rows[a] @ rows[b] / np.linalg.norm(rows[a]) / np.linalg.norm(rows[b])


@pytest.fixture
def company():
    """Returns pair and token counts of random documents over 15 tokens.

    Tokens 10 and 11 stand between tokens 1..4, and token 12 between 5..8. Token 13 occurs once, and
    token 14 never.
    """
    rng = random.Random(0)
    documents = [[rng.randint(1, 4), rng.choice([10, 11]), rng.randint(1, 4)] for _ in range(200)]
    documents += [[rng.randint(5, 8), 12, rng.randint(5, 8)] for _ in range(200)]
    return count_pairs([[*documents, [1, 13]]], 15, 2)


def test_tokens_in_the_same_company_are_near(company):
    pairs, counts = company
    rows, explained = embed(pairs, counts > 0, TextSettings(width=4))
    assert rows.dtype == np.float32 and 0.5 < explained <= 1
    assert cosine(rows, 10, 11) > 0.9
    assert abs(cosine(rows, 10, 12)) < 0.1 and abs(cosine(rows, 11, 12)) < 0.1
    assert not rows[[0, 9, 14]].any() and rows[13].any()
    assert np.array_equal(rows, embed(pairs, counts > 0, TextSettings(width=4))[0])


def test_all_the_columns_give_back_the_mutual_information(company):
    """The rows are U S^1/2 of all singular values but one.

    Their inner products equal those of a full decomposition cut to as many columns.
    """
    pairs, counts = company
    rows, explained = embed(pairs, counts > 0, TextSettings(width=11))
    u, s, _ = np.linalg.svd(positive_pmi(pairs).toarray())
    assert explained == pytest.approx((s[:11] ** 2).sum() / (s**2).sum())
    want = u[:, :11] * np.sqrt(s[:11])
    np.testing.assert_allclose(rows @ rows.T, want @ want.T, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=0), np.sqrt(s[:11]), rtol=1e-5)


def test_unwanted_tokens_are_nobodys_company(company):
    pairs, counts = company
    rows, _ = embed(pairs, counts >= 2, TextSettings(width=4))
    assert not rows[13].any()
    without = pairs.toarray()
    without[13] = without[:, 13] = 0
    want, _ = embed(csr_array(without), counts >= 1, TextSettings(width=4))
    np.testing.assert_allclose(rows, want, atol=1e-5)


def test_rows_that_the_kept_columns_say_nothing_about_are_zero():
    """Two groups of tokens never meet, and one column holds the stronger group.

    The rows of the other group would be rounding errors, so they must be zero.
    """
    pairs, counts = count_pairs([[[1, 2]] * 50 + [[3, 4]] * 2], 5, 1)
    rows, _ = embed(pairs, counts > 0, TextSettings(width=1))
    assert sorted(rows.any(axis=1).tolist()) == [False, False, False, True, True]


def test_too_little_text():
    pairs, counts = count_pairs([[[1, 2, 3]]], 5, 2)
    with pytest.raises(UserError, match=r"--width 3: the text has [0-3] tokens that stand"):
        embed(pairs, counts > 0, TextSettings(width=3))
    for settings in ({"width": 0}, {"window": 1.5}, {"min_count": -1}, {"shift": "a"}):
        with pytest.raises(UserError, match=f"--{next(iter(settings))}"):
            TextSettings(**settings)
