"""Samples from checkpoints: ``python -m stanford_alpaca.generate CHECKPOINT [CHECKPOINT ...] --prompts FILE --out FILE``.

Also ``--instruction "..." [--input "..."]`` for one prompt, and ``--interactive`` to type them. Several checkpoints are
asked the same and shown side by side. ``--num_samples N`` draws several responses per prompt; ``--alpaca_eval FILE`` and
``--markdown FILE`` write them in other forms (``samples.py``).
"""

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fire
import torch
from fire.decorators import SetParseFns
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from stanford_alpaca.console import say
from stanford_alpaca.data.chat import stop_ids
from stanford_alpaca.data.formats import take_columns
from stanford_alpaca.data.reading import SUFFIXES, read_file
from stanford_alpaca.data.records import canonical
from stanford_alpaca.data.templates import IN_WORDS, check_template
from stanford_alpaca.data.tokenize import PromptEncoder
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import check_whole, exit_on_user_error, refuse_unknown
from stanford_alpaca.models.check import check_model
from stanford_alpaca.models.load import fit_vocabulary, load_model, load_tokenizer, read_config
from stanford_alpaca.samples import check_outputs, format_sample, sample_of, write_alpaca_eval, write_jsonl, write_markdown
from stanford_alpaca.sampling import GIVE_TEMPERATURE, Sampling

PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin")


def encode_prompts(
    config: PreTrainedConfig, encode: PromptEncoder, records: list[dict], max_new_tokens: int
) -> list[list[int]]:
    """Token ids of the prompts, as training saw them. Raises UserError for one that leaves no space for an answer."""
    prompts = encode(records)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    for number, ids in enumerate(prompts, 1):
        if not ids:
            raise UserError(f"prompt {number} is empty, and the tokenizer puts nothing before it: give it a word")
        if context is not None and len(ids) + max_new_tokens > context:
            raise UserError(
                f"prompt {number} has {len(ids)} tokens; the model's context leaves room for {context - max_new_tokens} "
                f"before {max_new_tokens} new ones: shorten it, or ask for fewer new ones"
            )
    return prompts


def plain_generation(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """A model's generation settings without those its folder brought along: what is asked for is what is done."""
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )


def no_router_loss(model: PreTrainedModel) -> dict[str, bool]:
    """For ``generate``: a mixture that trains with its router's loss would compute it there, and fail from the second token."""
    return {"output_router_logits": False} if getattr(model.config, "output_router_logits", False) else {}


def check_prompts(
    names: list[str],
    records: list[dict],
    max_new_tokens: int,
    prompt_template: str = "auto",
    special_tokens: str | None = None,
    remote_code: bool = False,
) -> dict[str, str]:
    """What writes the prompts of each model, in words. Says where a model is asked otherwise than it was trained.

    Raises:
        UserError: a prompt does not fit into the context of every model; before any is loaded.
    """
    asked: dict[str, str] = {}
    for name in names:
        tokenizer = load_tokenizer(name, remote_code=remote_code)
        config = read_config(name, remote_code=remote_code)
        encode = PromptEncoder(tokenizer, prompt_template, special_tokens)
        encode_prompts(config, encode, records, max_new_tokens)
        asked[name] = ", ".join(dict.fromkeys(IN_WORDS[template] for template in encode.names.values()))
        for otherwise in dict.fromkeys(encode.otherwise.values()):
            if otherwise:
                say(f"{name}: {otherwise}")
    return asked


@torch.no_grad()  # no inference_mode: weights that ZeRO-3 gathers in it could not be trained any more
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[dict],  # of the forms of ``data.formats``; a last response they may have is not read
    sampling: Sampling = Sampling(),
    *,
    prompt_template: str = "auto",
    special_tokens: str | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
    synced: bool = False,
) -> list[str]:
    """One response per record, in order. Batches are padded on the left and hold prompts of similar length.

    Prompts are written as the model was trained, unless ``prompt_template`` or ``special_tokens`` say otherwise. Repeatable:
    the same arguments give the same text. Under sampling the batch size is one of those arguments. ``synced``: all
    ranks call this together, and go on until the last one is done, as a sharded model needs it.
    """
    encode = PromptEncoder(tokenizer, prompt_template, special_tokens)
    prompts = encode_prompts(model.config, encode, records, sampling.max_new_tokens)
    responses = generate_ids(
        model, tokenizer, prompts, sampling, batch_size=batch_size, seed=seed, progress=progress, synced=synced
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
    progress: bool = True,
    synced: bool = False,
) -> list[list[int]]:
    """The same for token ids: what follows each prompt, up to the token that ends it, that token included."""
    stops = stop_ids(tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: list[list[int]] = [[] for _ in prompts]
    torch.manual_seed(seed)
    model.eval()
    for start in tqdm(range(0, len(order), batch_size), desc="Generating", disable=not progress):
        rows = order[start : start + batch_size]
        longest = len(prompts[rows[-1]])
        padding = [longest - len(prompts[i]) for i in rows]
        ids = torch.tensor([[tokenizer.pad_token_id] * pad + prompts[i] for pad, i in zip(padding, rows, strict=True)])
        mask = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long()
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=sampling.config(tokenizer, stops),
            synced_gpus=synced,
            **no_router_loss(model),
        )
        for i, response in zip(rows, out[:, longest:].tolist(), strict=True):
            end = next((place for place, token_id in enumerate(response) if token_id in stops), len(response))
            responses[i] = response[: end + 1]
    return responses


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: list[int]) -> str:
    """The text up to the first token that ends a response."""
    end = next((i for i, token_id in enumerate(ids) if token_id in stops), len(ids))
    ids = ids[:end]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def load_for_generation(
    path: str, remote_code: bool = False, may_grow: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint on the GPU in bf16 if there is one, else on the CPU in float32.

    The vocabulary is made to fit as in training (a base model without a pad token gets one, unless it may not grow).
    """
    gpu = torch.cuda.is_available()
    model = load_model(path, dtype=torch.bfloat16 if gpu else torch.float32, remote_code=remote_code)
    tokenizer = load_tokenizer(path, may_grow=may_grow, remote_code=remote_code)
    fit_vocabulary(model, tokenizer)
    model.generation_config = plain_generation(tokenizer)
    return model.to("cuda" if gpu else "cpu"), tokenizer


def read_prompts(
    prompts: str | None, instruction: str | None, input: str | None, columns: Mapping[str, str] | None = None
) -> list[dict[str, str]]:
    """Records from a data file, a text file (one instruction a line), or the command line.

    They need no ``output``, and keep AlpacaEval's ``dataset`` if they have it.
    """
    if (prompts is None) == (instruction is None):
        raise UserError("give the prompts: --prompts FILE, --instruction TEXT, or --interactive")
    if prompts is None:
        return [canonical({"instruction": str(instruction), "input": input}, "--instruction", needs_output=False)]
    if input is not None:
        raise UserError("--input belongs to --instruction; with --prompts the file holds the inputs")
    file = Path(str(prompts)).expanduser()
    if not os.path.isfile(file):
        raise UserError(f"--prompts {str(prompts) or 'without a name'}: no such file")
    if file.suffix.lower() in PICKLES:
        raise UserError(
            f"--prompts {file}: pickles are never opened; give text, an instruction a line, or {', '.join(SUFFIXES)}"
        )
    if file.suffix.lower() in SUFFIXES:
        records = []
        for where, record in read_file(file):
            asked = canonical(record, where, columns, needs_output=False)
            records.append({"prompt": asked["text"], "completion": ""} if "text" in asked else asked)  # a text is continued
            if isinstance(record, dict) and isinstance(record.get("dataset"), str):
                records[-1]["dataset"] = record["dataset"]
    else:
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
        records = [{"instruction": line.strip(), "input": "", "output": ""} for line in lines if line.strip()]
    if not records:
        raise UserError(f"--prompts {file}: there is no prompt in it")
    return records


def chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, encode: PromptEncoder, seed: int
) -> None:
    """Reads instructions from the terminal and streams the responses until an empty line or the end of input."""
    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stops = stop_ids(tokenizer)
    for record in _typed():
        try:
            ids = torch.tensor(encode_prompts(model.config, encode, [record], sampling.max_new_tokens), device=model.device)
        except UserError as error:
            print(error)
            continue
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=sampling.config(tokenizer, stops),
                streamer=streamer,
                **no_router_loss(model),
            )


def _typed() -> Iterator[dict[str, str]]:
    print("An instruction a line; an empty line ends.", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            return
        yield {"instruction": line, "input": ""}


def sample_all(
    names: list[str], records: list[dict], sampling: Sampling, num_samples: int = 1, remote_code: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """One sample per record, in the form of ``samples.py``; the checkpoints are loaded one after the other.

    Args:
        options: prompt_template, special_tokens, batch_size and seed, as in ``generate_batch``.
    """
    responses: dict[str, list[str | list[str]]] = {}
    for name in names:
        model, tokenizer = load_for_generation(name, remote_code)
        texts = generate_batch(model, tokenizer, records * num_samples, sampling, **options)
        count = len(records)
        responses[name] = [texts[i] if num_samples == 1 else texts[i::count] for i in range(count)]
        del model
    return [sample_of(record, {name: responses[name][i] for name in names}) for i, record in enumerate(records)]


@SetParseFns(
    prompts=str, instruction=str, input=str, out=str, alpaca_eval=str, markdown=str, columns=str
)  # fire makes "a, b" a tuple
def run(
    *checkpoints: str,
    prompts: str | None = None,
    instruction: str | None = None,
    input: str | None = None,
    interactive: bool = False,
    out: str | None = None,
    alpaca_eval: str | None = None,
    markdown: str | None = None,
    prompt_template: str = "auto",
    special_tokens: str | None = None,
    columns: str | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    typical_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    num_beams: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    trust_remote_code: bool = False,
    verify: bool = False,
    **unknown: Any,
) -> None:
    """Generates responses: python -m stanford_alpaca.generate CHECKPOINT [CHECKPOINT ...] --FLAG VALUE ...

    Args:
        checkpoints: folders or hub names; the same prompts go to each.
        prompts: a data file of any form that training takes (responses may be missing), or a text file with an
            instruction a line; columns: other names in it, as instruction=question.
        prompt_template: alpaca, chat (the tokenizer's chat template) or plain; auto: what the model was trained with, and for a
            model that this package did not train, what training would take for the form.
        special_tokens: what their names in prompts mean: text, or parse (the tokens); by default as in training.
        instruction: one instruction; ``input`` is its input.
        interactive: type instructions, see the responses stream (one checkpoint, greedy or sampled).
        out: a JSONL file to write, a sample a line: instruction, input, reference, and responses, which are
            {checkpoint: text}, or {checkpoint: [text, ...]} with --num_samples above 1.
        alpaca_eval: a JSON file to write for AlpacaEval's --model_outputs (one checkpoint, one sample per prompt).
        markdown: a page of the samples to write. None of the three files may exist; without them samples only go to
            the terminal.
        num_samples: responses per prompt, 1 by default; more of them need a temperature.
        max_new_tokens: the most tokens of a response, 256 by default; batch_size: responses at a time, 16.
        temperature: 0 is greedy; top_k, top_p, typical_p and min_p narrow the sampling; num_beams searches instead.
        repetition_penalty: above 1 makes tokens of the prompt and the response so far less likely, below 1 more.
        seed: the same command with the same seed gives the same text.
        trust_remote_code: runs the code that a checkpoint's folder or repository brings along.
        verify: reads a large checkpoint again, to compare it with its manifest; one below 2 GiB is always read.
    """
    refuse_unknown(unknown, run)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, typical_p, min_p, repetition_penalty, num_beams)
    check_template(prompt_template, special_tokens or "text")
    pairs, words = take_columns(columns, [str(checkpoint) for checkpoint in checkpoints])
    if not words:
        raise UserError("give a checkpoint: a folder that training wrote, or a hub name")
    for flag, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        check_whole(flag, value, 1)
    check_whole("seed", seed, 0)
    names = list(dict.fromkeys(words))
    if num_samples > 1 and temperature == 0:
        raise UserError(f"--num_samples {num_samples}: greedy gives the same one every time; {GIVE_TEMPERATURE}")
    files = check_outputs({"out": out, "alpaca_eval": alpaca_eval, "markdown": markdown})
    if interactive and (len(names) > 1 or prompts or instruction or files or num_beams > 1 or num_samples > 1):
        raise UserError(
            "--interactive takes one checkpoint and no --prompts, --instruction, --num_beams, --num_samples, or file to write"
        )
    if alpaca_eval is not None and (len(names) > 1 or num_samples > 1):
        raise UserError("--alpaca_eval holds one response per prompt: give one checkpoint, and no --num_samples")
    records = [] if interactive else read_prompts(prompts, instruction, input, pairs)
    for name in names:
        check_model(name, or_adapter=True, remote_code=trust_remote_code, verify=verify)
    asked = check_prompts(names, records, max_new_tokens, prompt_template, special_tokens, trust_remote_code)
    if interactive:
        model, tokenizer = load_for_generation(names[0], trust_remote_code)
        return chat(model, tokenizer, sampling, PromptEncoder(tokenizer, prompt_template, special_tokens), seed)

    options = {"prompt_template": prompt_template, "special_tokens": special_tokens, "batch_size": batch_size, "seed": seed}
    samples = sample_all(names, records, sampling, num_samples, trust_remote_code, **options)
    settings = {**asdict(sampling), "num_samples": num_samples, **options, "prompts": asked}
    if "out" in files:
        write_jsonl(files["out"], [{**sample, "sampling": settings} for sample in samples])
    if "alpaca_eval" in files:
        write_alpaca_eval(files["alpaca_eval"], samples)
    if "markdown" in files:
        write_markdown(files["markdown"], samples, settings | {"prompts": "; ".join(dict.fromkeys(asked.values()))})
    for sample in samples:
        print(format_sample(sample))


def main() -> None:
    """The command."""
    exit_on_user_error(lambda: fire.Fire(run))


if __name__ == "__main__":
    main()
