"""Files of strangers that are nearly right, drawn by seed: YAML, templates, models, archives.

They are read as commands read them, and nothing of a model's weights is loaded.
"""

import gzip
import json
import os
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from stanford_alpaca.checkpoint.run_file import read_run
from stanford_alpaca.cost import CostEmbedding
from stanford_alpaca.cost.build import documents
from stanford_alpaca.data.chat import ChatTemplate
from stanford_alpaca.data.encode import TextEncoder
from stanford_alpaca.data.reading import list_data_files, read_file
from stanford_alpaca.errors import UserError
from stanford_alpaca.generation.prompts import read_prompts
from stanford_alpaca.models.check import check_model
from stanford_alpaca.models.load import ModelSource
from stanford_alpaca.run.config_file import with_config
from tests.faults.fuzz import BASE, BYTES, CHAT, RECORDS, VALUES, WORDS

Case = Callable[[], object]
YAML = [
    "mode: emo\nseed: 3\ndata_path: [a.json, b.json]\n",
    "lora: true\nlora_r: 8\nlr_scheduler_kwargs: {a: {b: [1, 2]}}\nmade_with: {data: {}}\n",
]
YAML_PIECES = [
    "&a ", "*a", "<<: *a\n", "- ", "? ", ": ", "!!python/name:os.system ", "!!binary ", "{", "[",
    "--lora", "mode: mle\n", "\t", "\x85", "2001-01-01", "1:1:1", ".inf", "'",
    "%YAML 9.9\n", "---\n",
]  # fmt: skip
TEMPLATES = [
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content ~ '\n' }}{% endif %}{% endfor %}",
]
TEMPLATE_PIECES = [
    "{{ 'a' * 10**10 }}", "{{ 9**9**9 }}", "{% for x in range(99999) %}", "{% endfor %}", "|join",
    "{{ 1/0 }}", "{{ messages.x.y }}", "{{ raise_exception('no') }}", "{% if", "%}", "{{", "}}",
    "{% set messages = 5 %}", "{{ '\\ud800' }}", "{{ namespace(x=1) }}", "{{ ''.__class__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages }}", "|center(10**9)",
    "{#", "~", "+", "%", "{% break %}", "{{ " + "9" * 5000 + " }}", "{{ " + "(" * 99,
    "{% for a in b %}" * 20, "{% endfor %}" * 20, "{{ f(a=1, a=2) }}",
]  # fmt: skip


def fuzz_yaml(rng: random.Random, folder: Path) -> Case:
    file = folder / "run.yaml"
    file.write_bytes(_mutated(rng, rng.choice(YAML), YAML_PIECES))

    def case() -> None:
        read_run(folder)
        with_config(["--config", str(file)])

    return case


def fuzz_template(rng: random.Random, folder: Path) -> Case:
    text = _mutated(rng, rng.choice(TEMPLATES), TEMPLATE_PIECES).decode(errors="replace")

    def case() -> None:
        tokenizer = ModelSource(str(BASE)).tokenizer()
        ChatTemplate(text, tokenizer, TextEncoder.of(tokenizer)).render({"messages": CHAT})

    return case


def fuzz_model(rng: random.Random, folder: Path) -> Case:
    return _folder(rng, folder / "model", BASE)


def fuzz_adapter(rng: random.Random, folder: Path) -> Case:
    return _folder(rng, folder / "adapter", None)


def fuzz_archive(rng: random.Random, folder: Path) -> Case:
    """Packed data, or an archive in the place of data, of costs, or of a model's folder."""
    content = "\n".join(json.dumps(rng.choice(RECORDS)) for _ in range(3)).encode()
    packers = [*[gzip.compress] * 4, _zipped, _tarred, _saved, lambda data: b"\x1f\x8b" + data]
    packed = rng.choice(packers)
    content = packed(content)
    for _ in range(rng.choice([0, 1, 2])):
        content = rng.choice(BYTES)(rng, content)
    names = ["a.jsonl.gz"] * 5 + ["a.txt.gz", "a.json.gz", "a.csv.gz"]
    names += ["a.parquet", "a.safetensors", "a.zip"]
    name = rng.choice(names)
    file = folder / name
    file.write_bytes(content)

    def case() -> None:
        if name == "a.safetensors":
            try:
                CostEmbedding.from_file(file)
            except Exception as error:  # ``make_cost`` turns any into one line
                raise UserError(str(error)) from None
        elif name == "a.zip":
            check_model(ModelSource(str(file)))
        else:
            for each in list_data_files(file):
                list(read_file(each))
            list(documents(file))
            read_prompts(str(file), None, None)

    return case


KINDS = {
    "yaml": fuzz_yaml,
    "template": fuzz_template,
    "model": fuzz_model,
    "adapter": fuzz_adapter,
    "archive": fuzz_archive,
}


def fuzz(kind: str, seed: int, folder: Path) -> Case:
    """Writes a case of a kind into a folder of its own, and returns what reads it."""
    place = folder / f"{kind}-{seed}"
    place.mkdir(parents=True)
    return KINDS[kind](random.Random(f"{kind}{seed}"), place)


def _mutated(rng: random.Random, text: str, pieces: list[str]) -> bytes:
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        place = rng.randint(0, len(text))
        piece = rng.choice(pieces if rng.random() < 0.8 else WORDS)
        text = text[:place] + piece * rng.choice([1, 1, 1, 2, 300]) + text[place:]
    content = text.encode(errors="surrogatepass")
    return rng.choice(BYTES)(rng, content) if rng.random() < 0.3 else content


def _folder(rng: random.Random, place: Path, source: Path | None) -> Case:
    """Copies a model, or writes an adapter, and breaks up to two of its files."""
    shutil.copytree(source, place) if source else _write_adapter(place)
    for _ in range(rng.choice([0, 1, 1, 2])):
        rng.choice([_break_json, _break_json, _break_bytes, _put_strange, _add_index])(rng, place)

    def case() -> None:
        check_model(ModelSource(str(place)), or_adapter=True)
        if source is not None:  # an adapter is written without its tokenizer
            ModelSource(str(place)).tokenizer()

    return case


def _write_adapter(place: Path) -> None:
    settings, tensors = _adapter()
    place.mkdir()
    (place / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, place / "adapter_model.safetensors", {"format": "pt"})


@lru_cache
def _adapter() -> tuple[dict, dict[str, torch.Tensor]]:
    model = ModelSource(str(BASE)).load()
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"fuzzed-adapter-{os.getpid()}"
    get_peft_model(model, config).save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    shutil.rmtree(folder)
    return settings | {"base_model_name_or_path": str(BASE)}, tensors


def _break_json(rng: random.Random, place: Path) -> None:
    file = rng.choice(sorted(each for each in place.glob("*.json") if each.is_file()) or [None])
    if file is None:
        return
    try:
        settings = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return
    if not isinstance(settings, dict) or not settings or len(file.read_bytes()) > 2**20:
        return
    key = rng.choice(sorted(settings))
    value = rng.choice([*VALUES, "../../x", "/etc/passwd", 10**9, "a" * 3000])
    if rng.random() < 0.2:
        settings.pop(key)
    else:
        settings[key] = value
    file.write_text(json.dumps(settings))


def _break_bytes(rng: random.Random, place: Path) -> None:
    file = rng.choice(sorted(each for each in place.iterdir() if each.is_file()))
    file.write_bytes(rng.choice(BYTES)(rng, file.read_bytes()))


def _put_strange(rng: random.Random, place: Path) -> None:
    names = [each.name for each in place.iterdir()]
    file = place / rng.choice([*names, "pytorch_model.bin", "chat_template.jinja", "a.json"])
    if file.is_dir():
        return
    file.unlink(missing_ok=True)
    rng.choice([os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path), Path.touch])(file)


def _add_index(rng: random.Random, place: Path) -> None:
    name = rng.choice(["weights.bin", "../x.safetensors", "model.safetensors", "", None])
    content = rng.choice([{"weight_map": {"a": name}}, {}, [], {"weight_map": 5}])
    (place / "model.safetensors.index.json").write_text(json.dumps(content))


def _zipped(data: bytes) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../a.jsonl", data)
    return buffer.getvalue()


def _tarred(data: bytes) -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        about = tarfile.TarInfo("../a.jsonl")
        about.size = len(data)
        archive.addfile(about, BytesIO(data))
    return buffer.getvalue()


def _saved(data: bytes) -> bytes:
    buffer = BytesIO()
    torch.save({"a": torch.ones(3)}, buffer)
    return buffer.getvalue()
