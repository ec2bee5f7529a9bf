"""Measures of texts equal values computed by hand, and self-BLEU equals sacrebleu's."""

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from stanford_alpaca.evaluation.measures.texts import (
    against_references,
    by_themselves,
    distinct,
    equal_in_words,
    exact_match,
    repetition,
    self_bleu,
)


def test_rouge_and_exact_match_by_hand():
    references = ["the cat sat on the mat", "a b c", "x"]
    greedy = ["the cat lay on the mat", " a b c\n", "y"]
    found = {
        name: items.sums[:, 0] for name, items in against_references([greedy], references).items()
    }
    assert found["exact_match"].tolist() == [0, 1, 0]
    assert found["rouge_1"] == pytest.approx([5 / 6, 1, 0])
    assert found["rouge_2"] == pytest.approx([3 / 5, 1, 0])  # shared: the cat, on the, the mat
    assert found["rouge_l"] == pytest.approx([5 / 6, 1, 0])
    swapped = against_references([["on the mat sat the cat"]], references[:1])
    assert swapped["rouge_1"].value == 1 and swapped["rouge_l"].value == pytest.approx(1 / 2)
    seeds = against_references([["a b c"], ["q"]], ["a b c"])
    assert (seeds["rouge_l"].value, seeds["exact_match"].value) == (0.5, 0.5)


def test_rouge_is_rouge_scores_own_on_ascii_and_knows_other_letters():
    wanted, text = "It's 3.5 km, she SAID: no_one's-home!", "Its 3 km she said no one is home"
    theirs = RougeScorer(["rouge1", "rougeL"]).score(wanted, text)
    ours = against_references([[text]], [wanted])
    assert (
        ours["rouge_1"].value == theirs["rouge1"].fmeasure
        and ours["rouge_l"].value == theirs["rougeL"].fmeasure
    )
    assert against_references([["über Straße"]], ["Über die Straße"])[
        "rouge_1"
    ].value == pytest.approx(0.8)


def test_distinct_repetition_and_length_by_hand():
    assert distinct(["a b a b", "a b"], 2) == 2 / 4  # bigrams: ab ba ab, ab
    assert np.isnan(distinct(["a", ""], 2))
    assert repetition("a b a b a b", 4) == pytest.approx(1 / 3)  # 4-grams: abab baba abab
    assert (repetition("a b c", 4), repetition("", 4)) == (0, 0)
    found = by_themselves([["a b a b a b", "c"], ["a b", "c d"]])
    assert found["repetition_4"].sums[:, 0] == pytest.approx([1 / 6, 0])
    assert found["length"].sums[:, 0].tolist() == [4, 1.5] and found["length"].value == 2.75
    assert found["distinct_2"].values.tolist() == [2 / 5, 1]


def test_self_bleu_is_sacrebleus_of_each_text_against_the_others():
    texts = [
        "the cat sat on the mat.",
        "the cat sat on a mat",
        "a dog, a dog",
        "a dog a dog a dog barks",
        "",
        "cat",
        "cat",
    ]
    bleu = BLEU(effective_order=True)
    plain = [
        bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score / 100
        for i, text in enumerate(texts)
    ]
    assert self_bleu(texts) == pytest.approx(np.mean(plain)) and 0.2 < np.mean(plain) < 0.9
    assert self_bleu(["a b c d"] * 3) == pytest.approx(1) and np.isnan(self_bleu(["a"]))


def test_exact_match():
    assert exact_match([" a", "b", "c\n"], ["a", "x", "c"]) == pytest.approx(2 / 3)


def test_texts_of_a_record_are_cut_to_equal_words():
    references = ["a b c d", "e f", "g h"]
    responses = {"x": [["a b  c", "e f g", "h"], ["a b", "e", "h i"]], "y": [["q", "r s t", ""]]}
    cut_references, cut = equal_in_words(references, responses)
    assert cut_references == ["a", "e", ""]
    assert cut == {"x": [["a", "e", ""], ["a", "e", ""]], "y": [["q", "r", ""]]}
    only = {"x": responses["x"][:1]}
    assert equal_in_words(references, only) == (
        ["a b c", "e f", "g"],
        {"x": [["a b  c", "e f", "h"]]},
    )
