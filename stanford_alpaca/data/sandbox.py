"""Runs chat templates, which are programs of strangers, within bounds.

transformers' sandbox keeps a template from files and from Python's inner parts. It bounds neither
memory nor time. Here a template first runs in a child process with limits on both. It then runs in
an environment that bounds what one operation makes and what a whole conversation becomes. All
rendering of transformers in this process goes through it.

What is not bounded after the child: memory that a template takes only for particular records, by
other means than repeating, adding, padding or looping over ranges.
"""

import functools
import os
import re
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

from jinja2 import Template
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.nodes import Concat
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from stanford_alpaca.errors import UserError, first_line

TEXT = 2**24  # characters of one conversation, and of any value inside a template
RANGES = 10**6  # numbers in all ranges of one conversation
BITS = 2**12  # of a whole number
WIDTH = re.compile(r"\d{8,}")  # in a text that is a format
MEMORY = 2**29  # bytes that the child may take beside its parent's
CPU_SECONDS, SECONDS = 10, 60  # of the child
OUT_OF_MEMORY, ADVICE = 3, "give another with --chat_template, or use --prompt_template alpaca"


class _Generator(CodeGenerator):
    """Writes ``a ~ b`` as a call of the environment. Other operators are intercepted by jinja."""

    def visit_Concat(self, node: Concat, frame: Any) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Bounded(ImmutableSandboxedEnvironment):
    """transformers' environment of a template, with bounds."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    ranged = 0  # numbers in the ranges of the conversation so far

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        size = 0
        if operator == "*" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
        elif operator == "*":
            size = max(_size(left), 1) * _number(right) + max(_size(right), 1) * _number(left)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
        elif operator == "+":
            size = _size(left) + _size(right)
        elif operator == "%":
            _check_call("format", left, (right,) if isinstance(right, int) else right)
        _check(size)
        return super().call_binop(context, operator, left, right)

    def joined(self, parts: Iterable[Any]) -> str:
        texts = [str(part) for part in parts]
        _check(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
        of = getattr(getattr(called, "__wrapped__", called), "__self__", None)
        _check_call(getattr(called, "__name__", ""), of, (*args, *kwargs.values()))
        return super().call(context, called, *args, **kwargs)

    def range(self, *args: int) -> range:
        found = range(*args)
        self.ranged += len(found)
        if self.ranged > RANGES:
            raise SecurityError(f"ranges of more than {RANGES:,} numbers")
        return found


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


def _number(value: Any) -> int:
    return max(value, 0) if isinstance(value, int) else 0


def _check(size: int) -> None:
    if size > TEXT:
        raise SecurityError(f"a value of {size:,} characters or items, more than {TEXT:,}")


def _check_bits(bits: int) -> None:
    if bits > BITS:
        raise SecurityError(f"a number of more than {BITS:,} bits")


def _check_call(name: str, of: Any, args: Any) -> None:
    """Refuses a width, a count or a result that is too large, of a method or a filter."""
    for value in args if isinstance(args, tuple) else ():
        _check(_number(value))
    if name == "format" and isinstance(of, str) and WIDTH.search(of):
        raise SecurityError("a width of more than 7 digits")
    if name == "replace" and isinstance(of, str) and len(args) > 1:
        _check(len(of) + of.count(str(args[0])) * len(str(args[1])))
    if name == "join":
        parts = args[0] if isinstance(of, str) and args else of
        if isinstance(parts, list | tuple):
            _check(sum(len(str(part)) + _size(of) * isinstance(of, str) for part in parts))


def _filter(name: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        # some filters get the environment first
        own = args[1:] if hasattr(function, "jinja_pass_arg") else args
        if own:
            _check_call(name, own[0], (*own[1:], *kwargs.values()))
        return function(*args, **kwargs)

    return bounded


def _counted(render: Callable[[Any], Iterator[str]]) -> Callable[[Any], Iterator[str]]:
    """Ends a rendering that becomes too long."""

    def counted(context: Any) -> Iterator[str]:
        size = 0
        for piece in render(context):
            size += len(piece) + 1
            _check(size)
            yield piece

    return counted


@lru_cache
def _compiled(text: str) -> Template:
    """Compiles a template. What transformers gives it, names and the extension, stays."""
    environment = _theirs("").environment
    environment.__class__ = _Bounded
    environment.globals["range"] = environment.range
    environment.globals.pop("lipsum", None)
    environment.filters = {name: _filter(name, each) for name, each in environment.filters.items()}
    template = environment.from_string(text)
    template.root_render_func = _counted(template.root_render_func)
    return template


def compiled(text: str) -> Template:
    """Returns a template that renders one conversation within bounds.

    Raises:
        TemplateError: it is no template.
    """
    if not isinstance(text, str):
        raise TemplateError(f"a template is text, not {text!r:.40}")
    try:
        template = _compiled(text)
    except RecursionError:
        raise TemplateError("nested too deep") from None
    except (SyntaxError, ValueError, MemoryError) as error:  # of the Python that Jinja writes
        raise TemplateError(first_line(error)) from None
    template.environment.ranged = 0  # type: ignore[attr-defined]
    return template


_theirs = chat_template_utils._cached_compile_jinja_template
_theirs = getattr(_theirs, "__wrapped__", _theirs)  # an environment of its own for each template
chat_template_utils._compile_jinja_template = compiled
_ran: list[Any] = []  # templates that ran within the limits


def check_runs(text: Any, conversations: list[dict]) -> None:
    """Runs a template once in a child process with limits on memory and time.

    A conversation that the template refuses is no error here.

    Args:
        conversations: arguments of ``render_jinja_template``, one dict for each conversation.

    Raises:
        UserError: it is no template, or it goes beyond the limits.
    """
    if text in _ran:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
            child = os.fork()
        if child == 0:
            _run_limited(text, conversations)
        status = _wait(child)
    except OSError as error:
        raise UserError(f"the chat template cannot be tried ({first_line(error)})") from None
    if status == OUT_OF_MEMORY:
        raise UserError(f"the chat template needs more than {MEMORY >> 20} MiB; {ADVICE}")
    if status is None or status == -signal.SIGXCPU:
        raise UserError(f"the chat template does not end within {CPU_SECONDS} s; {ADVICE}")
    if status < 0:
        name = signal.Signals(-status).name
        raise UserError(f"the chat template ends the process that runs it ({name}); {ADVICE}")
    try:
        compiled(text)
    except TemplateError as error:
        raise UserError(f"the chat template is no Jinja ({first_line(error)}); {ADVICE}") from None
    _ran.append(text)


def _run_limited(text: Any, conversations: list[dict]) -> None:
    """Renders the conversations and ends this process, which is a fork."""
    status = OUT_OF_MEMORY
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        for options in conversations:
            _run(text, options)
        status = 0
    finally:
        os._exit(status)


def _run(text: Any, options: dict) -> None:
    try:
        chat_template_utils.render_jinja_template(chat_template=text, **options)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception:
        pass


def _wait(child: int) -> int | None:
    """Returns how a child ended, a signal as a negative number. None: it did not, and is killed."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
