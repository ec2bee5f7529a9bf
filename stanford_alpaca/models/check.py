"""Whether a model can be loaded, and whose code would run: found out before anything large is read."""

import copy
import re
from pathlib import Path

from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from stanford_alpaca.checkpoint.run_file import MADE_WITH
from stanford_alpaca.console import quiet_hub, say
from stanford_alpaca.data.reading import exists
from stanford_alpaca.errors import UserError, first_line
from stanford_alpaca.models.identity import BASE, base_has_changed, check_unchanged, run_of
from stanford_alpaca.models.load import (
    ADAPTER_CONFIG,
    CONVERT,
    ModelSource,
    base_of,
    cannot_load,
    grow_for_adapter,
)

WRAPPERS = re.compile(
    r"\.(modules_to_save|original_module|base_layer|token_adapter)(?=\.)"
)  # peft's
SIZED = {
    "weight": 0,
    "lora_B.weight": 0,
    "lora_embedding_A": 1,
}  # tensors of an embedding, and their axis of tokens

LONGEST = 250  # characters of a name


def check_model(
    source: ModelSource,
    *,
    or_adapter: bool = False,
    weights: bool = True,  # whether its weights are going to be read
    verify: bool = False,
) -> None:
    """Raises UserError if there is no causal LM to load, or no adapter of one, before anything larger is read.

    A folder with a manifest has to be what was saved (``check_unchanged``, also for ``verify``), and an adapter's base what it
    was when the adapter was trained. With its ``remote_code`` it says whose code is going to run.
    """
    path, cache_dir = source.path, source.cache_dir
    place = check_place(path)
    is_adapter = base_of(path) is not None
    if is_adapter and not or_adapter:
        raise UserError(
            f"{path}: an adapter, no whole model; merge it first: bash merge.sh {path} OUTPUT"
        )
    if not is_adapter and (place / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{path}: holds a whole model and an adapter beside it; take one of them away"
        )
    if weights:
        _check_weights(place, "adapter_model.bin" if is_adapter else "pytorch_model*.bin*")
        check_unchanged(place, verify)
    if is_adapter:
        check_adapter(source, verify=verify)
        then = (run_of(place).get(MADE_WITH) or {}).get(BASE)
        if changed := base_has_changed(path, str(base_of(path)), then, cache_dir):
            raise UserError(f"{changed}; put that one there, or a link to it")
        return
    try:
        with quiet_hub():
            if source.remote_code:
                for code in _code_of(path, cache_dir):
                    say(f"--trust_remote_code: {code} runs here, with your rights")
            source.config()
    except UserError:
        raise
    except Exception as error:  # of the hub, about code
        raise cannot_load(path, error) from None


def check_place(path: str) -> Path:
    """The path. Raises UserError if it was meant to be a folder, is no hub name, and there is none."""
    if not path.strip():
        raise UserError(
            "a model without a name, as of a variable that is not set; give a Hugging Face folder or a hub name"
        )
    place = Path(path).expanduser()
    beside = path.startswith((".", "/", "~")) or (
        len(place.parts) > 1 and Path(place.parts[0]).exists()
    )
    if not exists(place) and len(path) > LONGEST:  # of which file systems say something else
        raise UserError(f"{path[:40]}...: no folder and no hub name has {len(path)} characters")
    if not place.is_dir() and (beside or len(place.parts) > 2):
        raise UserError(
            f"{path}: cannot load a model from here (no such folder); give a Hugging Face folder or a hub name"
        )
    return place


def _check_weights(folder: Path, pickles: str) -> None:
    """Raises UserError for a folder that has pickled weights and no others."""
    found = sorted(folder.glob(pickles))
    if found and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder}: {found[0].name} is a pickle, which could run code, and is not read; {CONVERT.format(folder)}"
        )


def _code_of(path: str, cache_dir: str | None) -> list[str]:
    """The code that a model and its tokenizer bring along, as REPOSITORY: MODULE."""
    maps = [
        PreTrainedConfig.get_config_dict(path, cache_dir=cache_dir)[0].get("auto_map"),
        get_tokenizer_config(path, cache_dir=cache_dir).get("auto_map"),
    ]
    names: set[str] = set()
    for found in maps:
        values = found.values() if isinstance(found, dict) else [found]
        names.update(
            str(name)
            for value in values
            for name in (value if isinstance(value, list | tuple) else [value])
            if name
        )
    places = [name.rpartition("--") for name in names]  # OTHER_REPOSITORY--module.Class
    return sorted({f"{other or path}: {name.partition('.')[0]}.py" for other, _, name in places})


def check_adapter(
    source: ModelSource,
    *,
    base: ModelSource | None = None,
    tokens: int = 0,
    verify: bool = False,
) -> int:
    """Whether an adapter's base can be loaded and has the layers that it was trained on.

    Args:
        source: the adapter's folder.
        base: in place of what its configuration names.
        tokens: rows for a base with fewer, where the adapter has no embedding of its own; by default as ``ModelSource.load`` does it.

    Returns:
        The rows of the embedding with which the adapter fits.

    Raises:
        UserError: it does not.
    """
    path = source.path
    try:
        base = base or source.at(str(base_of(path)))
        try:
            check_model(base, verify=verify)
        except UserError as error:
            raise UserError(f"the base of {path}: {error}; a link at that place will do") from None
        config = PeftConfig.from_pretrained(path)
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # others decompose the weights, which are not read here
        with safe_open(Path(path) / ADAPTER_SAFE_WEIGHTS_NAME, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, no dict
        model = copy.deepcopy(base.empty())
        own = set(model.state_dict())
        if not tokens:
            grow_for_adapter(model, path)
        rows = fitting = model.get_input_embeddings().weight.shape[0]
        if tokens and (fitting := max(rows, _rows_of(model, shapes) or tokens)) > rows:
            model.resize_token_embeddings(fitting, mean_resizing=False)
        wanted = get_peft_model_state_dict(
            get_peft_model(model, config), save_embedding_layers=False
        )
    except UserError:
        raise
    except (
        Exception
    ) as error:  # no JSON, no such key, a kind of adapter that peft does not know, a damaged file
        raise UserError(
            f"{path}: cannot load this adapter ({first_line(error)}); train it again, or give another"
        ) from None
    other = f"{path}: an adapter of another base than {base.path} (which has {rows} tokens)"
    mend = f"mend base_model_name_or_path in its {ADAPTER_CONFIG}"
    for name, tensor in wanted.items():
        if name not in shapes or list(tensor.shape) != list(shapes[name]):
            has = list(shapes[name]) if name in shapes else "missing"
            raise UserError(f"{other}: {name} is {has}, wanted {list(tensor.shape)}; {mend}")
    for name in sorted(shapes.keys() - wanted.keys()):
        if (
            _base_name(name) not in own
        ):  # peft saves copies of the base's embedding beside its own tensors
            raise UserError(f"{other}: it has no layer for {name}; {mend}")
    return fitting


def _rows_of(model: PreTrainedModel, shapes: dict[str, list[int]]) -> int:
    """Of how many tokens the adapter itself has rows of the embedding or the output layer; 0 if of none."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if module in layers]
    axes = {f"{name}.{part}": axis for name in names for part, axis in SIZED.items()}
    sizes = ((_base_name(key), shape) for key, shape in shapes.items())
    return max((shape[axes[key]] for key, shape in sizes if key in axes), default=0)


def _base_name(key: str) -> str:
    """The name in the base of a tensor that peft saved, if it is one of the base's: without what stands around modules."""
    return WRAPPERS.sub("", key.removeprefix("base_model.model."))
