"""Choosing few-shot examples: the nearest by similarities computed by hand, or drawn by seed."""

import math
import sys

import numpy as np
import pytest

from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.fewshot.retrieval import (
    bm25,
    draw,
    draw_pool,
    load_encoder,
    means_of,
    nearest_examples,
    tfidf,
)
from stanford_alpaca.generation.responses import load_for_generation
from stanford_alpaca.models.load import ModelSource

TRAIN = [
    "the cat sat",
    "a dog barked loudly",
    "the cat sat on the mat",
    "stocks fell on monday",
    "cats",
]


def test_the_nearest_stands_last_and_of_equals_the_first_is_taken():
    train = np.array([[0.1, 0], [0.9, 0], [0.5, 0], [0.5, 0], [0, 1]])
    test = np.array([[1.0, 0], [0, 1]])
    assert nearest_examples(train, test, 2) == [[2, 1], [0, 4]]
    assert nearest_examples(train, test, 3, pool=np.array([0, 2, 3])) == [[0, 3, 2], [3, 2, 0]]
    assert nearest_examples(train, test, 0) == [[], []]


@pytest.mark.parametrize("featurize", [tfidf, bm25])
def test_words_in_common_make_texts_similar(featurize):
    chosen = nearest_examples(*featurize(TRAIN, ["the cat sat on the mat", "stocks on tuesday"]), 2)
    assert chosen[0] == [0, 2] and chosen[1][-1] == 3


def test_bm25_by_its_formula():
    train, test = bm25(["a b b", "a c"], ["b b c"])
    found = (test @ train.T).toarray()
    idf = math.log(1 + 1.5 / 1.5)  # one of the two texts has the word

    def weight(count, length):
        return idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * length / 2.5))

    assert found[0] == pytest.approx([2 * weight(2, 3), weight(1, 2)])


def test_the_models_own_states(root):
    import torch

    model, tokenizer = load_for_generation(ModelSource(str(root / "data" / "tiny-base")))
    train, test = means_of(model, tokenizer)(TRAIN, ["a dog barked", ""])
    assert nearest_examples(train, test[:1], 1) == [[1]]
    with torch.no_grad():
        mean = model.model(**tokenizer(TRAIN[0], return_tensors="pt"))[0][0].mean(0)
    assert train[0] == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)


def test_sentence_embeddings_of_a_local_encoder(root, tmp_path):
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer

    folder = str(tmp_path / "encoder")
    words = Tokenizer.from_file(str(root / "data" / "tiny-base" / "tokenizer.json"))
    sentence_transformers.SentenceTransformer(
        modules=[StaticEmbedding(words, embedding_dim=16)]
    ).save(str(tmp_path / "encoder"))
    train, test = load_encoder(folder)(TRAIN, [TRAIN[3]])
    assert nearest_examples(train, test, 1) == [[3]]
    assert np.linalg.norm(train, axis=1) == pytest.approx(np.ones(5), abs=1e-5)


def test_an_encoder_that_cannot_be_had(tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"--encoder .*none: cannot be loaded .*; give a folder, or take tfidf"
    ):
        load_encoder(str(tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match="needs sentence-transformers: pip install"):
        load_encoder("any")


def test_seeds_draw_others_and_the_same_seed_the_same():
    drawn = draw("random", 0, 4, 50, 8)
    assert drawn == draw("random", 0, 4, 50, 8) != draw("random", 1, 4, 50, 8)
    assert len({tuple(row) for row in drawn}) == 4 and all(len({*row}) == 8 for row in drawn)
    assert drawn[:2] == draw("random", 0, 2, 50, 8)  # --limit does not change the examples
    fixed = draw("fixed", 0, 3, 50, 8)
    assert fixed == [fixed[0]] * 3 and fixed != draw("fixed", 1, 3, 50, 8)
    pools = [draw_pool(seed, 50, 10).tolist() for seed in (0, 0, 1)]
    assert pools[0] == pools[1] != pools[2] and sorted({*pools[2]}) == pools[2]
