"""The model card of a finished run."""

import json
from pathlib import Path

import yaml

from stanford_alpaca import __version__
from stanford_alpaca.run.arguments import Run

CARD = """\
---
library_name: {library}
pipeline_tag: text-generation
tags: [emo, sft]
{front}---

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
PROMPTS = """\
Prompts were written with {}. The tokenizer's `chat_template` writes them:
`tokenizer.apply_chat_template([{{"role": "user", "content": "..."}}], add_generation_prompt=True)`."""
BLOCKS = "Trained on running text, in blocks of {} tokens: no prompt template."


def unit_of(run: Run) -> str:
    """What a batch counts."""
    return "blocks" if run.data.block_size else "rows" if run.data.packing else "examples"


def write_card(run: Run, metrics: dict[str, float], prompts: str | None) -> None:
    """Writes the model card, README.md, with what was trained on what, how, and what evaluation said.

    Args:
        prompts: what writes the prompts, in words; None for running text.
    """
    training, output = run.training, Path(run.training.output_dir)
    per_step = (
        training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    )
    rows = {
        "data": ", ".join(run.data.data_path),
        **(
            {"cost": f"{run.objective.cost}, {run.objective.cost_kind}"}
            if run.objective.objective().needs_emo
            else {}
        ),
        **(
            {"teacher": f"{run.model.teacher}, top {run.model.teacher_top_k}"}
            if run.model.teacher
            else {}
        ),
        **(
            {
                "LoRA": f"r {run.lora.lora_r}, alpha {run.lora.lora_alpha}, embeddings {run.lora.lora_embeddings}"
            }
            if run.lora.lora
            else {}
        ),
        "learning rate": f"{training.learning_rate:g}, {training.lr_scheduler_type.value}",
        f"{unit_of(run)} per step": per_step,
        "epochs": f"{metrics['epoch']:.4g}" if "epoch" in metrics else "-",
        **{
            name.replace("_", " "): f"{value:.4g}"
            for name, value in metrics.items()
            if name.startswith("eval_") and not name.endswith(("_per_second", "_runtime"))
        },
    }
    base = run.model.model_name_or_path
    hub_name = None if Path(base).exists() else base
    title = output.resolve().name
    card = CARD.format(
        library="peft" if run.lora.lora else "transformers",
        front=yaml.safe_dump({"base_model": hub_name}) if hub_name else "",
        title=title,
        base=f"[{base}](https://huggingface.co/{base})"
        if hub_name
        else f"`{Path(base).resolve().name}`",
        done="trained from scratch" if run.model.from_config else "fine-tuned",
        mode=run.objective.mode,
        version=__version__,
        rows="\n".join(
            f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in rows.items()
        ),
        path=json.dumps(training.hub_model_id or title, ensure_ascii=False),
        prompts=BLOCKS.format(size)
        if (size := run.data.block_size)
        else PROMPTS.format(prompts)
        if prompts
        else "",
    )
    (output / "README.md").write_text(card, encoding="utf-8")
