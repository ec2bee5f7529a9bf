"""Chooses each test item's examples: at random, the same for all, or the most similar training records, the nearest last."""

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stanford_alpaca.console import quiet_hub
from stanford_alpaca.errors import UserError, first_line
from stanford_alpaca.evaluation.fewshot.prompting import encode
from stanford_alpaca.evaluation.fewshot.scoring import batches
from stanford_alpaca.models.load import load_body
from stanford_alpaca.objective.head import body_of

SIMILAR = ("sentence", "tfidf", "bm25", "model")  # they compare texts; those below draw
RETRIEVERS = (*SIMILAR, "random", "fixed")
ENCODER = "sentence-transformers/all-mpnet-base-v2"
ROWS = 256  # test items that are compared with the whole training set at a time
TOKENS = 4096  # of a batch of texts

Features = Any  # [N, D] of texts, an array or a sparse one: the similarity of two texts is the product of their rows
Featurize = Callable[
    [list[str], list[str]], tuple[Features, Features]
]  # training texts, test texts


def draw(retriever: str, seed: int, items: int, size: int, shots: int) -> list[list[int]]:
    """Examples out of ``size`` for each item: ``random`` draws for each by itself, ``fixed`` once for all."""
    if retriever == "fixed":
        return [np.random.default_rng(seed).choice(size, shots, replace=False).tolist()] * items
    return [
        np.random.default_rng([seed, item]).choice(size, shots, replace=False).tolist()
        for item in range(items)
    ]


def draw_pool(seed: int, size: int, pool: int) -> np.ndarray:  # [pool]
    """The training records among which the nearest are looked for."""
    return np.sort(np.random.default_rng(seed).choice(size, pool, replace=False))


def nearest_examples(
    train: Features, test: Features, shots: int, pool: np.ndarray | None = None
) -> list[list[int]]:
    """For every test row the ``shots`` most similar training rows (of the pool), the most similar last; of equals the first."""
    places = np.arange(train.shape[0]) if pool is None else pool
    keys, chosen = train[places], []
    for start in range(0, test.shape[0] if shots else 0, ROWS):
        found = test[start : start + ROWS] @ keys.T
        for row in found.toarray() if hasattr(found, "toarray") else found:
            least = np.partition(row, -shots)[-shots]
            near = np.flatnonzero(row >= least)
            chosen.append(
                places[near[np.argsort(-row[near], kind="stable")[:shots]]][::-1].tolist()
            )
    return chosen if shots else [[]] * test.shape[0]


def tfidf(train: list[str], test: list[str]) -> tuple[Features, Features]:
    """Words and pairs of words by TF-IDF; the product is the cosine."""
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    return vectors.fit_transform(train), vectors.transform(test)


def bm25(
    train: list[str], test: list[str], k1: float = 1.2, b: float = 0.75
) -> tuple[Features, Features]:
    """Okapi BM25 of words, with the always positive idf log(1 + (N - n + 0.5) / (n + 0.5)), as Lucene has it."""
    words = CountVectorizer(token_pattern=r"(?u)\b\w+\b")
    counts = words.fit_transform(train).astype(np.float64).tocoo()
    lengths = np.bincount(counts.row, counts.data, len(train))
    frequency = np.bincount(counts.col, minlength=counts.shape[1])
    idf = np.log1p((len(train) - frequency + 0.5) / (frequency + 0.5))
    norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))
    counts.data = idf[counts.col] * counts.data * (k1 + 1) / (counts.data + norm[counts.row])
    return counts.tocsr(), words.transform(test)


def load_encoder(name: str) -> Featurize:
    """Sentence embeddings of unit length. Raises UserError if the package or the encoder cannot be had."""
    if importlib.util.find_spec("sentence_transformers") is None:
        raise UserError(
            "--retriever sentence needs sentence-transformers: pip install sentence-transformers, or take tfidf"
        )
    from sentence_transformers import SentenceTransformer  # seconds to import

    try:
        with quiet_hub():
            model = SentenceTransformer(name, model_kwargs={"use_safetensors": True})
            if hasattr(model[0], "auto_model"):
                load_body(name)  # which refuses weights that are not all there
    except Exception as error:  # not found, no network, no such kind of model
        raise UserError(
            f"--encoder {name}: cannot be loaded ({first_line(error)}); give a folder, or take tfidf"
        ) from None

    def features(texts: list[str]) -> np.ndarray:
        return model.encode(texts, normalize_embeddings=True, show_progress_bar=True)

    return lambda train, test: (features(train), features(test))


def means_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Featurize:
    """The evaluated model's own embeddings: the mean over a text's tokens of its last hidden states, of unit length."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def features(texts: list[str]) -> np.ndarray:
        means = embed(model, tokenizer, texts, positions, use_cache=False)
        return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)

    return lambda train, test: (features(train), features(test))


@torch.inference_mode()
def embed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    positions: int | None,
    last: bool = False,
    **options: Any,  # for the model
) -> np.ndarray:  # [N, D] float32
    """The mean over a text's first ``positions`` tokens of its last hidden states, or the state at the last one of them."""
    first_token = next(
        (i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None), 0
    )  # of an empty text
    rows = [row[:positions] or [first_token] for row in encode(tokenizer, texts)]
    found = [np.empty(0)] * len(rows)
    for batch in tqdm(list(batches([*map(len, rows)], None, TOKENS)), desc="Embedding"):
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
