"""Trains with EMO in TRL's SFTTrainer.

    python -m examples.trl_sft MODEL DATA HELD_OUT OUTPUT_DIR --max_steps 20

DATA and HELD_OUT are files of records. `--mode` is an objective, and any further flag is one of
SFTConfig. Files in OUTPUT_DIR are overwritten. `--packing True` (with TRL's default strategy, bfd)
gives the same loss as padding. Tried with TRL 1.0.0, 1.8.0 and 1.16.0, and transformers 5.23.
"""

from pathlib import Path
from typing import Any

import fire
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from trl import SFTConfig, SFTTrainer

from stanford_alpaca import attach_objective
from stanford_alpaca.data.formats import load_records
from stanford_alpaca.data.prompts import format_prompt
from stanford_alpaca.flags import exit_on_user_error

DATA = Path(__file__).resolve().parents[1] / "data"


class ModelLossTrainer(SFTTrainer):
    """SFTTrainer with the loss that the model computes, as in any other Trainer.

    TRL computes its own loss from hidden states and output layer, without the model's forward.
    TRL's documentation says to override compute_loss for another loss. Then TRL's entropy and token
    accuracy are not logged, because they need extra work.
    """

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return Trainer.compute_loss(
            self, model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch
        )


def prompts_and_completions(file: str) -> Dataset:
    """Returns Alpaca records in the form that TRL takes.

    Messages work as well, because EMO only sees the ids and labels that TRL makes.
    """
    records = load_records(file)
    return Dataset.from_list(
        [{"prompt": format_prompt(record), "completion": record["output"]} for record in records]
    )


def main(
    model: str = str(DATA / "tiny-base"),
    data: str = str(DATA / "instructions" / "train.json"),
    eval_data: str = str(DATA / "instructions" / "held_out.json"),
    output_dir: str = "output/trl-sft",
    mode: str = "emo",
    **arguments: Any,
) -> None:
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    arguments = {"completion_only_loss": True, "bf16": torch.cuda.is_available()} | arguments
    settings = SFTConfig(output_dir=output_dir, **arguments)
    if settings.label_smoothing_factor or settings.use_liger_kernel:
        raise ValueError(
            "with label_smoothing_factor or use_liger_kernel the Trainer computes a loss of its "
            "own: leave them off"
        )
    trainer = ModelLossTrainer(
        network,
        settings,
        train_dataset=prompts_and_completions(data),
        eval_dataset=prompts_and_completions(eval_data),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    # Attach after making the trainer, because the trainer replaces the model's forward.
    handle = attach_objective(network, mode)
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
