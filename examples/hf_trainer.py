"""EMO in a bare Hugging Face Trainer: `python -m examples.hf_trainer MODEL DATA HELD_OUT OUTPUT_DIR --max_steps 20`.

DATA and HELD_OUT are files of records, `--mode` is an objective, any further flag is one of TrainingArguments. What is in
OUTPUT_DIR is overwritten. A Trainer's compute_loss_func would be used in place of the objective. Tried with transformers 5.23.
"""

from pathlib import Path
from typing import Any

import fire
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from stanford_alpaca import attach_objective
from stanford_alpaca.data.batching import PadCollator
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.tokenize import tokenize_records
from stanford_alpaca.flags import exit_on_user_error

DATA = Path(__file__).resolve().parents[1] / "data"


def main(
    model: str = str(DATA / "tiny-base"),
    data: str = str(DATA / "instructions" / "train.json"),
    eval_data: str = str(DATA / "instructions" / "held_out.json"),
    output_dir: str = "output/hf-trainer",
    mode: str = "emo",
    **arguments: Any,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        model
    )  # it must have a pad and an end-of-sequence token
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def examples(file: str) -> Dataset:
        """`input_ids`, and `labels` that are -100 on the prompt. Your own, made in another way, will do as well."""
        return tokenize_records(load_records(file), tokenizer, max_length=512)[0]

    settings = TrainingArguments(output_dir=output_dir, **arguments)
    if settings.label_smoothing_factor or settings.use_liger_kernel:
        raise ValueError(
            "with label_smoothing_factor or use_liger_kernel the Trainer computes a loss of its own: leave them off"
        )
    handle = attach_objective(network, mode)  # from here on network(**batch).loss is the objective
    trainer = Trainer(
        network,
        settings,
        data_collator=PadCollator(tokenizer.pad_token_id),
        train_dataset=examples(data),
        eval_dataset=examples(eval_data),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()  # a plain model: the objective leaves nothing in it
    handle.eval_meter.drain("cpu")  # what evaluations while training have left
    trainer.evaluate()
    trainer.save_state()
    sums = handle.eval_meter.drain(trainer.args.device, over_ranks=trainer.args.world_size > 1)
    if trainer.is_world_process_zero():
        print(
            f"{sums.tokens:.0f} held-out tokens: nll {sums.nll / sums.tokens:.4f}, emo {sums.emo / sums.tokens:.4f}"
        )


if __name__ == "__main__":
    exit_on_user_error(lambda: fire.Fire(main))
