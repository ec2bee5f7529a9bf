"""MAUVE (Pillutla et al. 2021): how near the responses are to the references, from 0 to 1.

Both are compared as clouds of features.
"""

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from stanford_alpaca.console import say
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.fewshot.retrieval import embed_texts
from stanford_alpaca.evaluation.intervals import Replicates
from stanford_alpaca.models.load import ModelSource, cannot_load, load_body

SCALE = 5.0  # the authors' scaling constant
HALVES = 10  # seeds of the noise floor
LEAST = 20  # texts, which make two clusters of ten
ENOUGH = 1000  # texts; MAUVE's authors advise thousands

EmbedTexts = Callable[[list[str]], np.ndarray]  # [n] texts -> [n, D] float32


def check_texts(flag: str, texts: int) -> None:
    """Raises UserError for too few texts to compare distributions."""
    if texts < LEAST:
        raise UserError(
            f"--{flag} compares distributions, and {texts} texts are too few for one: "
            f"give {LEAST} or more"
        )


def check_mauve(texts: int) -> None:
    """Raises UserError if MAUVE cannot be computed, before anything large is read."""
    if importlib.util.find_spec("mauve") is None:
        raise UserError("--mauve needs a package of its own: pip install mauve-text")
    check_texts("mauve", texts)
    if texts < ENOUGH:
        say(
            f"MAUVE of {texts} texts is coarse: compare models by it, "
            "and do not read much into the value"
        )


def load_featuriser(source: ModelSource) -> EmbedTexts:
    """Returns a function that computes features of texts.

    The feature of a causal LM is the last hidden state at the last token, as in the work of MAUVE's
    authors. The feature of an encoder is the mean over the tokens. A model counts as an encoder if
    its first state depends on later tokens.
    """
    if source.config().is_encoder_decoder:
        two = ValueError("it is an encoder with a decoder, which takes two texts")
        raise cannot_load(source.path, two)
    level = logging.get_verbosity()
    # silences warnings about an unloaded output layer and a missing pooling layer, both unused
    logging.set_verbosity_error()
    try:
        model = load_body(source)
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, cache_dir=source.cache_dir, trust_remote_code=source.remote_code
        )
    except Exception as error:
        raise cannot_load(source.path, error) from None
    finally:
        logging.set_verbosity(level)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    causal = _is_causal(model)
    # the two differ for RoBERTa: 514 and 512
    positions = min(
        getattr(model.config, "max_position_embeddings", 10**6), tokenizer.model_max_length
    )
    options = {"use_cache": False} if causal else {}
    return lambda texts: embed_texts(model, tokenizer, texts, positions, last=causal, **options)


@torch.inference_mode()
def _is_causal(model: PreTrainedModel) -> bool:
    ids = torch.tensor([[5, 6, 7], [5, 8, 9]], device=model.device)
    first = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0][:, 0]
    return torch.allclose(first[0], first[1], rtol=1e-4, atol=1e-6)


def mauve(
    references: np.ndarray,  # [n, D]
    responses: np.ndarray,  # [m, D]
    seed: int = 0,
    scale: float = SCALE,
) -> float:
    """Returns MAUVE with its authors' k-means, which has a tenth as many clusters as texts.

    Args:
        scale: multiplies the divergences, from 0 on. A larger one leaves less of MAUVE: where all
            values are near 1 or near 0, another scale tells more apart.
    """
    from mauve import compute_mauve  # takes seconds to import

    return float(
        compute_mauve(
            p_features=references, q_features=responses, seed=seed, mauve_scaling_factor=scale
        ).mauve
    )


def mauve_of_halves(references: np.ndarray, scale: float = SCALE) -> Replicates:  # [n, D]
    """Returns MAUVE between two random halves of the references, for each of HALVES seeds.

    A seed decides the halves and k-means. Both halves are of one distribution, so what is missing
    to 1 is noise. The most that is missing is MAUVE's noise floor.
    """
    found = []
    for seed in range(HALVES):
        order = np.random.default_rng(seed).permutation(len(references))
        half = len(order) // 2
        one, other = references[order[:half]], references[order[half : 2 * half]]
        found.append(mauve(one, other, seed, scale))
    return Replicates(np.array(found))
