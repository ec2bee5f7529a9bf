"""Samples from checkpoints: ``python -m stanford_alpaca.generate CHECKPOINT [CHECKPOINT ...] --prompts FILE --out FILE``.

Also ``--instruction "..." [--input "..."]`` for one prompt, and ``--interactive`` to type them. Several checkpoints are
asked the same and shown side by side. ``--num_samples N`` draws several responses per prompt; ``--alpaca_eval FILE`` and
``--markdown FILE`` write them in other forms (``samples.py``).
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import fire
import torch
from fire.decorators import SetParseFns
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from stanford_alpaca.data.chat import stop_ids
from stanford_alpaca.data.formats import take_columns
from stanford_alpaca.data.templates import check_template
from stanford_alpaca.data.tokenize import PromptEncoder
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import check_whole, exit_on_user_error, refuse_unknown
from stanford_alpaca.generation.prompts import check_prompts, encode_prompts, read_prompts
from stanford_alpaca.generation.responses import load_for_generation, no_router_loss, sample_all
from stanford_alpaca.generation.sampling import GIVE_TEMPERATURE, Sampling
from stanford_alpaca.generation.writers import (
    check_outputs,
    format_sample,
    write_alpaca_eval,
    write_jsonl,
    write_markdown,
)
from stanford_alpaca.models.check import check_model


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
