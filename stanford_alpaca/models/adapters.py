"""Finds an adapter and its base, and checks that they can be merged.

This happens before anything large is read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftType
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME

from stanford_alpaca.checkpoint import manifest
from stanford_alpaca.checkpoint.bounded import read_json
from stanford_alpaca.checkpoint.run_file import MADE_WITH, RUN_FILE
from stanford_alpaca.console import quiet_hub, say
from stanford_alpaca.errors import ResumeError, UserError, first_line
from stanford_alpaca.models.check import check_model, check_place
from stanford_alpaca.models.identity import BASE, base_has_changed, identify_model, run_of
from stanford_alpaca.models.load import ADAPTER_CONFIG, ModelSource

MERGED = "merge.json"  # the file that says what was merged into a model, and what its base was
# what is downloaded from a repository on the hub
READ = ["*.json", "*.jinja", "*.model", "*.txt", str(ADAPTER_SAFE_WEIGHTS_NAME)]
WANTED = (
    f"give a folder or hub name with {ADAPTER_CONFIG} and {ADAPTER_SAFE_WEIGHTS_NAME}, "
    "or a run that trained with --lora"
)


@dataclass(frozen=True)
class Adapter:
    """An adapter that is whole and can be merged."""

    name: str  # as the user gave it
    folder: Path
    config: PeftConfig
    sha256: str  # of its weights
    run: dict[str, Any]  # record of the run that trained it; empty if it was not one of ours

    @property
    def kind(self) -> str:
        """peft's name for this kind of adapter."""
        return PeftType(self.config.peft_type).value

    @property
    def size(self) -> str:
        """The rank and alpha of LoRA in words, or the kind of another adapter."""
        if self.kind != "LORA":
            return self.kind
        return f"r {self.config.r}, alpha {self.config.lora_alpha:g}"


def find_adapter(name: str, cache_dir: str | None = None) -> Adapter:
    """Finds an adapter in a folder, in a run's newest checkpoint that is whole, or on the hub.

    Raises:
        ResumeError: the adapter is damaged.
        UserError: there is no adapter, or it cannot be merged.
    """
    place = check_place(name)
    folder = _in_run(place) if place.is_dir() else _download(name, cache_dir)
    if (
        not (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file()
        or not (folder / ADAPTER_CONFIG).is_file()
    ):
        if (folder / ADAPTER_WEIGHTS_NAME).is_file():
            raise UserError(
                f"{name}: {ADAPTER_WEIGHTS_NAME} is a pickle, which could run code, "
                f"and is not read; {WANTED}"
            )
        if (folder / "config.json").is_file():
            raise UserError(f"{name}: a whole model, no adapter: nothing to merge; {WANTED}")
        raise UserError(f"{name}: no adapter; {WANTED}")
    if damage := _damage(folder):
        raise ResumeError(f"{folder}: {damage}; a checkpoint of its run may be whole")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # not JSON, or unknown to peft
        raise UserError(f"{name}: {ADAPTER_CONFIG} cannot be read ({first_line(error)})") from None
    found = Adapter(
        name,
        folder,
        config,
        manifest.file_sha256(folder / ADAPTER_SAFE_WEIGHTS_NAME),
        run_of(folder),
    )
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise UserError(
            f"{name}: a {found.kind} adapter changes no weights, so it cannot be merged"
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise UserError(
            f"{name}: an adapter for {config.task_type}; only those of a causal LM are merged"
        )
    return found


def _in_run(place: Path) -> Path:
    """Returns the folder, or its newest whole checkpoint if a run has not finished there."""
    saved = manifest.checkpoints(place)
    unfinished = (place / RUN_FILE).is_file() and not (place / manifest.MANIFEST_FILE).exists()
    if (
        not saved
        or ((place / ADAPTER_SAFE_WEIGHTS_NAME).is_file() and not unfinished)
        or (place / "config.json").is_file()
    ):
        return place
    for checkpoint in saved:
        damage = _damage(checkpoint)
        if not damage and (checkpoint / manifest.MANIFEST_FILE).exists():
            say(
                f"{place}: has not finished; "
                f"its newest whole checkpoint is taken: {checkpoint.name}"
            )
            return checkpoint
        say(f"{checkpoint}: passed over: {damage or 'no manifest'}")
    raise ResumeError(f"{place}: none of its checkpoints is whole")


def _damage(folder: Path) -> str:
    """Says how a folder with a manifest differs from what was saved, or returns an empty string."""
    return manifest.summary(folder) if (folder / manifest.MANIFEST_FILE).exists() else ""


def _download(name: str, cache_dir: str | None) -> Path:
    try:
        with quiet_hub():
            return Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=READ))
    except Exception as error:  # no such name, no network, no access
        raise UserError(f"{name}: no adapter here ({first_line(error)}); {WANTED}") from None


def find_base(adapter: Adapter, base: str | None, source: ModelSource) -> ModelSource:
    """Returns the model that the adapter was trained on.

    Args:
        base: where the model is now, if not where the adapter says. A relative path in the adapter
            may also start from the adapter's folder.
        source: how to read the model; its path is ignored.

    Raises:
        UserError: the model is missing, is not the right one, or already contains this adapter.
    """
    named = base or adapter.config.base_model_name_or_path
    if not named:
        raise UserError(f"{adapter.name}: its {ADAPTER_CONFIG} names no base; give --base PATH")
    places = [Path(named).expanduser(), adapter.folder / named]
    found = next((str(place) for place in places[: 1 if base else 2] if place.is_dir()), named)
    try:
        check_model(source.at(found))
    except UserError as error:
        raise UserError(
            f"the base of {adapter.name}: {error}"
            + ("" if base else ", or --base PATH if it has moved")
        ) from None
    if adapter.sha256 in merged_into(found):
        raise UserError(
            f"{found}: already has {adapter.name} in it ({MERGED}); "
            "give the model that it was trained on"
        )
    then = (adapter.run.get(MADE_WITH) or {}).get(BASE)
    recorded = Path(str(adapter.config.base_model_name_or_path)).expanduser()
    if not then and recorded.is_dir():
        then = identify_model(str(recorded), source.cache_dir, weights=True)
    elif not then:
        say(
            f"{adapter.name}: no record of its run is with it; "
            f"that {found} is its base follows from layers and shapes alone"
        )
    if changed := base_has_changed(adapter.name, found, then, source.cache_dir):
        raise UserError(f"{changed}; give that one with --base")
    return source.at(found)


def merged_into(base: str) -> list[str]:
    """Returns the sha256 of each adapter that was merged into a model."""
    file = Path(base).expanduser() / MERGED
    try:
        return list(read_json(file)["adapters"]) if file.is_file() else []
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)})") from None
