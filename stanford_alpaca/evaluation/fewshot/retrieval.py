"""Chooses the examples of each test item.

They are drawn at random, the same for all items, or the most similar training records. The most
similar one comes last.
"""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stanford_alpaca.console import quiet_hub
from stanford_alpaca.errors import UserError, first_line
from stanford_alpaca.evaluation.fewshot.prompting import encode
from stanford_alpaca.evaluation.fewshot.scoring import batches
from stanford_alpaca.flags import check_packages
from stanford_alpaca.models.load import ModelSource, load_body
from stanford_alpaca.objective.head import body_of

SIMILAR = ("sentence", "tfidf", "bm25", "model")  # these compare texts; the others draw
RETRIEVERS = (*SIMILAR, "random", "fixed")
ENCODER = "sentence-transformers/all-mpnet-base-v2"
TEST_ROWS = 256  # test items compared with the whole training set at a time
TOKENS = 4096  # in a batch of texts

# [N, D] of texts, dense or sparse: the similarity of two texts is the product of their rows
Features = Any
# from training texts and test texts
Featurize = Callable[[list[str], list[str]], tuple[Features, Features]]


def draw(retriever: str, seed: int, items: int, size: int, shots: int) -> list[list[int]]:
    """Draws examples out of ``size`` for each item.

    ``random`` draws for each item separately, ``fixed`` once for all.
    """
    if retriever == "fixed":
        return [np.random.default_rng(seed).choice(size, shots, replace=False).tolist()] * items
    return [
        np.random.default_rng([seed, item]).choice(size, shots, replace=False).tolist()
        for item in range(items)
    ]


def draw_pool(seed: int, size: int, pool: int) -> np.ndarray:  # [pool]
    """Draws the training records among which the nearest are searched."""
    return np.sort(np.random.default_rng(seed).choice(size, pool, replace=False))


def nearest_examples(
    train: Features, test: Features, shots: int, pool: np.ndarray | None = None
) -> list[list[int]]:
    """Returns the ``shots`` most similar training rows for every test row, the most similar last.

    With a ``pool``, only its rows are compared. Of equally similar rows the first are taken.
    """
    places = np.arange(train.shape[0]) if pool is None else pool
    keys, chosen = train[places], []
    for start in range(0, test.shape[0] if shots else 0, TEST_ROWS):
        found = test[start : start + TEST_ROWS] @ keys.T
        for row in found.toarray() if hasattr(found, "toarray") else found:
            least = np.partition(row, -shots)[-shots]
            near = np.flatnonzero(row >= least)
            chosen.append(
                places[near[np.argsort(-row[near], kind="stable")[:shots]]][::-1].tolist()
            )
    return chosen if shots else [[]] * test.shape[0]


def tfidf(train: list[str], test: list[str]) -> tuple[Features, Features]:
    """Returns TF-IDF features of words and pairs of words. Their product is the cosine."""
    check_packages("--retriever tfidf", "sklearn")
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    return vectors.fit_transform(train), vectors.transform(test)


def bm25(
    train: list[str], test: list[str], k1: float = 1.2, b: float = 0.75
) -> tuple[Features, Features]:
    """Returns features of words whose product is Okapi BM25.

    The idf is log(1 + (N - n + 0.5) / (n + 0.5)), as in Lucene. It is always positive.
    """
    check_packages("--retriever bm25", "sklearn")
    from sklearn.feature_extraction.text import CountVectorizer

    words = CountVectorizer(token_pattern=r"(?u)\b\w+\b")
    counts = words.fit_transform(train).astype(np.float64).tocoo()
    lengths = np.bincount(counts.row, counts.data, len(train))
    frequency = np.bincount(counts.col, minlength=counts.shape[1])
    idf = np.log1p((len(train) - frequency + 0.5) / (frequency + 0.5))
    norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))
    counts.data = idf[counts.col] * counts.data * (k1 + 1) / (counts.data + norm[counts.row])
    return counts.tocsr(), words.transform(test)


def load_encoder(name: str) -> Featurize:
    """Returns a function that computes sentence embeddings of unit length.

    Raises:
        UserError: the package is not installed, or the encoder cannot be loaded.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise UserError(
            "--retriever sentence needs sentence-transformers: "
            "pip install sentence-transformers, or take tfidf"
        )
    from sentence_transformers import SentenceTransformer  # takes seconds to import

    try:
        with quiet_hub():
            model = SentenceTransformer(name, model_kwargs={"use_safetensors": True})
            if hasattr(model[0], "auto_model"):
                load_body(ModelSource(name))  # raises an error if weights are missing
    except Exception as error:  # not found, no network, an unknown kind of model
        raise UserError(
            f"--encoder {name}: cannot be loaded ({first_line(error)}); "
            "give a folder, or take tfidf"
        ) from None

    def features(texts: list[str]) -> np.ndarray:
        shown = sys.stderr.isatty()
        return model.encode(texts, normalize_embeddings=True, show_progress_bar=shown)

    return lambda train, test: (features(train), features(test))


def means_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Featurize:
    """Returns a function that computes embeddings with the evaluated model itself.

    An embedding is the mean of the last hidden states over a text's tokens, scaled to unit length.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def features(texts: list[str]) -> np.ndarray:
        means = embed_texts(model, tokenizer, texts, positions, use_cache=False)
        return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)

    return lambda train, test: (features(train), features(test))


@torch.inference_mode()
def embed_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    positions: int | None,
    last: bool = False,
    **options: Any,  # for the model
) -> np.ndarray:  # [N, D] float32
    """Returns the mean of the last hidden states over a text's first ``positions`` tokens.

    With ``last`` it returns the state at the last of these tokens.
    """
    # an empty text consists of this token
    first_token = next(
        (i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None), 0
    )
    rows = [row[:positions] or [first_token] for row in encode(tokenizer, texts)]
    found = [np.empty(0)] * len(rows)
    order = list(batches([*map(len, rows)], None, TOKENS))
    for batch in tqdm(order, desc="Embedding", disable=None):
        longest = len(rows[batch[0]])
        ids = torch.tensor(
            [rows[i] + [0] * (longest - len(rows[i])) for i in batch], device=model.device
        )
        lengths = torch.tensor([len(rows[i]) for i in batch], device=model.device)
        place = torch.arange(longest, device=model.device)
        mask = (place < lengths[:, None]).long()
        states = body_of(model)(input_ids=ids, attention_mask=mask, **options)[0].float()
        kept = (place == lengths[:, None] - 1) if last else mask / lengths[:, None]
        for i, vector in zip(batch, (states * kept[..., None]).sum(1).cpu().numpy(), strict=True):
            found[i] = vector
    return np.stack(found)
