"""Loads a tokenizer and a causal LM from a folder or the hub, ready for fine-tuning: float32 weights, a pad token.

Code that a model's repository brings along is never run.
"""

import json
import warnings
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from stanford_alpaca.errors import UserError, first_line, nearest, quiet_hub

PAD_TOKEN, EOS_TOKEN = "[PAD]", "</s>"  # Alpaca's names for the tokens a tokenizer lacks


def check_model(path: str, cache_dir: str | None = None, *, or_adapter: bool = False) -> None:
    """Raises UserError if there is no causal LM to load, or no adapter of one, before anything larger is read."""
    place = Path(path).expanduser()
    beside = place.is_absolute() or (len(place.parts) > 1 and Path(place.parts[0]).exists())
    if not place.is_dir() and (beside or len(place.parts) > 2):  # a path that was meant to be local, no hub name
        raise UserError(f"{path}: cannot load a model from here (no such folder); give a Hugging Face folder or a hub name")
    if (place / "adapter_config.json").is_file() and not (place / "config.json").is_file():
        if not or_adapter:
            raise UserError(f"{path}: an adapter, no whole model; load it with peft's PeftModel.from_pretrained(base, folder)")
        path = json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"]
        return check_model(path, cache_dir)
    try:
        with quiet_hub():
            AutoConfig.from_pretrained(path, cache_dir=cache_dir, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError or a hub error, depending on what is wrong
        raise _cannot_load(path, error) from None


def load_tokenizer(
    path: str, max_length: int | None = None, cache_dir: str | None = None, *, may_grow: bool = True
) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the right. Missing pad and end-of-sequence tokens are added, as Alpaca does.

    With ``may_grow=False`` it gets no new token: the end-of-sequence token pads (padding is masked by length).
    """
    options = {} if max_length is None else {"model_max_length": max_length}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, cache_dir=cache_dir, padding_side="right", trust_remote_code=False, **options
        )
    except Exception as error:
        raise _cannot_load(path, error) from None
    if not may_grow and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    missing = {}
    if tokenizer.eos_token is None:
        missing["eos_token"] = EOS_TOKEN
    if tokenizer.pad_token is None:
        missing["pad_token"] = PAD_TOKEN
    tokenizer.add_special_tokens(missing)
    return tokenizer


def load_model(
    path: str, cache_dir: str | None = None, dtype: torch.dtype = torch.float32, *, from_config: bool = False, **options
) -> PreTrainedModel:
    """The causal LM in ``dtype``: float32 masters by default, whatever the checkpoint holds. From an adapter, its base with it.

    ``from_config`` reads the configuration alone and gives the model random weights.
    """
    try:
        if from_config:
            config = AutoConfig.from_pretrained(path, cache_dir=cache_dir, trust_remote_code=False)
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **options)
        return AutoModelForCausalLM.from_pretrained(path, cache_dir=cache_dir, dtype=dtype, trust_remote_code=False, **options)
    except Exception as error:
        raise _cannot_load(path, error) from None


def empty_model(
    path: str, cache_dir: str | None = None, dtype: torch.dtype = torch.float32, *, from_config: bool = False, **options
) -> PreTrainedModel:
    """What ``load_model`` returns, with parameters on the meta device: for ranks that get the weights from another one."""
    try:
        config = AutoConfig.from_pretrained(path, cache_dir=cache_dir, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):  # most buffers are computed, not stored
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **options)
        model.tie_weights()
        return model
    except Exception as error:
        raise _cannot_load(path, error) from None


@torch.no_grad()
def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Grows the embeddings to the tokenizer's size, new rows the mean of the old ones; never shrinks padded ones.

    Returns:
        The number of rows added. Also sets the model's pad and end-of-sequence ids.
    """
    old = model.get_input_embeddings().weight.shape[0]
    added = max(0, len(tokenizer) - old)
    if added:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[old:] = layer.weight[:old].mean(dim=0)
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
        if config.eos_token_id is None:
            config.eos_token_id = tokenizer.eos_token_id
    return added


def add_lora(model: PreTrainedModel, r: int, alpha: int, dropout: float, targets: list[str] | None = None) -> PeftModel:
    """The model with a float32 LoRA adapter that alone is trained; ``targets`` are names or endings of names of linear layers.

    By default all linear layers but the output layer have one. Raises UserError for targets that cannot.
    """
    output = model.get_output_embeddings()
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not output]
    endings = sorted({name.rpartition(".")[2] for name in linear})
    for target in targets or []:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise UserError(
                f"--lora_target_modules {target}: no linear layer that can have an adapter; "
                f"choose from {', '.join(endings)}{nearest(target, endings)}"
            )
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets or linear
    )
    warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft asks by the old name
    return get_peft_model(model, config)


def _cannot_load(path: str, error: Exception) -> UserError:
    advice, place = "give a Hugging Face folder or a hub name", Path(path)
    if (place / "trainer_state.json").is_file() and not list(place.glob("*.safetensors")):
        advice = f"make one of this checkpoint's shards: python -m stanford_alpaca.checkpoint export {path} OUT"
    return UserError(f"{path}: cannot load a model from here ({first_line(error)}); {advice}")
