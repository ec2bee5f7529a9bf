"""Trains with EMO in a bare Hugging Face Trainer.

    python -m examples.hf_trainer MODEL DATA HELD_OUT OUTPUT_DIR --max_steps 20

DATA and HELD_OUT are files of records. `--mode` is an objective, and any further flag is one of
TrainingArguments. Files in OUTPUT_DIR are overwritten. Do not give the Trainer a compute_loss_func:
it would replace the objective. Tried with transformers 5.23.
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
    # The tokenizer must have a pad and an end-of-sequence token.
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def examples(file: str) -> Dataset:
        """Returns `input_ids`, and `labels` that are -100 on the prompt.

        Examples that you make in another way work as well.
        """
        return tokenize_records(load_records(file), tokenizer, max_length=512)[0]

    settings = TrainingArguments(output_dir=output_dir, **arguments)
    if settings.label_smoothing_factor or settings.use_liger_kernel:
        raise ValueError(
            "with label_smoothing_factor or use_liger_kernel the Trainer computes a loss of its "
            "own: leave them off"
        )
    handle = attach_objective(network, mode)  # from here on, network(**batch).loss is the objective
    trainer = Trainer(
        network,
        settings,
        data_collator=PadCollator(tokenizer.pad_token_id),
        train_dataset=examples(data),
        eval_dataset=examples(eval_data),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()  # saves a plain model: the objective adds nothing to it
    handle.eval_meter.drain("cpu")  # discards the sums of evaluations during training
    trainer.evaluate()
    trainer.save_state()
    sums = handle.eval_meter.drain(trainer.args.device, over_ranks=trainer.args.world_size > 1)
    if trainer.is_world_process_zero():
        print(
            f"{sums.tokens:.0f} held-out tokens: nll {sums.nll / sums.tokens:.4f}, emo "
            f"{sums.emo / sums.tokens:.4f}"
        )


if __name__ == "__main__":
    exit_on_user_error(lambda: fire.Fire(main))
