"""Samples from checkpoints: ``python -m stanford_alpaca.generate CHECKPOINT [CHECKPOINT ...] --prompts FILE --out FILE``.

Also ``--instruction "..." [--input "..."]`` for one prompt, and ``--interactive`` to type them. Several checkpoints are
asked the same and shown side by side.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fire
import torch
from fire.decorators import SetParseFns
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from stanford_alpaca.data.encode import TextEncoder, clean
from stanford_alpaca.data.formats import canonical
from stanford_alpaca.data.prompts import format_prompt
from stanford_alpaca.data.reading import SUFFIXES, read_file
from stanford_alpaca.errors import UserError, check_whole, check_writable, exit_on_user_error, refuse_unknown
from stanford_alpaca.model import check_model, fit_vocabulary, load_model, load_tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Greedy unless a temperature above 0 is given.

    Raises:
        UserError: a value out of range, or beams together with sampling.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    num_beams: int = 1

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_k", 0), ("num_beams", 1)):
            check_whole(name, getattr(self, name), least)
        for name, most in (("temperature", 100.0), ("top_p", 1.0)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
                raise UserError(f"--{name} {value}: give a number from 0 to {most:g}")
        if self.num_beams > 1 and self.temperature > 0:
            raise UserError("--num_beams searches and --temperature samples: give one of them")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise UserError("--top_k and --top_p belong to sampling: give --temperature too, 1.0 for example")

    def config(self, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        """What transformers' ``generate`` takes."""
        chosen: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            chosen = {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **chosen,
        )


def encode_prompts(encoder: TextEncoder, records: list[dict[str, str]], room: int | None) -> list[list[int]]:
    """Token ids of the prompts, as training saw them. ``room``: the most tokens that leave space for an answer."""
    prompts = [ids for ids, _ in encoder([clean(format_prompt(record)) for record in records])]
    for number, ids in enumerate(prompts, 1):
        if room is not None and len(ids) > room:
            raise UserError(
                f"prompt {number} has {len(ids)} tokens; the model's context leaves room for {room}: "
                "shorten it or lower --max_new_tokens"
            )
    return prompts


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[dict[str, str]],  # instruction and, optionally, input
    sampling: Sampling = Sampling(),
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> list[str]:
    """One response per record, in order. Batches are padded on the left and hold prompts of similar length.

    Repeatable: the same arguments give the same text. Under sampling the batch size is one of those arguments.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    prompts = encode_prompts(TextEncoder.of(tokenizer), records, None if context is None else context - sampling.max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses = [""] * len(prompts)
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
            generation_config=sampling.config(tokenizer),
        )
        for i, response in zip(rows, out[:, longest:].tolist(), strict=True):
            responses[i] = decode_response(tokenizer, response)
    return responses


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text up to the end-of-sequence token."""
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def load_for_generation(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint on the GPU in bf16 if there is one, else on the CPU in float32.

    The vocabulary is made to fit as in training (a base model without a pad token gets one), and the sampling settings
    that the folder may bring along are dropped: what is asked for is what is done.
    """
    gpu = torch.cuda.is_available()
    model, tokenizer = load_model(path, dtype=torch.bfloat16 if gpu else torch.float32), load_tokenizer(path)
    fit_vocabulary(model, tokenizer)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model.to("cuda" if gpu else "cpu"), tokenizer


def read_prompts(prompts: str | None, instruction: str | None, input: str | None) -> list[dict[str, str]]:
    """Records from a .json or .jsonl file, a text file (one instruction a line), or the command line."""
    if (prompts is None) == (instruction is None):
        raise UserError("give the prompts: --prompts FILE, --instruction TEXT, or --interactive")
    if prompts is None:
        return [{"instruction": str(instruction), "input": str(input or ""), "output": ""}]
    if input is not None:
        raise UserError("--input belongs to --instruction; with --prompts the file holds the inputs")
    file = Path(str(prompts)).expanduser()
    if not file.is_file():
        raise UserError(f"--prompts {file}: no such file")
    if file.suffix in SUFFIXES:
        records = [canonical(record, where, needs_output=False) for where, record in read_file(file)]
    else:
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
        records = [{"instruction": line.strip(), "input": "", "output": ""} for line in lines if line.strip()]
    if not records:
        raise UserError(f"--prompts {file}: there is no prompt in it")
    return records


def chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, seed: int) -> None:
    """Reads instructions from the terminal and streams the responses until an empty line or the end of input."""
    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    context = getattr(model.config, "max_position_embeddings", None)
    room = None if context is None else context - sampling.max_new_tokens
    encoder = TextEncoder.of(tokenizer)
    for record in _typed():
        try:
            ids = torch.tensor(encode_prompts(encoder, [record], room), device=model.device)
        except UserError as error:
            print(error)
            continue
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=sampling.config(tokenizer),
                streamer=streamer,
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


@SetParseFns(prompts=str, instruction=str, input=str, out=str)  # fire would read "a, b" as a tuple
def run(
    *checkpoints: str,
    prompts: str | None = None,
    instruction: str | None = None,
    input: str | None = None,
    interactive: bool = False,
    out: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    num_beams: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    **unknown: Any,
) -> None:
    """Generates responses: python -m stanford_alpaca.generate CHECKPOINT [CHECKPOINT ...] --FLAG VALUE ...

    Args:
        checkpoints: folders or hub names; the same prompts go to each.
        prompts: a .json or .jsonl file of Alpaca records, or a text file with an instruction a line.
        instruction: one instruction; ``input`` is its input.
        interactive: type instructions, see the responses stream (one checkpoint, greedy or sampled).
        out: a JSONL file to write; it must not exist. Without it samples only go to the terminal.
        max_new_tokens: the most tokens of a response, 256 by default; batch_size: prompts at a time, 16.
        temperature: 0 is greedy; top_k and top_p narrow the sampling; num_beams searches instead.
        seed: the same command with the same seed gives the same text.
    """
    refuse_unknown(unknown, run)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, num_beams)
    if not checkpoints:
        raise UserError("give a checkpoint: a folder that training wrote, or a hub name")
    if interactive and (len(checkpoints) > 1 or prompts or instruction or out or num_beams > 1):
        raise UserError("--interactive takes one checkpoint and no --prompts, --instruction, --out or --num_beams")
    if out is not None:
        if out == "True" or Path(out).exists():
            raise UserError(f"--out {out}: give the name of a file that does not exist yet")
        check_writable("out", Path(out))
    check_whole("batch_size", batch_size, 1)
    check_whole("seed", seed, 0)
    records = [] if interactive else read_prompts(prompts, instruction, input)
    names = [str(checkpoint) for checkpoint in checkpoints]
    for name in names:
        check_model(name)
    if interactive:
        return chat(*load_for_generation(names[0]), sampling, seed)

    responses = {}
    for name in dict.fromkeys(names):
        model, tokenizer = load_for_generation(name)
        responses[name] = generate_batch(model, tokenizer, records, sampling, batch_size=batch_size, seed=seed)
        del model
    samples = [
        {
            "instruction": record["instruction"],
            "input": record["input"],
            "reference": record["output"],
            "responses": {name: texts[i] for name, texts in responses.items()},
        }
        for i, record in enumerate(records)
    ]
    if out is not None:
        write_jsonl(Path(out), [{**sample, "sampling": {**asdict(sampling), "seed": seed}} for sample in samples])
    for sample in samples:
        print(format_sample(sample))


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line; the folder is made if it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def format_sample(sample: dict[str, Any]) -> str:
    """A sample for the terminal: the prompt, the reference if there is one, each checkpoint's response."""
    lines = [f"instruction: {sample['instruction']}"]
    if sample["input"]:
        lines.append(f"input:       {sample['input']}")
    if sample["reference"]:
        lines.append(f"reference:   {sample['reference']}")
    width = max(len(name) for name in sample["responses"])
    lines += [f"  {name:<{width}} | {text}" for name, text in sample["responses"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    exit_on_user_error(lambda: fire.Fire(run))


if __name__ == "__main__":
    main()
