"""Exports a checkpoint of any engine as a plain Hugging Face folder.

This takes one process and no GPU, and holds the whole model in memory once.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    CHAT_TEMPLATE_DIR,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
)

from stanford_alpaca.checkpoint import fsdp, manifest, zero
from stanford_alpaca.checkpoint.keys import no_report, wrong_keys
from stanford_alpaca.checkpoint.kinds import FSDP, ZERO, kind_of
from stanford_alpaca.errors import ResumeError, UserError, first_line

SHARDED: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    FSDP: fsdp.read_weights,
    ZERO: zero.read_weights,
}
NOT_EXPORTED = ("trainer_state.json", manifest.MANIFEST_FILE)
BESIDE = (".json", ".jinja", ".model", ".txt")  # files of the configuration and tokenizer


def export(checkpoint: Path, out: Path) -> str:
    """Writes ``out`` completely or not at all, and returns a line about it.

    Raises:
        ResumeError: the checkpoint's files are not what its manifest says.
        UserError: there is no checkpoint, shards are missing, or the weights do not match the
            configuration.
    """
    kind = kind_of(checkpoint)
    damaged = manifest.summary(checkpoint) if (checkpoint / manifest.MANIFEST_FILE).exists() else ""
    if damaged:
        raise ResumeError(f"{checkpoint}: {damaged}; another checkpoint may be whole")
    # every engine saves an adapter whole, beside its shards
    whole = (checkpoint / ADAPTER_SAFE_WEIGHTS_NAME).is_file()
    weights = _fit(SHARDED[kind](checkpoint), checkpoint) if kind in SHARDED and not whole else None
    with atomic_folder(out) as part:
        # a tokenizer with several chat templates keeps the named ones in a folder
        if (checkpoint / CHAT_TEMPLATE_DIR).is_dir():
            shutil.copytree(checkpoint / CHAT_TEMPLATE_DIR, part / CHAT_TEMPLATE_DIR)
        for file in checkpoint.iterdir():
            if file.is_file() and file.suffix in BESIDE and file.name not in NOT_EXPORTED:
                shutil.copy(file, part)
        if weights is None:
            for file in checkpoint.glob("*.safetensors"):
                shutil.copy(file, part)
        else:
            model, state = weights
            # this file holds the tokens that end an answer; the model's configuration does not
            if (part / GENERATION_CONFIG_NAME).is_file():
                model.generation_config = GenerationConfig.from_pretrained(part)
            (part / SAFE_WEIGHTS_INDEX_NAME).unlink(missing_ok=True)
            model.save_pretrained(part, state_dict=state)
        line = _check(part)
    return f"{out}: {line}"


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yields a folder that becomes ``out`` if the block succeeds, and is deleted if it fails.

    Raises:
        UserError: the file system failed, or another command writes there already.
    """
    part = out.with_name(f"{out.name}.part")
    try:
        part.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"{part}: left by a command that did not end, or another writes there; remove it"
        ) from None
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({first_line(error)})") from None
    try:
        yield part
        part.replace(out)  # which is empty or does not exist
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written ({first_line(error)})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fit(read: dict[str, Tensor], checkpoint: Path) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Returns the checkpoint's model on the meta device, and its state dict.

    Tied weights are one tensor in the state dict.

    Raises:
        UserError: the configuration cannot be read, or it describes other weights.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{checkpoint}: no configuration to read ({first_line(error)})") from None
    if not read:
        raise UserError(f"{checkpoint}: its shards hold no weights")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=next(iter(read.values())).dtype, trust_remote_code=False
        )
    empty = model.state_dict(keep_vars=True)
    # of tied weights, one name that was saved
    first = {id(value): name for name, value in reversed(empty.items()) if name in read}
    lacking = [name for name, value in empty.items() if id(value) not in first]
    foreign = sorted(read.keys() - empty.keys())
    if lacking or foreign:
        raise UserError(
            f"{checkpoint}: not the weights of its config.json "
            f"(lacks {lacking[:3]}, has {foreign[:3]} besides)"
        )
    for name, value in empty.items():
        if read[first[id(value)]].shape != value.shape:
            raise UserError(
                f"{checkpoint}: {name} is {list(read[first[id(value)]].shape)}, "
                f"not {list(value.shape)}"
            )
    return model, {name: read[first[id(value)]] for name, value in empty.items()}


def _check(folder: Path) -> str:
    """Loads the folder as its users will, on the meta device, and returns a line about it.

    Raises:
        UserError: a key is missing, foreign or misshapen.
    """
    try:
        with no_report():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:
        raise UserError(f"the exported folder cannot be loaded ({first_line(error)})") from None
    if wrong := wrong_keys(info):
        raise UserError(f"the exported folder has not the keys of its config.json ({wrong})")
    parts = "in several files" if (folder / SAFE_WEIGHTS_INDEX_NAME).exists() else "in one file"
    return (
        f"{model.num_parameters():,} parameters in {str(model.dtype).removeprefix('torch.')}, "
        f"{parts}; all keys are there"
    )
