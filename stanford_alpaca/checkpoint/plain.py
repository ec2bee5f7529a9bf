"""Loads a plain Hugging Face folder, or a peft adapter, into the model that it was saved from."""

import copy
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from stanford_alpaca.checkpoint.keys import no_report, wrong_keys
from stanford_alpaca.checkpoint.shapes import check_shapes, tensor_form
from stanford_alpaca.errors import ResumeError, first_line

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def restore_model(model: PreTrainedModel | PeftModel, checkpoint: Path) -> None:
    """Loads the weights into a model that is not sharded.

    Raises:
        ResumeError: a tensor, which the message names, is missing, foreign, or of another shape or
            dtype than the model's.
    """
    try:
        if isinstance(model, PeftModel):
            return _load_adapter(model, checkpoint / ADAPTER_SAFE_WEIGHTS_NAME)
        _check_dtypes(checkpoint, {p.dtype for p in model.parameters()})
        read = _read_into_a_copy(model, checkpoint)
    except (OSError, SafetensorError) as error:
        raise ResumeError(f"{checkpoint}: cannot be read ({first_line(error)})") from None
    model.load_state_dict(read.state_dict())


def _read_into_a_copy(model: PreTrainedModel, checkpoint: Path) -> PreTrainedModel:
    """Lets transformers read the weights into a new model.

    transformers knows which weights are tied, and which are stored in another shape than they are
    computed with.
    """
    with no_report():
        read, info = type(model).from_pretrained(
            checkpoint,
            config=copy.deepcopy(model.config),
            dtype=next(model.parameters()).dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    if wrong := wrong_keys(info):
        raise ResumeError(
            f"{checkpoint}: its weights do not fill the model ({wrong}); is it of another model?"
        )
    return read


def _check_dtypes(checkpoint: Path, dtypes: set[torch.dtype]) -> None:
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                dtype = FLOATS.get(tensors.get_slice(name).get_dtype())
                if dtype is not None and dtype not in dtypes:
                    wanted = ", ".join(sorted(map(str, dtypes)))
                    raise ResumeError(
                        f"{file}: {name} is {dtype}, and {wanted} in the model; was it changed?"
                    )


def _load_adapter(model: PeftModel, file: Path) -> None:
    saved, wanted = load_file(file), get_peft_model_state_dict(model, save_embedding_layers=False)
    check_shapes(
        file,
        {name: tensor_form(t) for name, t in saved.items()},
        {name: tensor_form(t) for name, t in wanted.items()},
    )
    set_peft_model_state_dict(model, saved)
