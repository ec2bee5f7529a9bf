"""Loads a checkpoint and answers prompts in batches."""

from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from stanford_alpaca.data.chat import stop_ids
from stanford_alpaca.data.tokenize import PromptEncoder
from stanford_alpaca.generation.prompts import encode_prompts
from stanford_alpaca.generation.sampling import Sampling
from stanford_alpaca.generation.writers import sample_of
from stanford_alpaca.models.load import ModelSource, fit_vocabulary


def plain_generation(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """A model's generation settings without those its folder brought along: what is asked for is what is done."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def no_router_loss(model: PreTrainedModel) -> dict[str, bool]:
    """For ``generate``: a mixture that trains with its router's loss would compute it there, and fail from the second token."""
    return (
        {"output_router_logits": False}
        if getattr(model.config, "output_router_logits", False)
        else {}
    )


@torch.no_grad()  # no inference_mode: weights that ZeRO-3 gathers in it could not be trained any more
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[
        dict
    ],  # of the forms of ``data.formats``; a last response they may have is not read
    sampling: Sampling = Sampling(),
    *,
    encode: PromptEncoder | None = None,
    batch_size: int = 16,
    seed: int = 0,
    synced: bool = False,
) -> list[str]:
    """One response per record, in order. Batches are padded on the left and hold prompts of similar length.

    Prompts are written as the model was trained, unless ``encode`` writes them otherwise. Repeatable:
    the same arguments give the same text. Under sampling the batch size is one of those arguments. ``synced``: all
    ranks call this together, and go on until the last one is done, as a sharded model needs it.
    """
    encode = encode or PromptEncoder(tokenizer)
    prompts = encode_prompts(model.config, encode, records, sampling.max_new_tokens)
    responses = generate_ids(
        model, tokenizer, prompts, sampling, batch_size=batch_size, seed=seed, synced=synced
    )
    stops = stop_ids(tokenizer)
    return [decode_response(tokenizer, response, stops) for response in responses]


@torch.no_grad()
def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],  # token ids, at least one each
    sampling: Sampling = Sampling(),
    *,
    batch_size: int = 16,
    seed: int = 0,
    synced: bool = False,
) -> list[list[int]]:
    """The same for token ids: what follows each prompt, up to the token that ends it, that token included."""
    stops = stop_ids(tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: list[list[int]] = [[] for _ in prompts]
    torch.manual_seed(seed)
    model.eval()
    for start in tqdm(range(0, len(order), batch_size), desc="Generating", disable=None):
        rows = order[start : start + batch_size]
        longest = len(prompts[rows[-1]])
        padding = [longest - len(prompts[i]) for i in rows]
        ids = torch.tensor(
            [
                [tokenizer.pad_token_id] * pad + prompts[i]
                for pad, i in zip(padding, rows, strict=True)
            ]
        )
        mask = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long()
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=sampling.config(tokenizer, stops),
            synced_gpus=synced,
            **no_router_loss(model),
        )
        for i, response in zip(rows, out[:, longest:].tolist(), strict=True):
            end = next(
                (place for place, token_id in enumerate(response) if token_id in stops),
                len(response),
            )
            responses[i] = response[: end + 1]
    return responses


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: list[int]) -> str:
    """The text up to the first token that ends a response."""
    end = next((i for i, token_id in enumerate(ids) if token_id in stops), len(ids))
    ids = ids[:end]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def load_for_generation(
    source: ModelSource, may_grow: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint on the GPU in bf16 if there is one, else on the CPU in float32.

    The vocabulary is made to fit as in training (a base model without a pad token gets one, unless it may not grow).
    """
    gpu = torch.cuda.is_available()
    model = source.load(torch.bfloat16 if gpu else torch.float32)
    tokenizer = source.tokenizer(may_grow=may_grow)
    fit_vocabulary(model, tokenizer)
    model.generation_config = plain_generation(tokenizer)
    return model.to("cuda" if gpu else "cpu"), tokenizer


def sample_all(
    sources: list[ModelSource],
    records: list[dict],
    sampling: Sampling,
    num_samples: int = 1,
    *,
    prompt_template: str = "auto",
    special_tokens: str | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One sample per record, in the form of ``writers.py``; the checkpoints are loaded one after the other."""
    responses: dict[str, list[str | list[str]]] = {}
    for source in sources:
        model, tokenizer = load_for_generation(source)
        encode = PromptEncoder(tokenizer, prompt_template, special_tokens)
        repeated = records * num_samples
        texts = generate_batch(
            model, tokenizer, repeated, sampling, encode=encode, batch_size=batch_size, seed=seed
        )
        count = len(records)
        responses[source.path] = [
            texts[i] if num_samples == 1 else texts[i::count] for i in range(count)
        ]
        del model
    return [
        sample_of(record, {name: texts[i] for name, texts in responses.items()})
        for i, record in enumerate(records)
    ]
