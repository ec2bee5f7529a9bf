"""Loads a tokenizer and a causal LM from a folder or the hub, ready for fine-tuning.

By default the weights are float32, and the tokenizer has a pad token. Code that a model's
repository brings along runs only with ``remote_code``. Pickled weights are never read.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from stanford_alpaca.checkpoint.bounded import read_json
from stanford_alpaca.checkpoint.keys import no_report, wrong_keys
from stanford_alpaca.errors import UserError, first_line, listed

ADAPTER_CONFIG = "adapter_config.json"
CONVERT = (
    'if you trust it, convert it once: python -c "from transformers import '
    "AutoModelForCausalLM as M, AutoTokenizer as T; "
    "[c.from_pretrained('{0}').save_pretrained('CONVERTED') for c in (M, T)]\""
)
# peft uses the old name
logging.disable_progress_bar()  # reading and writing weights needs no bar
warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
PAD_TOKEN, EOS_TOKEN = "[PAD]", "</s>"  # Alpaca's names for the tokens a tokenizer lacks


def base_of(path: str) -> str | None:
    """Returns the base that an adapter's folder names, or None for a whole model or a hub name.

    Raises:
        UserError: the adapter's configuration names no base.
    """
    file = Path(path).expanduser() / ADAPTER_CONFIG
    if not file.is_file() or file.with_name("config.json").is_file():
        return None
    try:
        return str(read_json(file)["base_model_name_or_path"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{file}: names no base_model_name_or_path ({first_line(error)}); write it there"
        ) from None


@dataclass(frozen=True)
class ModelSource:
    """Where a causal LM comes from, and how it is read.

    Attributes:
        path: a Hugging Face folder or a hub name. An adapter's folder stands for its base with the
            adapter.
        cache_dir: where the hub's files are kept.
        remote_code: runs code that the model's repository brings along.
        attn_implementation: the attention implementation of transformers; None for its default.
        from_config: reads the configuration alone and gives the model random weights.
    """

    path: str
    cache_dir: str | None = None
    remote_code: bool = False
    attn_implementation: str | None = None
    from_config: bool = False

    def at(self, path: str) -> "ModelSource":
        """Returns a source that reads another model in the same way."""
        return replace(self, path=path)

    def config(self) -> PreTrainedConfig:
        """Returns the configuration; for an adapter, that of its base.

        Raises:
            UserError: there is none.
        """
        path = base_of(self.path) or self.path
        try:
            return AutoConfig.from_pretrained(
                path, cache_dir=self.cache_dir, trust_remote_code=self.remote_code
            )
        except Exception as error:
            raise cannot_load(self.path, error) from None

    def tokenizer(
        self,
        max_length: int | None = None,
        *,
        may_grow: bool = True,
        tell: Callable[[str], None] = lambda line: None,
    ) -> PreTrainedTokenizerBase:
        """Returns the tokenizer, which pads on the right.

        Missing pad and end-of-sequence tokens are added as Alpaca does it, and ``tell`` gets a line
        about each. With ``may_grow=False`` the end-of-sequence token serves as a missing pad token
        (padding is masked by length).
        """
        options = {} if max_length is None else {"model_max_length": max_length}
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.path,
                cache_dir=self.cache_dir,
                padding_side="right",
                trust_remote_code=self.remote_code,
                **options,
            )
        except Exception as error:
            raise cannot_load(self.path, error) from None
        if not may_grow and tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        missing = {}
        if tokenizer.eos_token is None:
            missing["eos_token"] = EOS_TOKEN
        if tokenizer.pad_token is None:
            missing["pad_token"] = PAD_TOKEN
        tokenizer.add_special_tokens(missing)
        for name, token in missing.items():
            tell(f"{self.path}: the tokenizer has no {name}: {token} is one now")
        return tokenizer

    def load(self, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
        """Loads the model in ``dtype``, whatever the checkpoint holds; by default float32 masters.

        ``options`` are passed to transformers.

        Raises:
            UserError: there is no model, or its weights do not fill its architecture.
        """
        base, config = base_of(self.path), self.config()
        options |= self._options(dtype)
        try:
            if self.from_config:
                return auto_class(config).from_config(config, **options)
            with no_report():
                model, info = auto_class(config).from_pretrained(
                    base or self.path,
                    cache_dir=self.cache_dir,
                    use_safetensors=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    **options,
                )
            if wrong := wrong_keys(info):
                raise UserError(
                    f"{base or self.path}: its weights do not fill its architecture ({wrong}); "
                    "give a complete model"
                )
            # transformers also loads an adapter that lies beside the weights
            if getattr(model, "_hf_peft_config_loaded", False):
                raise UserError(
                    f"{self.path}: holds a whole model and an adapter beside it; "
                    "take one of them away"
                )
            if base is None:
                return model
            grow_for_adapter(model, self.path)
            return PeftModel.from_pretrained(
                model, self.path, use_safetensors=True
            ).get_base_model()
        except UserError:
            raise
        except Exception as error:
            raise cannot_load(self.path, error) from None

    def empty(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Returns the architecture with its parameters on the meta device.

        It is built once per dtype, so copy it before changing it.
        """
        if dtype not in self._built:
            try:
                config = AutoConfig.from_pretrained(
                    self.path, cache_dir=self.cache_dir, trust_remote_code=self.remote_code
                )
                # most buffers are computed, not stored
                with init_empty_weights(include_buffers=False):
                    model = auto_class(config).from_config(config, **self._options(dtype))
                model.tie_weights()
            except Exception as error:
                raise cannot_load(self.path, error) from None
            self._built[dtype] = model
        return self._built[dtype]

    @cached_property
    def _built(self) -> dict[torch.dtype, PreTrainedModel]:
        return {}

    def _options(self, dtype: torch.dtype) -> dict[str, Any]:
        attention = (
            {}
            if self.attn_implementation is None
            else {"attn_implementation": self.attn_implementation}
        )
        return {"dtype": dtype, "trust_remote_code": self.remote_code, **attention}


def load_body(source: ModelSource) -> PreTrainedModel:
    """Loads a model without its output layer, in float32, to compute features of texts.

    Weights of an output layer are not loaded. A pooling layer without weights is not used.

    Raises:
        UserError: other weights are missing.
    """
    with no_report():
        model, info = AutoModel.from_pretrained(
            source.path,
            dtype=torch.float32,
            cache_dir=source.cache_dir,
            use_safetensors=True,
            trust_remote_code=source.remote_code,
            output_loading_info=True,
        )
    missing = [key for key in info["missing_keys"] if "pooler" not in key.split(".")]
    if missing:
        raise UserError(
            f"its weights do not fill its architecture (missing: {listed(sorted(missing), 3)})"
        )
    return model


def auto_class(config: PreTrainedConfig) -> Any:
    """Returns the auto class that loads a model that writes text.

    Models that also see images, and are saved in that form, have a mapping of their own.
    """
    named = (config.architectures or [""])[0]
    sees = getattr(
        AutoModelForImageTextToText._model_mapping.get(type(config), None), "__name__", None
    )
    writes = type(config) in AutoModelForCausalLM._model_mapping
    return (
        AutoModelForImageTextToText
        if sees is not None and (named == sees or not writes)
        else AutoModelForCausalLM
    )


def unread_parts(model: PreTrainedModel) -> list[str]:
    """Returns the names of the parameters that no text passes through, such as those for images."""
    if model.config.get_text_config() is model.config:
        return []
    read = {
        id(parameter)
        for part in (model.get_decoder(), model.get_output_embeddings())
        for parameter in part.parameters()
    }
    return [name for name, parameter in model.named_parameters() if id(parameter) not in read]


def grow_for_adapter(base: PreTrainedModel, adapter: str) -> None:
    """Adds a row to the base for each token that was added when the adapter was trained.

    The rows are made as in training.
    """
    if (Path(adapter) / "tokenizer_config.json").is_file():
        fit_vocabulary(base, AutoTokenizer.from_pretrained(adapter))


@torch.no_grad()
def fit_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int | None = None
) -> int:
    """Grows the embeddings to ``rows``, by default the tokenizer's size, but never shrinks them.

    New rows are the mean of the old ones. The model's pad id is set, and its end-of-sequence id if
    it has none.

    Returns:
        The number of rows added.
    """
    old = model.get_input_embeddings().weight.shape[0]
    added = max(0, (len(tokenizer) if rows is None else rows) - old)
    if added:
        model.resize_token_embeddings(old + added, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[old:] = layer.weight[:old].mean(dim=0)
    for config in (model.config, model.config.get_text_config(), model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
        if getattr(config, "eos_token_id", None) is None:
            config.eos_token_id = tokenizer.eos_token_id
    return added


def cannot_load(path: str, error: Exception) -> UserError:
    """Returns the UserError to raise for an error of transformers or the hub."""
    place, what = Path(path).expanduser(), first_line(error)
    fault, advice = "cannot load a model from here", "give a Hugging Face folder or a hub name"
    if (place / "config.json").is_file():
        fault, advice = (
            "transformers cannot load this folder",
            "mend it or give another",
        )
    if "trust_remote_code" in str(error):
        what, advice = (
            "it runs code of its own",
            "read that code, then allow it with --trust_remote_code",
        )
    elif (place / "trainer_state.json").is_file() and not list(place.glob("*.safetensors")):
        advice = (
            "make one of this checkpoint's shards: "
            f"python -m stanford_alpaca.checkpoint export {path} OUT"
        )
    elif "safetensors" in what and not place.exists():
        advice = CONVERT.format(path)
    return UserError(f"{path}: {fault} ({what}); {advice}")
