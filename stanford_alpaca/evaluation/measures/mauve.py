"""MAUVE (Pillutla et al. 2021): how near the responses are to the references as two clouds of features, 0 to 1."""

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from stanford_alpaca.console import say
from stanford_alpaca.errors import UserError
from stanford_alpaca.evaluation.fewshot.retrieval import embed
from stanford_alpaca.models.check import check_model
from stanford_alpaca.models.load import ModelSource, cannot_load, load_body

LEAST = 20  # texts: two clusters of ten
ENOUGH = 1000  # its authors advise thousands

Featurize = Callable[[list[str]], np.ndarray]  # [n] texts -> [n, D] float32


def check_mauve(featuriser: ModelSource, texts: int) -> None:
    """Raises UserError where MAUVE cannot be computed, before anything large is read."""
    if importlib.util.find_spec("mauve") is None:
        raise UserError("--mauve needs a package of its own: pip install mauve-text")
    if texts < LEAST:
        raise UserError(
            f"--mauve compares distributions, and {texts} texts are too few for one: give {LEAST} or more"
        )
    if texts < ENOUGH:
        say(
            f"MAUVE of {texts} texts is coarse: compare models by it, and do not read much into the value"
        )
    check_model(featuriser)


def load_featuriser(source: ModelSource) -> Featurize:
    """Features of texts: the last hidden state at the last token of a causal LM, as MAUVE's authors have it, else, of an
    encoder, the mean over the tokens. Which of the two it is shows in whether its first state depends on later tokens."""
    name, remote_code = source.path, source.remote_code
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # an output layer that is not loaded, a pooling layer that is not there: neither is used
    try:
        if AutoConfig.from_pretrained(name, trust_remote_code=remote_code).is_encoder_decoder:
            raise ValueError("it is an encoder with a decoder, which takes two texts")
        model = load_body(name, remote_code=remote_code)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=remote_code)
    except Exception as error:
        raise cannot_load(name, error) from None
    finally:
        logging.set_verbosity(level)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    causal = _is_causal(model)
    positions = min(
        getattr(model.config, "max_position_embeddings", 10**6), tokenizer.model_max_length
    )  # RoBERTa: 514, 512
    options = {"use_cache": False} if causal else {}
    return lambda texts: embed(model, tokenizer, texts, positions, last=causal, **options)


@torch.inference_mode()
def _is_causal(model: PreTrainedModel) -> bool:
    ids = torch.tensor([[5, 6, 7], [5, 8, 9]], device=model.device)
    first = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0][:, 0]
    return torch.allclose(first[0], first[1], rtol=1e-4, atol=1e-6)


def mauve(references: np.ndarray, responses: np.ndarray, seed: int = 0) -> float:  # [n, D], [m, D]
    """With the authors' settings: k-means of a tenth as many clusters as texts, a scaling factor of 5."""
    from mauve import compute_mauve  # seconds to import

    return float(compute_mauve(p_features=references, q_features=responses, seed=seed).mauve)
