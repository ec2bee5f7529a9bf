"""Merges an adapter into the weights of its base, and compares the logits before and after."""

import gc
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from stanford_alpaca.checkpoint import manifest
from stanford_alpaca.checkpoint.export import atomic_folder
from stanford_alpaca.checkpoint.space import check_space
from stanford_alpaca.console import say
from stanford_alpaca.errors import UserError, first_line
from stanford_alpaca.models.adapters import MERGED, Adapter, merged_into
from stanford_alpaca.models.check import check_adapter
from stanford_alpaca.models.identity import identify_model
from stanford_alpaca.models.load import ModelSource, fit_vocabulary
from stanford_alpaca.models.savable import make_savable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = 1e-4  # relative to the largest logit
ROWS, LENGTH = 4, 32  # shape of the token ids on which logits are compared


def merge(adapter: Adapter, base: ModelSource, out: Path, dtype: str | None) -> str:
    """Writes the merged model to ``out``, completely or not at all, and returns a line about it.

    The model is in memory once, in float32.

    Raises:
        UserError: the adapter does not fit or cannot be merged, or the merged model computes other
            logits.
    """
    has_tokenizer = (adapter.folder / "tokenizer_config.json").is_file()
    own = base.at(str(adapter.folder))
    tokenizer = (own if has_tokenizer else base).tokenizer(may_grow=False, tell=say)
    rows = check_adapter(own, base=base, tokens=len(tokenizer))
    written = DTYPES[dtype] if dtype else base.config().dtype or torch.float32
    parameters = base.empty().num_parameters()
    check_space(
        out.parent, parameters * written.itemsize, "the merged model", "or write a smaller --dtype"
    )
    model = load_float32(base)
    if adapter.run.get("qlora"):
        say(
            f"{adapter.name}: trained beside 4-bit weights, "
            f"and merged into the {base.path} that they were rounded from"
        )
    if added := fit_vocabulary(model, tokenizer, rows):
        say(
            f"{base.path}: {added} row(s) added to its embedding, the mean of the others, "
            f"for the tokenizer's {len(tokenizer)}"
        )
    model, about = merge_weights(model, adapter)
    if added := fit_vocabulary(model, tokenizer):
        say(
            f"{base.path}: {added} token(s) of the tokenizer have no row in the adapter: "
            "they got the mean of the others"
        )
    make_savable(model, tokenizer, base.path)
    about |= {
        "base": shown(base.path),
        "base_identity": identify_model(base.path, base.cache_dir),
        "adapter": shown(adapter.name),
        "adapter_sha256": adapter.sha256,
        "dtype": str(written).removeprefix("torch."),
    }
    logits = about.pop("logits")
    with atomic_folder(out) as part:
        model.to(written).save_pretrained(part)
        tokenizer.save_pretrained(part)
        del model
        gc.collect()
        about["logits_differ_written"] = compare_written(base.at(str(part)), logits, written)
        history = [*merged_into(base.path), adapter.sha256]
        record = {"merged_from": about, "adapters": history}
        manifest.write_whole(part / MERGED, json.dumps(record, indent=1) + "\n")
        files = manifest.entries_of(part, manifest.list_saved(part), flush=True)
        manifest.write(part, files, {"step": 0})
    return describe_merge(about, adapter, base, out)


def describe_merge(about: dict[str, Any], adapter: Adapter, base: ModelSource, out: Path) -> str:
    """Returns a line about what was merged and how much its logits differ."""
    where = ", ".join([f"{about['layers']} layer{'s' * (about['layers'] != 1)}", *about["modules"]])
    rounded = f" ({about['logits_differ_written']:.1g} in {about['dtype']})"
    return (
        f"merged {adapter.size} into {where} of {base.path}; "
        f"logits of up to {about['logits_scale']:.2g} differ by at most "
        f"{about['logits_differ']:.1g}{rounded if about['dtype'] != 'float32' else ''}; "
        f"saved the {about['dtype']} model to {out}"
    )


def shown(name: str) -> str:
    """Returns a hub name, or the last part of a folder's path, whose other parts are private."""
    place = Path(name).expanduser()
    return place.resolve().name if place.exists() else name


def load_float32(base: ModelSource) -> PreTrainedModel:
    """Loads the base in float32 on the CPU. A quantized base is dequantized into a plain model."""
    quantized = getattr(base.config(), "quantization_config", None)
    if quantized is None:
        return base.load().eval()
    try:
        model = base.load(device_map="cpu").dequantize(torch.float32)
        # saving would reverse these conversions, which do not apply to a plain model
        model._weight_conversions = None
        vars(model).pop("hf_device_map", None)
        say(f"{base.path}: its quantized weights are written out in full")
        return model.float().eval()  # weights that were not quantized kept their dtype
    except UserError as error:
        if "requires bitsandbytes" in str(error):
            raise UserError(
                f"{base.path}: quantized; install bitsandbytes to read it: pip install bitsandbytes"
            ) from None
        raise
    except Exception as error:  # a quantization that cannot be undone
        raise UserError(
            f"{base.path}: its quantized weights cannot be written out ({first_line(error)})"
        ) from None


@torch.no_grad()
def merge_weights(
    model: PreTrainedModel, adapter: Adapter
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Merges the adapter into the model's weights.

    Returns:
        The merged model, and a dict of what was done. Its ``logits`` are those before merging.

    Raises:
        UserError: peft cannot merge the adapter, or the logits after merging differ.
    """
    pair = model.get_input_embeddings(), model.get_output_embeddings()  # before peft may wrap them
    tied = pair[0].weight is pair[1].weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's on tied embeddings, which are handled here
        try:
            adapted = PeftModel.from_pretrained(
                model, str(adapter.folder), torch_device="cpu"
            ).eval()
        except Exception as error:
            raise UserError(
                f"{adapter.name}: cannot be loaded into its base ({first_line(error)})"
            ) from None
        ids = probe_ids(model, pair[0].weight.shape[0])
        before = adapted(input_ids=ids, use_cache=False).logits
        about = _inventory(adapted)
        untied = tied and pair != (model.get_input_embeddings(), model.get_output_embeddings())
        if untied:  # what is merged into one must not change the other
            pair[1].weight = nn.Parameter(pair[1].weight.clone())
        try:
            merged = adapted.merge_and_unload()
        except Exception as error:
            raise UserError(
                f"{adapter.name}: peft cannot merge {adapter.size} ({first_line(error)})"
            ) from None
        if untied:
            tie_if_equal(merged)
    after = merged(input_ids=ids, use_cache=False).logits
    difference, scale = (after - before).abs().max().item(), before.abs().max().item()
    if not difference <= TOLERANCE * scale:
        raise UserError(
            f"{adapter.name}: merged, its logits differ by {difference:.2g} (of {scale:.2g}); "
            "nothing is written"
        )
    return merged, about | {"logits_differ": difference, "logits_scale": scale, "logits": before}


def _inventory(adapted: PeftModel) -> dict[str, Any]:
    """Returns how many layers are adapted, which modules are trained whole, and the scales."""
    modules = dict(adapted.named_modules())
    whole = [name for name, part in modules.items() if isinstance(part, AuxiliaryTrainingWrapper)]
    inside = tuple(f"{name}." for name in whole)
    layers = [
        layer
        for name, layer in modules.items()
        if isinstance(layer, BaseTunerLayer) and not name.startswith(inside)
    ]
    scales = {value for layer in layers for value in getattr(layer, "scaling", {}).values()}
    return {
        "layers": len(layers),
        "modules": sorted(name.rpartition(".")[2] for name in whole),
        "scaling": sorted(scales),
    }


def probe_ids(
    model: PreTrainedModel, size: int
) -> Tensor:  # [ROWS, LENGTH], or as many as the model has positions
    """Returns token ids from all over the vocabulary, with the last ones, which may be new."""
    length = min(
        LENGTH, getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH
    )
    last = torch.arange(size - length // 2, size).clamp_min(0)
    ids = torch.linspace(0, size - 1, ROWS * length - len(last)).long()
    return torch.cat([ids, last]).view(length, ROWS).T.contiguous()


def tie_if_equal(model: PreTrainedModel) -> None:
    """Ties the embedding and the output layer again if the adapter changed both in the same way.

    Otherwise they stay untied, and a line says so.
    """
    inner, outer = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    equal = inner.shape == outer.shape and (inner - outer).abs().max() <= 1e-6 * inner.abs().max()
    for config in {
        id(each): each for each in (model.config, model.config.get_text_config())
    }.values():
        config.tie_word_embeddings = bool(equal)
    if equal:
        model.get_output_embeddings().weight = inner
    else:
        say(
            "the adapter has changed one of two tied embeddings: "
            "from now on they are two (tie_word_embeddings false)"
        )
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


@torch.no_grad()
def compare_written(written: ModelSource, want: Tensor, dtype: torch.dtype) -> float:
    """Loads the written folder as its users will, and returns the largest difference of its logits.

    Args:
        want: the float32 logits of the first tokens of its vocabulary.

    Raises:
        UserError: a key is missing or foreign, a logit is not finite, or float32 logits differ.
    """
    model = written.load(dtype)
    rows = want.shape[-1]
    logits = model.eval()(input_ids=probe_ids(model, rows), use_cache=False).logits[..., :rows]
    difference, scale = (logits.float() - want).abs().max().item(), want.abs().max().item()
    if not difference < float("inf"):
        raise UserError(
            f"in {str(dtype).removeprefix('torch.')} the merged model's logits are not finite; "
            "give --dtype bfloat16 or float32"
        )
    if dtype == torch.float32 and difference > TOLERANCE * scale:
        raise UserError(
            f"read again, its logits differ by {difference:.2g} (of {scale:.2g}); "
            "nothing is written"
        )
    return difference
