"""What a run writes about itself beside the checkpoint: ``run.yaml``, from which it repeats, and a model card."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import yaml

from stanford_alpaca import __version__
from stanford_alpaca.arguments import MADE_WITH, Run
from stanford_alpaca.data.sources import identify

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "deepspeed", "peft")
FILE = "run.yaml"
HEADER = "# Repeat: python -m stanford_alpaca.train --config run.yaml --output_dir ANOTHER\n"
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

Prompts are written with the template `{template}` (`auto`: Alpaca's for instructions, the tokenizer's chat template for
conversations).
"""


def made_with(run: Run) -> dict[str, Any]:
    """Versions, data and the number of processes: what the result depends on besides the flags."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    paths = [*run.data.data_path, *(run.data.eval_path or [])]
    return {
        "stanford_alpaca": __version__,
        "python": platform.python_version(),
        **versions,
        "processes": run.training.world_size,
        "data": {path: identify(path, run.data.streaming) for path in paths},
    }


def differences(run: Run, now: dict[str, Any]) -> list[str]:
    """A line for everything that has changed since the run.yaml that --config named was written."""
    before = run.made_with
    lines = [
        f"made with {name} {before[name]}, now {now.get(name)}"
        for name in before
        if name != "data" and before[name] != now.get(name)
    ]
    data = before.get("data") or {}
    return lines + [f"{path} has changed since" for path, digest in now["data"].items() if data.get(path, digest) != digest]


def write_run(run: Run, now: dict[str, Any]) -> None:
    """Writes run.yaml into the output folder; a run resumed there, whose flags may differ, run-from-CHECKPOINT.yaml."""
    output, resume = Path(run.training.output_dir), run.training.resume_from_checkpoint
    output.mkdir(parents=True, exist_ok=True)
    file = output / FILE
    if file.exists() and resume is not None:
        file = output / f"run-from-{Path(resume).name}.yaml"
    text = HEADER + yaml.safe_dump(run.flags | {MADE_WITH: now}, sort_keys=False, allow_unicode=True)
    file.write_text(text, encoding="utf-8")


def write_card(run: Run, metrics: dict[str, float]) -> None:
    """Writes the model card, README.md, with what was trained on what, how, and what evaluation said."""
    training, output = run.training, Path(run.training.output_dir)
    per_step = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    rows = {
        "data": ", ".join(run.data.data_path),
        **({"cost": f"{run.objective.cost}, {run.objective.cost_kind}"} if run.objective.objective().needs_emo else {}),
        **({"teacher": f"{run.model.teacher}, top {run.model.teacher_top_k}"} if run.model.teacher else {}),
        **({"LoRA": f"r {run.lora.lora_r}, alpha {run.lora.lora_alpha}"} if run.lora.lora else {}),
        "learning rate": f"{training.learning_rate:g}, {training.lr_scheduler_type.value}",
        "rows per step" if run.data.packing else "examples per step": per_step,
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
        base=f"[{base}](https://huggingface.co/{base})" if hub_name else f"`{Path(base).resolve().name}`",
        done="trained from scratch" if run.model.from_config else "fine-tuned",
        mode=run.objective.mode,
        version=__version__,
        rows="\n".join(f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in rows.items()),
        path=json.dumps(training.hub_model_id or title, ensure_ascii=False),
        template=run.data.prompt_template,
    )
    (output / "README.md").write_text(card, encoding="utf-8")
