"""An embedding from text alone: tokens with similar contexts get rows with similar directions.

It takes windowed counts, shifted positive pointwise mutual information (Levy & Goldberg, NeurIPS
2014) and a truncated SVD. The rows use the square root of the singular values, and context counts
are smoothed (Levy, Goldberg & Dagan, TACL 2015).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array, csr_array, diags_array
from scipy.sparse.linalg import svds

from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import check_whole

SMOOTHING = 0.75  # exponent of the context counts: without it, rare contexts dominate
# rows shorter than this, relative to the longest, are rounding errors that a cosine would amplify
NOISE = 1e-6


@dataclass(frozen=True)
class TextSettings:
    """How text becomes rows. Raises UserError for a value out of range."""

    width: int = 128  # numbers per row
    window: int = 5  # tokens to each side
    min_count: int = 1  # rarer tokens get a row of zeros
    shift: int = 1  # k of Levy & Goldberg: log k is subtracted from the mutual information

    def __post_init__(self) -> None:
        for name in ("width", "window", "min_count", "shift"):
            check_whole(name, getattr(self, name), 1)


def count_pairs(
    chunks: Iterable[list[list[int]]],  # token ids of documents, a bounded number at a time
    vocab_size: int,
    window: int,
) -> tuple[csr_array, np.ndarray]:
    """Counts the tokens, and which tokens stand near each other within a document.

    A pair at distance d counts 1/d. Memory: the distinct pairs, and the tokens of one chunk times
    the window.

    Returns:
        The symmetric [V, V] matrix of pairs in float64, and the [V] counts of tokens in int64.
    """
    pairs = csr_array((vocab_size, vocab_size), dtype=np.float64)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for documents in chunks:
        ids = np.fromiter((token for document in documents for token in document), dtype=np.int32)
        belongs = np.repeat(
            np.arange(len(documents), dtype=np.int32), [len(document) for document in documents]
        )
        counts += np.bincount(ids, minlength=vocab_size)
        pairs = pairs + _count_forward(ids, belongs, vocab_size, window)
    return (pairs + pairs.T).tocsr(), counts


def _count_forward(ids: np.ndarray, belongs: np.ndarray, vocab_size: int, window: int) -> csr_array:
    """Counts (token, later token) of one chunk; ``belongs`` is the document of each token."""
    first, second, weights = [], [], []
    for distance in range(1, window + 1):
        inside = belongs[distance:] == belongs[:-distance]
        first.append(ids[:-distance][inside])
        second.append(ids[distance:][inside])
        weights.append(np.full(len(first[-1]), 1 / distance))
    places = (np.concatenate(first), np.concatenate(second))
    # tocsr adds up equal places
    return coo_array((np.concatenate(weights), places), shape=(vocab_size, vocab_size)).tocsr()


def positive_pmi(
    pairs: csr_array,  # [V, V] counts
    shift: int = 1,
) -> csr_array:  # [V, V]
    """Returns the shifted positive pointwise mutual information; it is 0 for pairs never seen.

    Equals max(log(P(w, c) / (P(w) P'(c))) - log shift, 0), with P'(c) proportional to
    count(c)^0.75.
    """
    table = pairs.tocoo()
    rows, columns = table.coords
    words, contexts = pairs.sum(axis=1), pairs.sum(axis=0) ** SMOOTHING
    # P(w, c) / P(w) = count(w, c) / count(w)
    pmi = np.log(table.data) - np.log(words[rows]) - np.log(contexts[columns] / contexts.sum())
    positive = csr_array((np.maximum(pmi - np.log(shift), 0), (rows, columns)), shape=pairs.shape)
    positive.eliminate_zeros()
    return positive


def embed(
    pairs: csr_array,  # [V, V] counts
    wanted: np.ndarray,  # [V] bool: tokens that may get a row
    settings: TextSettings,
) -> tuple[np.ndarray, float]:
    """Computes rows U sqrt(S) from the truncated SVD of the mutual information.

    They are the same on every run. Tokens without a row get zeros.

    Returns:
        [V, width] float32, and the share of the matrix' squared norm that the kept singular values
        explain.

    Raises:
        UserError: too few tokens have neighbours for a matrix of this width.
    """
    chosen = diags_array(wanted.astype(np.float64))
    matrix = positive_pmi((chosen @ pairs @ chosen).tocsr(), settings.shift)
    met = np.flatnonzero(np.diff(matrix.indptr))
    if len(met) <= settings.width:
        raise UserError(
            f"--width {settings.width}: the text has {len(met)} tokens that stand together more "
            "often than by chance, and more than the width are needed; give more text, or a "
            "smaller --width, --min_count or --shift"
        )
    start = np.random.default_rng(0).standard_normal(len(met))
    u, s, _ = svds(matrix[met], k=settings.width, v0=start)
    found = (u * np.sqrt(s))[:, ::-1]  # the largest first
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    rows = np.zeros((len(wanted), settings.width), dtype=np.float32)
    rows[met] = np.where(norms > NOISE * norms.max(), found, 0)
    return rows, float((s**2).sum() / (matrix.data**2).sum())
