"""Checkpoints on held-out instructions: ``python -m stanford_alpaca.evaluation.metrics CHECKPOINT [...] --data FILE``.

Prints a table (nll, emo, perplexity, token accuracy, exact match) with a column per checkpoint, and samples side by side.
"""

import json
import math
from pathlib import Path
from typing import Any

import fire
import torch
from datasets import Dataset
from fire.decorators import SetParseFns
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.data.batching import PadCollator
from stanford_alpaca.data.blocks import make_blocks
from stanford_alpaca.data.formats import check_columns, form_of, load_records, take_columns
from stanford_alpaca.data.prompts import as_shown
from stanford_alpaca.data.tokenize import IGNORE_INDEX, check_template, tokenize_records
from stanford_alpaca.errors import UserError, check_whole, check_writable, exit_on_user_error, refuse_unknown
from stanford_alpaca.generate import check_prompts, generate_batch, load_for_generation
from stanford_alpaca.head import head_of, original_weight, recognise_head
from stanford_alpaca.loadable import check_model
from stanford_alpaca.samples import format_sample, sample_of, write_jsonl
from stanford_alpaca.sampling import Sampling
from stanford_alpaca.token_stats import reference

ROWS = 1024  # supervised tokens whose logits are held at a time


@torch.inference_mode()
def teacher_forced(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,  # input_ids and labels
    cost: CostEmbedding,
    batch_size: int = 16,
) -> dict[str, float]:
    """nll and emo (means per supervised token), perplexity and token accuracy of the references.

    The model's logits are computed for supervised tokens only; ValueError if ``recognise_head`` does not know its head.
    Sums over all supervised tokens and divides once, so the batch size does not matter.
    """
    collate, device = PadCollator(tokenizer.pad_token_id), model.device
    cost.to(device)
    model.eval()
    head = head_of(model)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # tokens, nll, emo, correct
    for start in tqdm(range(0, len(order), batch_size), desc="Evaluating"):
        batch = collate([examples[i] for i in order[start : start + batch_size]])
        labels = batch.pop("labels")[:, 1:].to(device)
        hidden = model.base_model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False)[0][:, :-1]
        keep = labels != IGNORE_INDEX
        for rows, targets in zip(hidden[keep].split(ROWS), labels[keep].split(ROWS), strict=True):
            logits = reference.logits_of(rows, head)
            stats = reference.token_stats(logits, targets, cost)
            assert stats.log_emo is not None
            correct = logits.argmax(1) == targets
            ones = torch.ones_like(stats.nll)
            sums += torch.stack([ones, stats.nll, stats.log_emo.exp(), correct.to(ones.dtype)]).double().sum(1)
    tokens, nll, emo, correct = sums.tolist()
    nll /= tokens
    return {
        "nll": nll,
        "emo": emo / tokens,
        "perplexity": math.exp(min(nll, 700.0)),
        "token_accuracy": correct / tokens,
        "supervised_tokens": int(tokens),
    }


def exact_match(responses: list[str], references: list[str]) -> float:
    """The share of responses that are the reference, leading and trailing white space aside."""
    equal = sum(response.strip() == text.strip() for response, text in zip(responses, references, strict=True))
    return equal / len(references)


@SetParseFns(data=str, cost=str, out=str, columns=str)
def run(
    *checkpoints: str,
    data: str | None = None,
    cost: str | None = None,
    out: str | None = None,
    samples: int = 12,
    limit: int | None = None,
    max_new_tokens: int = 64,
    max_length: int = 512,
    prompt_template: str = "auto",
    columns: str | None = None,
    batch_size: int = 32,
    trust_remote_code: bool = False,
    **unknown: Any,
) -> None:
    """Evaluates checkpoints and shows samples: python -m stanford_alpaca.evaluation.metrics CHECKPOINT [...] --data FILE

    Args:
        checkpoints: folders or hub names, the base model first.
        data: what training takes, with reference outputs; of running text nll, emo and perplexity, in blocks of max_length.
        cost: the model whose output embedding prices emo, the same for all; the first checkpoint by default.
        out: a folder for metrics.json and samples.jsonl; neither may exist.
        samples: how many samples to print.
        limit: only the first records.
        prompt_template, columns: as in training.
        trust_remote_code: runs the code that a checkpoint's folder or repository brings along.
    """
    refuse_unknown(unknown, run)
    pairs, words = take_columns(columns, [str(checkpoint) for checkpoint in checkpoints])
    if not words or data is None:
        raise UserError("give one or more checkpoints and --data FILE")
    check_whole("samples", samples, 0)
    check_whole("limit", 1 if limit is None else limit, 1)
    check_whole("batch_size", batch_size, 1)
    check_whole("max_length", max_length, 2)
    check_template(prompt_template)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    files = [Path(out) / name for name in ("metrics.json", "samples.jsonl")] if out is not None else []
    for file in files:
        if file.exists():
            raise UserError(f"{file} exists: give another --out or remove it")
        check_writable("out", file)
    names = list(dict.fromkeys(words))
    for name in [*names, cost or names[0]]:
        check_model(str(name), or_adapter=True, remote_code=trust_remote_code)

    check_columns([str(data)], pairs)
    records = load_records(str(data), columns=pairs, documents="auto")
    answers = form_of(records.column_names) != "text"  # running text asks nothing: it is read in blocks
    if limit is not None:
        records = records.select(range(min(limit, len(records))))
    if answers:
        check_prompts(names, list(records), max_new_tokens, prompt_template, trust_remote_code)
    base, _ = load_for_generation(str(cost or names[0]), trust_remote_code)
    shared_cost = CostEmbedding(original_weight(base))
    del base
    results, responses = {}, {}
    for name in names:
        model, tokenizer = load_for_generation(name, trust_remote_code)
        try:
            recognise_head(model)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
        if answers:
            examples, _ = tokenize_records(records, tokenizer, max_length, prompt_template=prompt_template)
        else:
            examples, _ = make_blocks(records, tokenizer, max_length)
        results[name] = teacher_forced(model, tokenizer, examples, shared_cost, batch_size)
        if answers:
            responses[name] = generate_batch(
                model, tokenizer, list(records), sampling, prompt_template=prompt_template, batch_size=batch_size
            )
            references = [as_shown(record)["reference"] for record in records]
            results[name]["exact_match"] = exact_match(responses[name], references)
        results[name] |= training_figures(name)
        del model
    shown = [
        sample_of(record, {name: responses[name][i] for name in names}) for i, record in enumerate(records if answers else [])
    ]
    if files:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        files[0].write_text(json.dumps({"data": str(data), "results": results}, indent=1) + "\n")
        write_jsonl(files[1], shown)
    for sample in shown[:samples]:
        print(format_sample(sample))
    print(f"{len(records)} {'examples' if answers else 'document(s)'} of {data}")
    print(format_table(results))


def training_figures(checkpoint: str) -> dict[str, float]:
    """What training measured, where the folder has it: supervised tokens/s and peak memory."""
    file = Path(checkpoint) / "train_results.json"
    figures = json.loads(file.read_text()) if file.is_file() else {}
    names = {"train_supervised_tokens_per_s": "supervised tokens/s", "train_peak_memory_mib": "peak memory, MiB"}
    return {shown: figures[name] for name, shown in names.items() if name in figures}


def format_table(results: dict[str, dict[str, float]]) -> str:
    """Measures down, checkpoints across."""
    measures = list(dict.fromkeys(measure for column in results.values() for measure in column))
    table = [["", *results]]
    table += [
        [measure.replace("_", " "), *(_number(column.get(measure)) for column in results.values())] for measure in measures
    ]
    return align(table)


def align(table: list[list[str]]) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    first, *others = (max(map(len, column)) for column in zip(*table, strict=True))
    return "\n".join(
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in table
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.4f}"


def main() -> None:
    """The command."""
    exit_on_user_error(lambda: fire.Fire(run))


if __name__ == "__main__":
    main()
