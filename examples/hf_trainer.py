"""EMO in a bare Hugging Face Trainer: `python -m examples.hf_trainer MODEL DATA HELD_OUT OUTPUT_DIR --max_steps 20`.

Any further flag is one of TrainingArguments. Leave label_smoothing_factor, use_liger_kernel and compute_loss_func alone: with
them the Trainer computes a loss of its own. Tried with transformers 5.23.
"""

import json
from pathlib import Path

import fire
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from stanford_alpaca import attach_objective
from stanford_alpaca.data.batching import PadCollator
from stanford_alpaca.data.tokenize import tokenize_records

DATA = Path(__file__).resolve().parents[1] / "data"


def main(
    model: str = str(DATA / "tiny-base"),
    data: str = str(DATA / "instructions" / "train.json"),
    eval_data: str = str(DATA / "instructions" / "held_out.json"),
    output_dir: str = "output/hf-trainer",
    mode: str = "emo",
    **arguments,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)  # it must have a pad and an end-of-sequence token
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def examples(file: str) -> Dataset:
        """`input_ids`, and `labels` that are -100 on the prompt. Your own, made in another way, will do as well."""
        records = Dataset.from_list(json.loads(Path(file).read_text()))
        return tokenize_records(records, tokenizer, max_length=512)[0]

    handle = attach_objective(network, mode)  # from here on network(**batch).loss is the objective
    trainer = Trainer(
        network,
        TrainingArguments(output_dir=output_dir, **arguments),
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
        print(f"{sums.tokens:.0f} held-out tokens: nll {sums.nll / sums.tokens:.4f}, emo {sums.emo / sums.tokens:.4f}")


if __name__ == "__main__":
    fire.Fire(main)
