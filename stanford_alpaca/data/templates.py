"""Which template writes a record's prompts, and what a tokenizer says of those that its model was trained with.

A finished model's tokenizer has the prompts as its ``chat_template``, where every other program looks for them, and under
``trained_prompts`` in its tokenizer_config.json the name of the template, by which this package's commands follow it.
"""

import json
import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from stanford_alpaca.data.chat import ChatTemplate, named_templates, stop_ids
from stanford_alpaca.data.encode import READINGS, TextEncoder
from stanford_alpaca.data.prompts import (
    WITH_INPUT,
    WITHOUT_INPUT,
    TurnsTemplate,
    alpaca_turns,
    plain_turns,
)
from stanford_alpaca.errors import UserError, first_line

TEMPLATES = ("auto", "alpaca", "chat", "plain")
IN_WORDS = {
    "alpaca": "Alpaca's template",
    "chat": "the tokenizer's chat template",
    "plain": "no template: texts as they are",
    "auto": "a template for each form of record",
}
JINJA = (".jinja", ".jinja2", ".j2")
KEY = "trained_prompts"  # in tokenizer_config.json
ALPACA_JINJA = """\
BEFORE{%- set first = messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] if first else '' %}
{%- for message in (messages[1:] if first else messages) %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) or message['role'] not in ['user', 'assistant'] %}
{{- raise_exception('turns have to alternate: user, assistant, ...') }}
{%- endif %}
{%- if message['role'] == 'user' %}
{%- if loop.first %}
{{- system or ('WITH_INPUT' if '\\n\\n### Input:\\n' in message['content'] else 'WITHOUT_INPUT') }}
{%- endif %}
{{- '\\n\\n### Instruction:\\n' + message['content'] }}
{%- else %}
{{- '\\n\\n### Response:' + message['content'] + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '\\n\\n### Response:' }}
{%- endif %}
""".replace("WITH_INPUT", WITH_INPUT).replace("WITHOUT_INPUT", WITHOUT_INPUT)
PLAIN_JINJA = """\
BEFORE{%- for message in messages %}
{{- message['content'] + (eos_token if message['role'] == 'assistant' else '') }}
{%- endfor %}
"""
PROBES = [
    [{"role": "user", "content": "Add."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add 1\n\n### Input:\nto 2"},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": " b "},
        {"role": "user", "content": "\nc"},
    ],
]

Template = TurnsTemplate | ChatTemplate


class Trained(NamedTuple):
    """The prompts that a model was trained with."""

    template: str  # one of TEMPLATES; auto: several, by the form of a record
    special_tokens: str  # one of READINGS


def check_template(name: str, special_tokens: str = "text") -> None:
    """Raises UserError for a template, or a reading of special tokens, that there is not."""
    for flag, value, known in (
        ("prompt_template", name, TEMPLATES),
        ("special_tokens", special_tokens, READINGS),
    ):
        if value not in known:
            raise UserError(f"--{flag} {value}: choose from {', '.join(known)}")


def resolve_template(name: str, form: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template for records of a form: ``auto`` is Alpaca's for ``alpaca``, the tokenizer's chat template (Alpaca's, if it
    has none) for ``chat``, and no template for ``completion`` and ``text``. A chat template that ``sign`` has written is the
    one that it was written for."""
    if name == "chat":
        return _signed(tokenizer) or name
    if name != "auto":
        return name
    if form == "chat":
        return "chat" if has_own_template(tokenizer) else "alpaca"
    return "alpaca" if form == "alpaca" else "plain"


def has_own_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has a chat template that ``sign`` has not written."""
    return tokenizer.chat_template is not None and _signed(tokenizer) is None


def _signed(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Which of our templates the tokenizer's chat template is."""
    ours = {"alpaca": ALPACA_JINJA, "plain": PLAIN_JINJA}
    written = str(tokenizer.chat_template)
    return next(
        (name for name, jinja in ours.items() if written.endswith(jinja.partition("BEFORE")[2])),
        None,
    )


def make_template(
    name: str, form: str, tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder
) -> Template:
    """The template of ``resolve_template``. Raises UserError for one that the tokenizer lacks, or that cannot write a form."""
    name = resolve_template(name, form, tokenizer)
    if form == "text" and name != "plain":
        raise UserError(f"--prompt_template {name} cannot write records of the form {form}")
    if name == "chat":
        if tokenizer.chat_template is None:
            raise UserError(
                "--prompt_template chat: the tokenizer has no chat template; use alpaca, or give one with --chat_template"
            )
        return ChatTemplate.of(tokenizer, encoder)
    return TurnsTemplate(alpaca_turns if name == "alpaca" else plain_turns, encoder)


def told_templates(
    names: Iterable[str], tokenizer: PreTrainedTokenizerBase, given: str | None = None
) -> list[str]:
    """Which templates write the prompts of a run, a line for each, and how to use a chat template that it does not use.

    Args:
        given: where the chat template is from, if it is not the tokenizer's own.
    """
    names = list(names)
    unused = bool(names) and "chat" not in names and has_own_template(tokenizer)
    hint = (
        "; the tokenizer has a chat template, which is not used: --prompt_template chat uses it"
        if unused
        else ""
    )
    words = IN_WORDS | ({"chat": f"the chat template of {given}"} if given else {})
    return [f"prompts: {words[name]}{hint}" for name in names]


# ---- what a model was trained with ------------------------------------------------------------------------------------------


def sign(
    tokenizer: PreTrainedTokenizerBase, templates: Iterable[str], special_tokens: str = "text"
) -> list[str]:
    """Writes the prompts that a model is trained with into its tokenizer: its ``chat_template``, and their name.

    Where several templates write them, the chat template is the tokenizer's own if it is one of them, else Alpaca's.

    Args:
        templates: the resolved names of those that write the records.

    Returns:
        Lines for the user.
    """
    names = sorted(set(templates))
    if (
        not names and special_tokens == "text"
    ):  # running text: what the tokenizer says of prompts is not touched
        return []
    template = names[0] if len(names) == 1 else "auto"
    lines = []
    if named_templates(tokenizer).keys() == {"default"}:  # as it is read back
        tokenizer.chat_template = named_templates(tokenizer)["default"]
    if names and "chat" not in names:
        if has_own_template(tokenizer):
            lines.append(
                "the saved chat_template writes the prompts that are trained; the tokenizer's own is not kept"
            )
        turns, jinja = (
            (alpaca_turns, ALPACA_JINJA) if "alpaca" in names else (plain_turns, PLAIN_JINJA)
        )
        if _write(tokenizer, jinja, TurnsTemplate(turns, TextEncoder.of(tokenizer))):
            lines.append(
                "the saved chat_template gives other ids than training for this tokenizer; generate with this package"
            )
    if len(names) > 1:
        served = "the tokenizer's own" if "chat" in names else "Alpaca's"
        lines.append(
            f"several templates write the prompts ({', '.join(names)}): the saved chat_template is {served}"
        )
    tokenizer.init_kwargs[KEY] = {
        "template": template, "special_tokens": special_tokens, "chat_template": _digest(tokenizer.chat_template),
    }  # fmt: skip
    return lines


def trained_prompts(tokenizer: PreTrainedTokenizerBase) -> Trained | None:
    """What ``sign`` wrote; None for the tokenizer of somebody else, and for one whose chat template has changed since."""
    said = tokenizer.init_kwargs.get(KEY)
    if not isinstance(said, dict) or said.get("chat_template") != _digest(tokenizer.chat_template):
        return None
    known = said.get("template") in TEMPLATES and said.get("special_tokens") in READINGS
    return Trained(said["template"], said["special_tokens"]) if known else None


def follow(
    tokenizer: PreTrainedTokenizerBase, form: str, prompt_template: str, special_tokens: str | None
) -> Trained:
    """What writes the prompts of records of a form for a trained model: what is asked for, else what it was trained with."""
    trained = trained_prompts(tokenizer) or Trained("auto", "text")
    name = trained.template if prompt_template == "auto" else prompt_template
    return Trained(
        resolve_template("auto" if form == "text" else name, form, tokenizer),
        special_tokens or trained.special_tokens,
    )


def asked_otherwise(tokenizer: PreTrainedTokenizerBase, form: str, asked: Trained) -> str:
    """How a trained model is asked otherwise than it was trained, in words; nothing where it is not."""
    trained = trained_prompts(tokenizer)
    if trained is None:
        return ""
    template = resolve_template(trained.template, form, tokenizer)
    if template != asked.template:
        return f"trained with {IN_WORDS[template]}, asked here with {IN_WORDS[asked.template]}"
    if trained.special_tokens != asked.special_tokens:
        return f"trained with --special_tokens {trained.special_tokens}, asked here with {asked.special_tokens}"
    return ""


def _write(tokenizer: PreTrainedTokenizerBase, jinja: str, template: TurnsTemplate) -> bool:
    """Writes the chat template that gives training's ids, and says whether none does."""
    first = template.encoder.first
    written = "bos_token" if first == tokenizer.bos_token else repr(first)
    for space in (
        "",
        " ",
    ):  # some tokenizers put a space before a text, but none behind a beginning-of-sequence token
        begin = f"{written} + '{space}'" if space else written
        tokenizer.chat_template = jinja.replace("BEFORE", f"{{{{- {begin} }}}}\n" if first else "")
        if all(_same_ids(tokenizer, template, messages) for messages in PROBES):
            return False
    return True


def _same_ids(
    tokenizer: PreTrainedTokenizerBase, template: TurnsTemplate, messages: list[dict[str, str]]
) -> bool:
    ((ours, _),) = template.encoder([template.prompt({"messages": messages})])
    return ours == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def _digest(chat_template: Any) -> str:
    text = json.dumps(chat_template, sort_keys=True).replace("\\r\\n", "\\n")  # as it is read back
    return sha256(text.encode()).hexdigest()


def set_stops(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Has whoever generates with a trained model stop where its answers end, and where its base did."""
    before = [] if config.eos_token_id is None else config.eos_token_id
    stops = list(
        dict.fromkeys([*stop_ids(tokenizer), *(before if isinstance(before, list) else [before])])
    )
    config.eos_token_id = stops if len(stops) > 1 else stops[0]


# ---- --chat_template -------------------------------------------------------------------------------------------------------


def use_chat_template(
    tokenizer: PreTrainedTokenizerBase, source: str | None, remote_code: bool = False
) -> None:
    """Gives the tokenizer the chat template of a Jinja file, of another model's folder or hub name, or its own of a name.

    Raises:
        UserError: there is none, or it is no template.
    """
    if source is None:
        return
    if not source.strip():
        raise UserError(
            "--chat_template without a name, as of a variable that is not set; give a file, a folder or a hub name"
        )
    own, place = tokenizer.chat_template, Path(source).expanduser()
    if isinstance(own, dict) and source in own:
        template = own[source]
    elif os.path.isfile(place):
        try:
            template = place.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--chat_template {source}: cannot be read ({first_line(error)})"
            ) from None
    elif source.endswith(JINJA):
        raise UserError(f"--chat_template {source}: no such file")
    else:
        try:
            template = AutoTokenizer.from_pretrained(
                source, trust_remote_code=remote_code
            ).chat_template
        except Exception as error:  # the hub raises many kinds of errors
            named = (
                f"; the tokenizer's own are named {', '.join(own)}" if isinstance(own, dict) else ""
            )
            raise UserError(
                f"--chat_template {source}: no file, and no tokenizer ({first_line(error)}){named}"
            ) from None
        if template is None:
            raise UserError(
                f"--chat_template {source}: its tokenizer has no chat template; give another"
            )
    try:
        for text in [template] if isinstance(template, str) else template.values():
            _compile_jinja_template(text)
    except jinja2.TemplateError as error:
        raise UserError(
            f"--chat_template {source}: no Jinja template ({first_line(error)})"
        ) from None
    tokenizer.chat_template = template
