"""Chat templates of strangers: what they take is bounded, and what they break is one line."""

import json
import shutil

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from stanford_alpaca.data import sandbox
from stanford_alpaca.data.chat import MORE, TRIED, ChatTemplate
from stanford_alpaca.data.encode import TextEncoder
from stanford_alpaca.data.templates import use_chat_template
from stanford_alpaca.errors import UserError
from stanford_alpaca.run.data import load_data
from stanford_alpaca.run.parse import parse
from tests.faults.fuzz import outcome

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
DOUBLED = (
    "{% set n = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x DO n.x %}"
    "{% endfor %}{{ n.x }}"
)
# templates that take memory or time -> what the refusal of a conversation says
GREEDY = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "ranges",
    "{{ 'a' * 10**10 }}": "a value of 10,000,000,000 ",
    "{{ 10**10 * 'a' }}": "a value of 10,000,000,000 ",
    "{{ ([0] * 10**9) | length }}": "a value of 1,000,000,000 ",
    "{% set n = 10**9 %}{{ messages[0].content * n }}": "a value of 1,000,000,000 ",
    "{{ 9**9999 }}": "a number of more than 4,096 bits",
    "{{ (2**4000) * (2**4000) }}": "a number of more than 4,096 bits",
    DOUBLED.replace("DO", "~"): "a value of ",
    DOUBLED.replace("DO", "+"): "a value of ",
    "{{ 'a'.ljust(10**10) }}": "a value of ",
    "{{ 'a' | center(10**10) }}": "a value of ",
    "{{ 'a' | indent(width=10**10, first=true) }}": "a value of ",
    "{{ [1] | batch(10**10, 'x') | list }}": "a value of ",
    "{{ '%10000000000d' % 1 }}": "a width of more than 7 digits",
    "{{ '%*d' % (10**10, 1) }}": "a value of ",
    "{{ '%10000000000d' | format(1) }}": "a width of more than 7 digits",
    "{{ '{:>10000000000}'.format(1) }}": "a width of more than 7 digits",
    "{{ '{:>{w}}'.format(1, w=10**10) }}": "a value of ",
    "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}": "a value of ",
    "{{ ('a' * 10**6) | replace('a', 'b' * 10**6) }}": "a value of ",
    "{{ (['a' * 10**6] * 10**6) | join }}": "a value of ",
    "{{ ''.join(['a' * 10**6] * 10**6) }}": "a value of ",
    "{% for a in range(1000) %}{{ 'a' * 10**5 }}{% endfor %}": "a value of ",
    "{{ lipsum(n=10**6) }}": "'lipsum' is undefined",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{ 1 / 0 }}": "division by zero",
    "{{ messages[0]['none'].more.yet }}": "no attribute 'none'",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ '\\ud800' }}": "surrogates",
}


@pytest.fixture(scope="module")
def tokenizer(root):
    return AutoTokenizer.from_pretrained(root / "data" / "tiny-base")


@pytest.mark.parametrize("text", GREEDY)
def test_what_a_template_takes_for_a_conversation_is_bounded(tokenizer, text):
    template = ChatTemplate(text, tokenizer, TextEncoder.of(tokenizer))
    with pytest.raises(UserError, match="the chat template refuses a conversation") as refused:
        template.render({"messages": TURNS})
    assert GREEDY[text] in str(refused.value) and "\n" not in str(refused.value)


# templates that go beyond the child's limits -> what is said
WILD = {
    "{% for a in range(9) %}" * 12 + "{% endfor %}" * 12: "does not end within 10 s",
    "{% set x = [] %}{% for a in range(900000) %}{% for b in 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' %}"
    "{% endfor %}{% endfor %}" * 30: "does not end within 10 s",
    "{% for a in range(999) %}{{ 'a' | list | length }}{% set b = 'a' * 2**24 %}"
    "{% for x in [b | list] %}{% set c = [x, b | list, b | list, b | list, b | list] %}"
    "{% endfor %}{% endfor %}": "needs more than 512 MiB",
    "{{": "no Jinja",
    "{% if %}": "no Jinja",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "no Jinja",
    "{% break %}": "'break' outside loop",  # Jinja takes it, Python does not
    "{{ f(a=1, a=2) }}": "keyword argument repeated",
    "{% for a in b %}" * 30 + "{% endfor %}" * 30: "too many statically nested blocks",
    "{{ " + "9" * 5000 + " }}": "4300 digits",
    5: "a template is text, not 5",
    "": None,
    None: "a template is text, not None",
    ("a", "list"): "a template is text",
}


@pytest.mark.parametrize("text", WILD, ids=lambda text: str(text)[:40])
def test_a_template_is_tried_in_a_child_before_it_is_used(monkeypatch, text):
    if "10 s" in str(WILD[text]):  # memory is slow to get on a busy machine
        monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    conversations = [{"conversations": [each], **MORE} for each in TRIED]
    if WILD[text] is None:
        sandbox.check_runs(text, conversations)
        return
    with pytest.raises(UserError) as refused:
        sandbox.check_runs(text, conversations)
    assert WILD[text].replace("10 s", "1 s") in str(refused.value)


def test_templates_that_are_no_harm_render_as_in_transformers(tokenizer):
    text = (
        "{% for m in messages %}{{ '%-5s' % m.role }}|{{ '{:>4}'.format(loop.index * 2 + 1) }}"
        "{{ m.content ~ 2**10 ~ none }}{{ ['a', 'b'] | join(', ') }}{{ 'x' * 3 }}"
        "{{ 'abc'.replace('b', 'dd') | center(9) }}{{ m | tojson }}{{ [1, 2] + [3] }}{% endfor %}"
    )
    theirs = sandbox._theirs(text).render(messages=TURNS)
    ours = tokenizer.apply_chat_template(TURNS, chat_template=text, tokenize=False)
    assert ours == theirs and "1024None" in ours
    assert chat_template_utils._compile_jinja_template is sandbox.compiled


@pytest.mark.parametrize("template", [5, ["a"], {"default": 5}, "{{ 1 / 0 }}", "{{ '\\ud800' }}"])
def test_a_run_with_such_a_template_ends_with_one_line(arguments, root, tmp_path, template):
    base = shutil.copytree(root / "data" / "tiny-base", tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    (base / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "train.json").write_text(json.dumps([{"messages": TURNS}] * 3))
    run = parse(arguments("--prompt_template", "chat", model_name_or_path=base))
    with pytest.raises(UserError):
        load_data(run.data, run.training, run.source.tokenizer())


def test_a_template_that_is_given_is_tried_too(tokenizer, tmp_path):
    (tmp_path / "a.jinja").write_text("{{ 'a' ")
    with pytest.raises(UserError, match=r"--chat_template .*a.jinja: .* no Jinja"):
        use_chat_template(tokenizer, str(tmp_path / "a.jinja"))


def test_a_template_that_does_not_end_never_runs_in_the_command(tokenizer, monkeypatch):
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    text = "{% for a in 'a' * 9999 %}" * 4 + "{% endfor %}" * 4
    encoder = TextEncoder.of(tokenizer)
    assert outcome(lambda: ChatTemplate(text, tokenizer, encoder), limit=30) == "refused"
