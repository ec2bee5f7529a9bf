"""Label smoothing (Szegedy et al. 2016) by transformers' own Trainer, as a control."""

import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from stanford_alpaca.checkpoint.export import atomic_folder
from stanford_alpaca.data.batching import PadCollator
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.models.lora import add_lora

SMOOTHING = 0.1


def train(source: ModelSource, blocks: Dataset, folder: Path, settings: dict[str, Any]) -> None:
    """Trains LoRA in bfloat16 as ``tuning.SHARED`` says. Does nothing if the folder exists.

    Args:
        settings: of the TrainingArguments.
    """
    if folder.exists():
        return
    # a killed command leaves a partial folder
    shutil.rmtree(folder.with_name(f"{folder.name}.part"), ignore_errors=True)
    tokenizer = source.tokenizer()
    with atomic_folder(folder) as part:
        arguments = TrainingArguments(
            str(part),
            label_smoothing_factor=SMOOTHING,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        torch.manual_seed(arguments.seed)
        adapted = add_lora(source.load(torch.bfloat16), 16, 32, 0.0)
        trainer = Trainer(adapted, arguments, PadCollator(tokenizer.pad_token_id), blocks)
        trainer.train()
        adapted.save_pretrained(part)
        tokenizer.save_pretrained(part)
