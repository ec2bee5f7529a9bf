"""Turns a command line into the flags of a run."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import transformers
from transformers import HfArgumentParser
from transformers.utils.import_utils import is_torch_tf32_available

from stanford_alpaca.console import SECRET_SETTING, keep_secret, show
from stanford_alpaca.errors import UserError, first_line, nearest
from stanford_alpaca.flags import check_path
from stanford_alpaca.run.arguments import FLAGS, SECRET, Run
from stanford_alpaca.run.config_file import not_given, with_config
from stanford_alpaca.run.help import help_text
from stanford_alpaca.run.legacy_flags import split_flags, translate

FOREIGN = {  # what Axolotl, TRL and LLaMA-Factory call it -> what it is here
    "base_model": "--model_name_or_path",
    "model": "--model_name_or_path",
    "datasets": "--data_path",
    "dataset": "--data_path",
    "dataset_name": "--data_path",
    "dataset_dir": "--data_path",
    "test_datasets": "--eval_path",
    "val_set_size": "--eval_fraction",
    "val_size": "--eval_fraction",
    "micro_batch_size": "--per_device_train_batch_size",
    "eval_batch_size": "--per_device_eval_batch_size",
    "num_epochs": "--num_train_epochs",
    "sequence_len": "--model_max_length",
    "max_seq_length": "--model_max_length",
    "max_length": "--model_max_length",
    "cutoff_len": "--model_max_length",
    "optimizer": "--optim",
    "lr_scheduler": "--lr_scheduler_type",
    "sample_packing": "--packing",
    "pad_to_sequence_len": "--packing",
    "adapter": "--lora True",
    "finetuning_type": "--lora True",
    "use_peft": "--lora True",
    "lora_rank": "--lora_r",
    "lora_target": "--lora_target_modules",
    "lora_target_linear": "--lora_target_modules all-linear",
    "lora_modules_to_save": "--lora_embeddings full",
    "load_in_4bit": "--qlora True",
    "quantization_bit": "--qlora True",
    "flash_attention": "--attn_implementation flash_attention_2",
    "flash_attn": "--attn_implementation",
    "gradient_clipping": "--max_grad_norm",
    "wandb_project": "--report_to wandb",
    "saves_per_epoch": "--save_steps",
    "evals_per_epoch": "--eval_steps",
    "template": "--chat_template",
    "chat_template_path": "--chat_template",
    "roles_to_train": "nothing: every assistant turn is trained",
    "train_on_inputs": "nothing: prompts are masked",
    "assistant_only_loss": "nothing: every assistant turn is trained",
    "completion_only_loss": "nothing: prompts are masked",
    "hub_model_name": "--hub_model_id",
    "loss_type": "--mode",
}


PATHS = {  # flags whose values are files, folders, or names of other things
    "model_name_or_path", "data_path", "eval_path", "output_dir", "cache_dir", "cost", "teacher",
    "chat_template", "sample_prompts", "resume_from_checkpoint", "deepspeed", "logging_dir",
}  # fmt: skip


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:  # type: ignore[override]
        raise UserError(message)


def parse(argv: list[str], recipe: Mapping[str, Any] | None = None) -> Run:
    """Returns the arguments of a run. The recipe has the defaults of flags that are not given.

    Raises:
        UserError: argparse or Hugging Face rejects an argument.
    """
    if {"-h", "--help", "--help-all"} & set(argv):
        show(help_text(everything="--help-all" in argv))
        sys.exit(0)
    argv, made_with = with_config(argv)
    argv = [*not_given(_of_another_mode(recipe or {}, argv), argv), *argv]
    for flag in split_flags(argv):
        keep_secret(*(flag.values if flag.name in SECRET else []))
        keep_secret(*SECRET_SETTING.findall(" ".join(flag.values)))
        for value in flag.values if flag.name in PATHS else []:
            check_path(flag.name, "" if value.startswith("{") else value)
    argv, notes = translate(argv, has_tf32=is_torch_tf32_available())
    parser = _Parser(FLAGS, allow_abbrev=False)
    options = [option for action in parser._actions for option in action.option_strings]
    taken = {option.lstrip("-").replace("-", "_") for option in options}
    for flag in split_flags(argv):  # before what is missing, which may be there by another name
        if flag.name not in taken:
            raise _unknown(flag.tokens[0], options)
    try:
        parts = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        model, data, objective, lora, training, unknown = parts
    except OverflowError as error:
        names = [flag.name for flag in split_flags(argv) if {"inf", "Infinity"} & {*flag.values}]
        named = ", ".join(f"--{name}" for name in names) or "a flag"
        raise UserError(f"{named}: {first_line(error)}; give a finite number") from None
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(str(error)) from None
    if unknown:
        raise _unknown(unknown[0], options)
    own = {f.name for cls in FLAGS for f in dataclasses.fields(cls)} - {
        f.name for f in dataclasses.fields(transformers.TrainingArguments)
    }
    given = vars(parser.parse_known_args(argv)[0])
    if data.block_size is not None:
        asked = {flag.name: flag.values for flag in split_flags(argv)}.get(
            "model_max_length", [str(data.block_size)]
        )
        if asked != [str(data.block_size)]:
            raise UserError("--block_size takes the place of --model_max_length: drop that")
        given["model_max_length"] = training.model_max_length = data.block_size
    flags = {
        name: [_word(item) for item in value] if isinstance(value, list) else _word(value)
        for name, value in given.items()
        if name not in SECRET
        and (
            (name in own and value is not None)
            or value != parser.get_default(name)
            or name == "seed"
        )
        and not (name == "mode" and objective.loss is not None)
    }
    return Run(model, data, objective, lora, training, flags, made_with, notes)


def _unknown(token: str, options: list[str]) -> UserError:
    name = token.split("=")[0]
    hint = FOREIGN.get(name.lstrip("-").replace("-", "_"))
    said = f"; did you mean {hint}?" if hint else nearest(name, ["--config", *options])
    return UserError(f"unknown argument {name}{said}")


def _of_another_mode(recipe: Mapping[str, Any], argv: list[str]) -> Mapping[str, Any]:
    """Returns the recipe without its mode if the command line has one, or a loss of its own."""
    chosen = {flag.name for flag in split_flags(argv)} & {"mode", "loss"}
    if len(chosen) == 2:
        raise UserError("--mode and --loss exclude each other: drop one")
    return {name: value for name, value in recipe.items() if not (chosen and name == "mode")}


def _word(value: Any) -> Any:
    """Returns a value as YAML can write it: of an enum, its word."""
    return getattr(value, "value", value)
