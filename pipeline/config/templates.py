"""The template of a job file: jinja2 over a row's columns, in a sandbox and with an end.

A job file is data and may come from elsewhere. Its template reaches no Python internals, no files
and no other templates, and is stopped when it takes too many steps or makes a text that is too
long, so that neither a mistake nor a joke keeps an actor busy for ever.

A null or a NaN never becomes text, which would be "None" or "nan" in a prompt: the template says
what stands for it, or its row fails.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import SandboxedEnvironment
from jinja2.visitor import NodeTransformer

from pipeline.errors import RowError

MAX_STEPS = 1_000_000
"""Most loop iterations, calls and filters of one rendering."""

MAX_SIZE = 10_000_000
"""Longest text or list that a template may make, and largest number that it may pass on."""

_MAX_BITS = 10_000
"""Largest integer that a template may make, in bits: beyond it, arithmetic takes seconds."""

_WIDE = re.compile(r"\d{7,}")
"""A width in a format that would make millions of characters."""

_TEXT_FILTERS = frozenset(
    [
        "capitalize",
        "center",
        "e",
        "escape",
        "filesizeformat",
        "forceescape",
        "format",
        "indent",
        "lower",
        "pprint",
        "replace",
        "reverse",
        "safe",
        "string",
        "striptags",
        "title",
        "trim",
        "truncate",
        "upper",
        "urlencode",
        "urlize",
        "wordcount",
        "wordwrap",
        "xmlattr",
    ]
)
"""Filters that make text of what they are given, of null as well."""

_steps_left: ContextVar[list[int] | None] = ContextVar("steps_left", default=None)


class PromptTemplate:
    """A template that was checked and compiled.

    Args:
        source: jinja2.

    Attributes:
        columns: what it takes from a row, sorted.

    Raises:
        ValueError: it is not valid, or wants other templates; the message says what is wrong.
    """

    def __init__(self, source: str) -> None:
        environment = _Sandbox(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        try:
            tree = environment.parse(source)
            if any(True for _ in meta.find_referenced_templates(tree)):
                raise ValueError("must not include, import or extend other templates")
            names = _undeclared(source, environment) - _own_names(tree)
            self._template = environment.from_string(_Bounded(environment).visit(tree))
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"is not a valid jinja2 template: line {error.lineno}: {error.message}"
            ) from None
        except RecursionError:
            raise ValueError("is not a valid jinja2 template: it is nested too deeply") from None
        self.columns = sorted(names)

    def render(self, row: Mapping[str, Any]) -> str:
        """The text for a row.

        Raises:
            RowError: a null or a NaN would become text.
            Exception: whatever else the template runs into.
        """
        token = _steps_left.set([MAX_STEPS])
        try:
            pieces, size = [], 0
            values = {name: _without_nan(value) for name, value in row.items()}
            for piece in self._template.generate(values):
                pieces.append(piece)
                size += len(piece)
                _check_size(size)
            return "".join(pieces)
        finally:
            _steps_left.reset(token)


def _undeclared(source: str, environment: _Sandbox) -> set[str]:
    """Variables of the outside: those with the name of a function of jinja2, if not called."""
    bare = environment.overlay()
    bare.globals = {}
    tree = bare.parse(source)
    called = {id(call.node) for call in tree.find_all(nodes.Call)}
    values = {name.name for name in tree.find_all(nodes.Name) if id(name) not in called}
    return meta.find_undeclared_variables(tree) - (environment.globals.keys() - values)


def _own_names(tree: nodes.Template) -> set[str]:
    """Macros and namespaces: jinja2 takes those for variables of the outside in some places."""
    names = {macro.name for macro in tree.find_all(nodes.Macro)}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and isinstance(assign.node, nodes.Call):
            made_by = assign.node.node
            if isinstance(made_by, nodes.Name) and made_by.name == "namespace":
                names.add(assign.target.name)
    return names


class _Sandbox(SandboxedEnvironment):
    """Jinja2's sandbox, in which all that can repeat or grow is counted."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters = {name: _counted_filter(name, f) for name, f in self.filters.items()}
        self.filters |= {"default": _default, "d": _default, "join": _join}
        self.filters |= {
            "counted items": _counted_items,
            "concatenation": _concatenation,
            "written": _written,
        }

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _step()
        _check_arguments([*args, *kwargs.values()])
        if getattr(__obj, "__name__", "") in {"format", "format_map"}:
            # The sandbox wraps it, to look at the names inside.
            _check_width(getattr(getattr(__obj, "__wrapped__", __obj), "__self__", ""))
            _check_values([*args, *kwargs.values()])
        return _checked(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _step()
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
        elif operator == "*":
            _check_size(_size(left) * _size(right))
        elif operator == "+":
            _check_size(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            _check_width(left)
            _check_values([right])
        return super().call_binop(context, operator, left, right)


class _Bounded(NodeTransformer):
    """Puts what loops go over, what `~` joins and what is written through filters that check."""

    def __init__(self, environment: _Sandbox) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._filtered(node.iter, "counted items")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        names = tuple(map(_shown, node.nodes))
        self.generic_visit(node)
        return self._filtered(nodes.List(node.nodes, lineno=node.lineno), "concatenation", names)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        names = list(map(_shown, node.nodes))
        self.generic_visit(node)
        node.nodes = [
            each
            if isinstance(each, nodes.TemplateData)
            else self._filtered(each, "written", name, each.lineno)
            for name, each in zip(names, node.nodes, strict=True)
        ]
        return node

    def _filtered(self, node: nodes.Node, name: str, *arguments: Any) -> nodes.Filter:
        given: list[nodes.Expr] = [nodes.Const(value) for value in arguments]
        result = nodes.Filter(node, name, given, [], None, None, lineno=node.lineno)
        result.set_environment(self._environment)
        return result


# Filters of the context are not evaluated while the template is compiled.
@jinja2.pass_context
def _counted_items(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _step()
        yield item


@jinja2.pass_context
def _concatenation(context: Context, items: Sequence[Any], names: Sequence[str]) -> str:
    _step()
    for item, name in zip(items, names, strict=True):
        _check_value(item, name)
    texts = [str(item) for item in items]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


@jinja2.pass_context
def _written(context: Context, value: Any, name: str, line: int) -> Any:
    _check_value(value, name, f"line {line}: ")
    return value


def _default(value: Any, other: Any = "", boolean: bool = False) -> Any:
    """jinja2's filter, which takes null for undefined, too: a row has all columns."""
    if isinstance(value, Undefined) or _is_null(value) or (boolean and not value):
        return other
    return value


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment,
    value: Iterable[Any],
    d: str = "",
    attribute: str | int | None = None,
) -> str:
    """jinja2's filter, in which no null becomes text."""
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    texts: list[str] = []
    for item in value:
        _step()
        _check_value(item, "a value that is joined")
        texts.append(str(item))
    _check_size(sum(map(len, texts)) + len(str(d)) * len(texts))
    return str(d).join(texts)


def _counted_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # with the marks by which jinja2 knows what a filter is passed
    def filtered(*args: Any, **kwargs: Any) -> Any:
        _step()
        _check_arguments([*args, *kwargs.values()])
        if name in _TEXT_FILTERS:
            _check_values([*args, *kwargs.values()], f"what goes through the filter {name!r}")
        if name == "format":
            _check_width(args[0])
        return _checked(function(*args, **kwargs))

    return filtered


# ------------------------------------------------------------------------ nulls


def _is_null(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _without_nan(value: Any) -> Any:
    """A row's value with null in place of NaN, so that templates can ask for both in one way."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if _is_null(value) else value


def _check_value(value: object, name: str, where: str = "") -> None:
    """Raise for a null, or one in a list or object, of which Python would make text."""
    if _is_null(value):
        raise RowError(
            "NullValue",
            f"{where}{name} is null or NaN; let the template say what stands for it, as in "
            "{{ x | default('unknown') }}, or leave it out: {% if x is not none %}",
        )
    inside: Iterable[object] = ()
    if isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, list | tuple):
        inside = value
    for each in inside:
        _check_value(each, f"a value in {name}", where)


def _check_values(values: Iterable[Any], name: str = "what is formatted") -> None:
    for value in values:
        _check_value(value, name)


def _shown(node: nodes.Node) -> str:
    """What messages call an expression."""
    path = _path(node)
    return repr(path) if path else "a value"


def _path(node: nodes.Node | None) -> str | None:
    """The column, or field of one, that an expression is of, if it is of one."""
    match node:
        case nodes.Name():
            return node.name
        case nodes.Getattr():
            path = _path(node.node)
            return path and f"{path}.{node.attr}"
        case nodes.Filter():
            return _path(node.node)
    return None


# ------------------------------------------------------------------------ limits


def _step() -> None:
    left = _steps_left.get()
    if left is not None:
        left[0] -= 1
        if left[0] < 0:
            raise SecurityError(f"the template takes more than {MAX_STEPS:,} steps")


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"the template makes more than {MAX_SIZE:,} characters or items")


def _checked(value: Any) -> Any:
    if isinstance(value, str):
        _check_size(len(value))
    return value


def _check_arguments(arguments: Iterable[Any]) -> None:
    for value in arguments:
        if isinstance(value, int) and abs(value) > MAX_SIZE:
            raise SecurityError(f"the template passes on a number beyond {MAX_SIZE:,}")


def _check_width(text: object) -> None:
    if isinstance(text, str) and _WIDE.search(text):
        raise SecurityError("the template formats to a width of millions")


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise SecurityError(f"the template makes a number of more than {_MAX_BITS:,} bits")


def _size(value: object) -> int:
    """How often a value repeats what it is multiplied by, or how long it is."""
    if isinstance(value, int):
        return abs(value)
    return len(value) if isinstance(value, str | bytes | list | tuple) else 1
