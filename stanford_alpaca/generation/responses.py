"""Loads a checkpoint and answers prompts in batches."""

from collections.abc import Iterator
from contextlib import contextmanager
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
    """Returns generation settings without the defaults that the model's folder brings along.

    Generation then uses only the settings that were asked for.
    """
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def no_router_loss(model: PreTrainedModel) -> dict[str, bool]:
    """Returns options for ``generate`` that switch off the router loss of a mixture of experts.

    A mixture that trains with its router loss would compute it in ``generate`` too, and would fail
    from the second token on.
    """
    return (
        {"output_router_logits": False}
        if getattr(model.config, "output_router_logits", False)
        else {}
    )


@contextmanager
def contiguous_before(head: torch.nn.Module | None) -> Iterator[None]:
    """Makes the input of the output layer contiguous.

    ``generate`` cuts the last position out of each prompt's hidden states. Without a copy of these
    few numbers PyTorch multiplies row by row, and in bfloat16 on a CPU it copies the weight for
    each row.
    """
    if head is None:  # a model of somebody else's code may not name it
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, args: tuple(arg.contiguous() for arg in args))
    try:
        yield
    finally:
        hook.remove()


# not inference_mode: weights that ZeRO-3 gathers within it could no longer be trained
@torch.no_grad()
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[dict],  # in any form of ``data.records``; a final response is not read
    sampling: Sampling = Sampling(),
    *,
    encode: PromptEncoder | None = None,
    batch_size: int = 16,
    seed: int = 0,
    synced: bool = False,
) -> list[str]:
    """Returns one response per record, in order.

    Batches hold prompts of similar length and are padded on the left. The same arguments give the
    same text. Under sampling the batch size is one of those arguments.

    Args:
        encode: writes the prompts; by default as the model was trained.
        synced: whether all ranks call this together and go on until the last one is done, as a
            sharded model needs it.
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
    """Does the same as ``generate_batch`` for token ids.

    A response runs up to and including the token that ends it.
    """
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
        with contiguous_before(model.get_output_embeddings()):
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
    """Returns the text up to the first token that ends a response."""
    end = next((i for i, token_id in enumerate(ids) if token_id in stops), len(ids))
    ids = ids[:end]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def load_for_generation(
    source: ModelSource, may_grow: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a checkpoint: in bf16 on the GPU if there is one, else in float32 on the CPU.

    The vocabulary is made to fit as in training. A base model without a pad token gets a new one,
    unless ``may_grow`` is False.
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
    """Returns one sample per record, in the form of ``writers.py``.

    The checkpoints are loaded one after the other.
    """
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
