"""Checks whether a model can be loaded, and whose code would run, before anything large is read."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path

from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, cached_file

from stanford_alpaca.checkpoint.bounded import read_json, strange_file
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

# parts of names that peft adds where it wraps a module
PEFT_WRAPPERS = re.compile(r"\.(modules_to_save|original_module|base_layer|token_adapter)(?=\.)")
# tensors of an embedding, each with the axis of its tokens
SIZED = {"weight": 0, "lora_B.weight": 0, "lora_embedding_A": 1}

LONGEST = 250  # most characters of a model's name


def check_model(
    source: ModelSource,
    *,
    or_adapter: bool = False,
    weights: bool = True,  # whether the weights are going to be read
    verify: bool = False,
) -> None:
    """Raises UserError if there is no causal LM to load, before anything larger is read.

    With ``or_adapter`` an adapter of a causal LM will do too. A folder with a manifest has to be
    what was saved (see ``check_unchanged``, also for ``verify``). An adapter's base has to be what
    it was when the adapter was trained. With the source's ``remote_code``, a line says whose code
    is going to run.
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
    _check_files(path, cache_dir, weights)
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
    except Exception as error:  # from the hub, or about remote code
        raise cannot_load(path, error) from None


def check_place(path: str) -> Path:
    """Returns the path. Raises UserError if it is neither an existing folder nor a hub name."""
    if not path.strip():
        raise UserError(
            "a model without a name, as of a variable that is not set; "
            "give a Hugging Face folder or a hub name"
        )
    place = Path(path).expanduser()
    beside = path.startswith((".", "/", "~")) or (
        len(place.parts) > 1 and Path(place.parts[0]).exists()
    )
    # for such a path a file system would report something else
    if not exists(place) and len(path) > LONGEST:
        raise UserError(f"{path[:40]}...: no folder and no hub name has {len(path)} characters")
    if not place.is_dir() and (beside or len(place.parts) > 2):
        raise UserError(
            f"{path}: cannot load a model from here (no such folder); "
            "give a Hugging Face folder or a hub name"
        )
    return place


def _check_files(path: str, cache_dir: str | None, weights: bool) -> None:
    """Raises UserError for what a loader would wait for, or read outside of a model's folder.

    The index of weights of a hub name is downloaded. It names files, and only safetensors beside it
    are read.
    """
    place = Path(path).expanduser()
    indices = []
    if place.is_dir():
        if strange := strange_file(place):
            raise UserError(f"{strange}; wanted a file of a model")
        indices = sorted(place.glob("*.safetensors.index.json"))
    elif weights:
        try:
            with quiet_hub():
                found = cached_file(path, "model.safetensors.index.json", cache_dir=cache_dir)
            indices = [Path(str(found))]
        except Exception:  # there is none, or no such model: whoever reads the rest says so
            pass
    for index in indices:
        _check_index(index)


def _check_index(index: Path) -> None:
    try:
        named = set(read_json(index)["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: no index of weights ({first_line(error)})") from None
    for name in sorted(map(str, named)):
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise UserError(
                f"{index}: names {name}, and only safetensors beside it are read; give another copy"
            )


def _check_weights(folder: Path, pickles: str) -> None:
    """Raises UserError for a folder that has pickled weights and no others."""
    found = sorted(folder.glob(pickles))
    if found and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder}: {found[0].name} is a pickle, which could run code, and is not read; "
            f"{CONVERT.format(folder)}"
        )


def _code_of(path: str, cache_dir: str | None) -> list[str]:
    """Lists the code that a model and its tokenizer bring along, as ``REPOSITORY: MODULE.py``."""
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
    """Checks that an adapter's base can be loaded and has the layers the adapter was trained on.

    Args:
        source: the adapter's folder.
        base: the base to use in place of the one that the adapter's configuration names.
        tokens: how many rows a smaller base gets where the adapter has no embedding of its own. By
            default the base grows as in ``ModelSource.load``.

    Returns:
        The number of embedding rows with which the adapter fits.

    Raises:
        UserError: the adapter does not fit.
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
            # other ways decompose the base's weights, which are not read here
            config.init_lora_weights = True
        with safe_open(Path(path) / ADAPTER_SAFE_WEIGHTS_NAME, "pt") as file:
            names = file.keys()
            shapes = {name: file.get_slice(name).get_shape() for name in names}
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
    except Exception as error:  # not JSON, a missing key, unknown to peft, a damaged file
        raise UserError(
            f"{path}: cannot load this adapter ({first_line(error)}); "
            "train it again, or give another"
        ) from None
    problem = _misfit(wanted, shapes, own)
    if problem:
        raise UserError(
            f"{path}: an adapter of another base than {base.path} (which has {rows} tokens): "
            f"{problem}; mend base_model_name_or_path in its {ADAPTER_CONFIG}"
        )
    return fitting


def _misfit(wanted: Mapping[str, Tensor], shapes: Mapping[str, list[int]], own: set[str]) -> str:
    """Returns what of an adapter does not fit its base, in words, or nothing.

    Args:
        wanted: the tensors that an adapter of this base has.
        shapes: those that the adapter has.
        own: the names of the base's own tensors.
    """
    for name, tensor in wanted.items():
        if name not in shapes or list(tensor.shape) != list(shapes[name]):
            has = list(shapes[name]) if name in shapes else "missing"
            return f"{name} is {has}, wanted {list(tensor.shape)}"
    for name in sorted(shapes.keys() - wanted.keys()):
        # peft saves copies of the base's embedding beside its own tensors
        if _base_name(name) not in own:
            return f"it has no layer for {name}"
    return ""


def _rows_of(model: PreTrainedModel, shapes: dict[str, list[int]]) -> int:
    """Returns for how many tokens the adapter itself has rows of the embedding or output layer.

    This is 0 if it has no such rows.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if module in layers]
    axes = {f"{name}.{part}": axis for name in names for part, axis in SIZED.items()}
    sizes = ((_base_name(key), shape) for key, shape in shapes.items())
    return max((shape[axes[key]] for key, shape in sizes if key in axes), default=0)


def _base_name(key: str) -> str:
    """Strips peft's wrappers from the name of a saved tensor.

    The result is its name in the base, if it is one of the base's tensors.
    """
    return PEFT_WRAPPERS.sub("", key.removeprefix("base_model.model."))
