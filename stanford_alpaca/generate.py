"""Generates responses with checkpoints.

    python -m stanford_alpaca.generate CHECKPOINT [CHECKPOINT ...] --prompts FILE --out FILE

``--instruction "..." [--input "..."]`` gives one prompt, and ``--interactive`` reads prompts from
the terminal. Several checkpoints get the same prompts, and their responses are shown side by side.
``--num_samples N`` draws several responses per prompt. ``--alpaca_eval FILE`` and
``--markdown FILE`` write the responses in other forms (``generation/writers.py``).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from stanford_alpaca.console import show
from stanford_alpaca.data.chat import stop_ids
from stanford_alpaca.data.formats import take_columns
from stanford_alpaca.data.templates import check_template
from stanford_alpaca.data.tokenize import PromptEncoder
from stanford_alpaca.errors import UserError
from stanford_alpaca.flags import (
    MOST,
    MOST_SEED,
    check_whole,
    command,
    exit_on_user_error,
    from_command_line,
    part_of,
    words,
)
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
from stanford_alpaca.models.load import ModelSource

MOST_SAMPLES = 10**5  # of a prompt


class _Streamer(TextStreamer):
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        show(text, end="\n" if stream_end else "")


def chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    encode: PromptEncoder,
    seed: int,
) -> None:
    """Reads instructions from the terminal and streams the responses.

    It ends at an empty line or at the end of input.
    """
    torch.manual_seed(seed)
    streamer = _Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stops = stop_ids(tokenizer)
    for record in _typed():
        try:
            ids = torch.tensor(
                encode_prompts(model.config, encode, [record], sampling.max_new_tokens),
                device=model.device,
            )
        except UserError as error:
            show(str(error))
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
    show("An instruction a line; an empty line ends.", to_errors=True)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            return
        yield {"instruction": line, "input": ""}


@dataclass(frozen=True)
class Options(Sampling):
    """Generates responses: python -m stanford_alpaca.generate CHECKPOINT [...] --FLAG VALUE ...

    Args:
        checkpoints: folders or hub names. Each gets the same prompts.
        prompts: a data file in any form that training takes, where responses may be missing, or a
            text file with one instruction per line.
        columns: other column names in the data file, as instruction=question.
        prompt_template: alpaca, chat (the tokenizer's chat template), plain or auto. With auto,
            each model is prompted as it was trained. A model that this package did not train gets
            the template that training would choose for the form of the record.
        special_tokens: what names of special tokens in prompts mean: text (plain text) or parse
            (the tokens). By default as in training.
        instruction: one instruction.
        input: the input of that instruction.
        interactive: type instructions and see the responses stream, greedy or sampled. Takes one
            checkpoint.
        out: a JSONL file to write, one sample per line with instruction, input, reference and
            responses. The responses are {checkpoint: text}, or {checkpoint: [text, ...]} with
            --num_samples above 1.
        alpaca_eval: a JSON file to write for AlpacaEval's --model_outputs. Takes one checkpoint and
            one sample per prompt.
        markdown: a page of the samples to write. None of the three files may exist. Without them,
            samples only go to the terminal.
        num_samples: responses per prompt, 1 by default. More than one needs a temperature.
        max_new_tokens: the most tokens of a response, 256 by default.
        batch_size: responses generated at a time, 16 by default.
        temperature: 0, the default, is greedy; above 0 samples.
        top_k, top_p, typical_p, min_p: narrow the sampling.
        num_beams: searches with this many beams, instead of sampling.
        repetition_penalty: above 1 makes tokens that occur in the prompt or the response less
            likely, below 1 more likely.
        seed: the same command with the same seed gives the same text.
        trust_remote_code: runs the code that comes with a checkpoint's folder or repository.
        verify: reads a large checkpoint again to compare it with its manifest. A checkpoint below
            2 GiB is always read.
    """

    checkpoints: tuple[str, ...] = words()
    prompts: str | None = None
    instruction: str | None = None
    input: str | None = None
    interactive: bool = False
    out: str | None = None
    alpaca_eval: str | None = None
    markdown: str | None = None
    prompt_template: str = "auto"
    special_tokens: str | None = None
    columns: str | None = None
    num_samples: int = 1
    batch_size: int = 16
    seed: int = 0
    trust_remote_code: bool = False
    verify: bool = False


def generate(options: Options) -> None:
    """Answers the prompts with every checkpoint, writes the requested files, prints the samples."""
    sampling = part_of(options, Sampling)
    check_template(options.prompt_template, options.special_tokens or "text")
    columns, names = take_columns(options.columns, list(options.checkpoints))
    names = list(dict.fromkeys(names))
    if not names:
        raise UserError("give a checkpoint: a folder that training wrote, or a hub name")
    files = check_outputs(
        {"out": options.out, "alpaca_eval": options.alpaca_eval, "markdown": options.markdown}
    )
    check_samples(options, names, files)
    records = []
    if not options.interactive:
        records = read_prompts(options.prompts, options.instruction, options.input, columns)
    sources = [ModelSource(name, remote_code=options.trust_remote_code) for name in names]
    for source in sources:
        check_model(source, or_adapter=True, verify=options.verify)
    asking = (options.prompt_template, options.special_tokens)
    asked = check_prompts(sources, records, sampling.max_new_tokens, *asking)
    if options.interactive:
        model, tokenizer = load_for_generation(sources[0])
        return chat(model, tokenizer, sampling, PromptEncoder(tokenizer, *asking), options.seed)

    how = {
        name: getattr(options, name)
        for name in ("prompt_template", "special_tokens", "batch_size", "seed")
    }
    samples = sample_all(sources, records, sampling, options.num_samples, **how)
    settings = {**asdict(sampling), "num_samples": options.num_samples, **how, "prompts": asked}
    if "out" in files:
        write_jsonl(files["out"], [{**sample, "sampling": settings} for sample in samples])
    if "alpaca_eval" in files:
        write_alpaca_eval(files["alpaca_eval"], samples)
    if "markdown" in files:
        prompts = "; ".join(dict.fromkeys(asked.values()))
        write_markdown(files["markdown"], samples, settings | {"prompts": prompts})
    for sample in samples:
        show(format_sample(sample))


def check_samples(options: Options, names: list[str], files: dict[str, Path]) -> None:
    """Raises UserError if the samples, checkpoints and files asked for do not go together."""
    for flag, least, most in (
        ("num_samples", 1, MOST_SAMPLES),
        ("batch_size", 1, MOST),
        ("seed", 0, MOST_SEED),
    ):
        check_whole(flag, getattr(options, flag), least, most)
    several = len(names) > 1 or options.num_samples > 1
    if options.num_samples > 1 and options.temperature == 0:
        raise UserError(
            f"--num_samples {options.num_samples}: greedy gives the same one every time; "
            f"{GIVE_TEMPERATURE}"
        )
    if options.interactive and (
        several or options.prompts or options.instruction or files or options.num_beams > 1
    ):
        raise UserError(
            "a chat (--interactive) takes one checkpoint and no --prompts, --instruction, "
            "--num_beams, --num_samples, or file to write"
        )
    if options.alpaca_eval is not None and several:
        raise UserError(
            "--alpaca_eval holds one response per prompt: give one checkpoint, and no --num_samples"
        )


run = command(Options, generate)


def main() -> None:
    """Runs the command."""
    exit_on_user_error(lambda: from_command_line(run))


if __name__ == "__main__":
    main()
