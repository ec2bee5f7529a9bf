"""Writes the model card of a finished run."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import ModelCardData

from stanford_alpaca import __version__
from stanford_alpaca.console import without_secrets
from stanford_alpaca.run.arguments import Run

CARD = """\
---
{front}
---

# {title}

{base}, {done} with the objective `{mode}` by stanford-alpaca-emo {version}
(EMO: [arXiv 2310.04691](https://arxiv.org/abs/2310.04691)).

| | |
|---|---|
{rows}

`run.yaml` beside this file holds every flag, the versions of the packages and the hash of the data.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({path})
tokenizer = AutoTokenizer.from_pretrained({path})
```

{prompts}
"""
PROMPTS = (
    "Prompts were written with {}. The tokenizer's `chat_template` writes them:\n"
    '`tokenizer.apply_chat_template([{{"role": "user", "content": "..."}}], '
    "add_generation_prompt=True)`."
)
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
BLOCKS = "Trained on running text, in blocks of {} tokens: no prompt template."


def unit_of(run: Run) -> str:
    """Returns what a batch counts: blocks, rows or examples."""
    return "blocks" if run.data.block_size else "rows" if run.data.packing else "examples"


def write_card(run: Run, metrics: dict[str, float], prompts: str | None) -> None:
    """Writes the model card, README.md: the base model, the settings and the evaluation.

    Args:
        prompts: what wrote the prompts, in words; None for running text.
    """
    output, base = Path(run.training.output_dir), run.model.model_name_or_path
    hub_name = base if _is_hub_name(base) else None
    title = output.resolve().name
    about = (
        f"[{base}](https://huggingface.co/{base})" if hub_name else f"`{Path(base).resolve().name}`"
    )
    asking = PROMPTS.format(prompts) if prompts else ""
    if run.data.block_size:
        asking = BLOCKS.format(run.data.block_size)
    rows = (f"| {name} | {value.replace('|', '&#124;')} |" for name, value in facts(run, metrics))
    card = CARD.format(
        front=front_matter(run).to_yaml(),
        title=title,
        base=about,
        done="trained from scratch" if run.model.from_config else "fine-tuned",
        mode=run.objective.name,
        version=__version__,
        rows="\n".join(rows),
        path=json.dumps(run.training.hub_model_id or title, ensure_ascii=False),
        prompts=asking,
    )
    (output / "README.md").write_text(without_secrets(card), encoding="utf-8")


def front_matter(run: Run) -> ModelCardData:
    """Returns what the hub reads of a card. It names hub repositories, and no local path."""
    base, paths = run.model.model_name_or_path, run.data.data_path
    sets = [path.partition(":")[0] for path in paths if _is_hub_name(path.partition(":")[0])]
    return ModelCardData(
        library_name="peft" if run.lora.lora else "transformers",
        pipeline_tag="text-generation",
        tags=["emo", "sft", *(["lora"] if run.lora.lora else [])],
        base_model=base if _is_hub_name(base) else None,
        datasets=sets or None,
    )


def _is_hub_name(name: str) -> bool:
    """Returns whether a name is a repository's: NAME or OWNER/NAME, and nothing on this disk."""
    return not Path(name).exists() and bool(REPO_ID.fullmatch(name))


def facts(run: Run, metrics: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Yields the rows of the card's table: what was trained on what, and the evaluation."""
    training, lora = run.training, run.lora
    yield (
        "data",
        ", ".join(
            path if _is_hub_name(path.partition(":")[0]) else Path(path).name
            for path in run.data.data_path
        ),
    )
    if run.objective.objective().needs_emo:
        cost = run.objective
        name = Path(cost.cost).name if Path(cost.cost).exists() else cost.cost
        seed = f" (seed {cost.cost_seed})" if cost.cost_kind == "shuffled" else ""
        yield "cost", f"{name}, {cost.cost_kind}{seed}"
    if run.model.teacher:
        yield "teacher", f"{run.model.teacher}, top {run.model.teacher_top_k}"
    if lora.lora:
        yield "LoRA", f"r {lora.lora_r}, alpha {lora.lora_alpha}, embeddings {lora.lora_embeddings}"
    yield "learning rate", f"{training.learning_rate:g}, {training.lr_scheduler_type.value}"
    rows = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    yield f"{unit_of(run)} per step", str(rows)
    yield "epochs", f"{metrics['epoch']:.4g}" if "epoch" in metrics else "-"
    for name, value in metrics.items():
        if name.startswith("eval_") and not name.endswith(("_per_second", "_runtime")):
            yield name.replace("_", " "), f"{value:.4g}"
