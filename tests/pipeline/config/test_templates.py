from __future__ import annotations

from typing import Any

import pytest
from jinja2 import UndefinedError
from jinja2.exceptions import SecurityError

from pipeline.config.templates import MAX_SIZE, PromptTemplate
from pipeline.errors import RowError


@pytest.mark.parametrize(
    ("source", "row", "text"),
    [
        ("Q: {{ q }}\n", {"q": "why"}, "Q: why\n"),
        (
            "{% for x in xs %}[{{ loop.index }}/{{ loop.length }} {{ x }}]{% endfor %}",
            {"xs": "ab"},
            "[1/2 a][2/2 b]",
        ),
        ("{% for x in xs if x != 'a' %}{{ x }}{% else %}none{% endfor %}", {"xs": "a"}, "none"),
        (
            "{% for x in xs recursive %}{{ x.n }}{{ loop(x.xs) }}{% endfor %}",
            {"xs": [{"n": 1, "xs": [{"n": 2, "xs": []}]}]},
            "12",
        ),
        (
            "{{ 'a' ~ x ~ 'b' }} {{ '%.2f' | format(x) }} {{ '{:.1f}'.format(x) }}",
            {"x": 1.25},
            "a1.25b 1.25 1.2",
        ),
        ("{{ 2 ** 10 + 3 * 4 - 7 % 4 }} {{ 'ab' * 2 + 'c' }}", {}, "1033 ababc"),
        ("{{ xs | map('upper') | join(', ') }} {{ xs | tojson }}", {"xs": ["a"]}, 'A ["a"]'),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(q) }}", {"q": 1}, "<1>"),
        (
            "{% set ns = namespace(n=0) %}"
            "{% for x in xs %}{% set ns.n = ns.n + x %}{% endfor %}{{ ns.n }}",
            {"xs": [1, 2]},
            "3",
        ),
        ("{% for i in range(3) %}{{ i }}{% endfor %}", {}, "012"),
        (
            "{{ range }} {% for x in dict %}{{ x }}{% endfor %}",
            {"range": "5 km", "dict": "a"},
            "5 km a",
        ),
    ],
)
def test_templates_are_jinja2(source: str, row: dict[str, Any], text: str) -> None:
    template = PromptTemplate(source)
    assert template.columns == sorted(row)
    assert template.render(row) == text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ x", "line 1: unexpected end of template"),
        ("\n{{ x | nothing }}", "line 2: No filter named 'nothing'"),
        ("{% include 'a' %}", "must not include, import or extend other templates"),
        ("{% extends x %}", "must not include"),
        ("{% import 'a' as b %}", "must not include"),
        ("{{" + "(" * 3000 + "1" + ")" * 3000 + "}}", "nested too deeply"),
    ],
)
def test_what_is_no_template(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        PromptTemplate(source)


HANDLED = [
    ("{{ x | default('none given') }}", "none given"),
    ("{{ x | d }}|", "|"),
    ("{{ x | default('a') | upper }}", "A"),
    ("{% if x is none %}nothing{% else %}{{ x }}{% endif %}", "nothing"),
    ("{% if x %}{{ x }}{% endif %}.", "."),
    ("{{ x or 'or' }}", "or"),
    ("{{ [x, 1] | tojson }}", "[null, 1]"),
    ("{{ ['a', x] | select | join('-') }}", "a"),
    ("{{ [{'n': 1, 'm': x}] | join('-', attribute='n') }}", "1"),
]
WRITTEN = [
    ("{{ x }}", "line 1: 'x' is null or NaN; let the template say"),
    ("a\nb{{ x }}", "line 2: 'x' is null"),
    ("{{ {'y': x}.y }}", "line 1: a value is null"),
    ("{% set y = x %}{{ y }}", "'y' is null"),
    ("{% macro m(a) %}{{ a }}{% endmacro %}{{ m(x) }}", "'a' is null"),
    ("{{ [1, x] }}", "a value in a value is null"),
    ("{{ {'y': x} }}", "a value in a value is null"),
    ("{{ [x] | first }}", "is null"),
    ("{{ x ~ 'b' }}", "'x' is null"),
    ("{{ x | upper }}", "the filter 'upper' is null"),
    ("{{ x | trim }}", "the filter 'trim' is null"),
    ("{{ x | string }}", "the filter 'string' is null"),
    ("{{ [x] | map('lower') | join }}", "the filter 'lower' is null"),
    ("{{ ['a', x] | join }}", "a value that is joined is null"),
    ("{{ [{'n': x}] | join('-', attribute='n') }}", "a value that is joined is null"),
    ("{{ '%s' | format(x) }}", "the filter 'format' is null"),
    ("{{ '%s' % x }}", "what is formatted is null"),
    ("{{ '%s %s' % (1, x) }}", "what is formatted is null"),
    ("{{ '{}'.format(x) }}", "what is formatted is null"),
    ("{{ x | default(none) }}", "'x' is null"),
]


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_null_is_no_text_unless_the_template_says_so(value: float | None) -> None:
    for source, text in HANDLED:
        assert PromptTemplate(source).render({"x": value}) == text, source
    for source, message in WRITTEN:
        with pytest.raises(RowError) as caught:
            PromptTemplate(source).render({"x": value})
        assert caught.value.error_class == "NullValue"
        assert message in caught.value.message, source


def test_a_field_that_is_null_is_named() -> None:
    with pytest.raises(RowError, match=r"line 1: 'x\.y\.z' is null"):
        PromptTemplate("{{ x.y.z }}").render({"x": {"y": {"z": None}}})


TWICE = "{% set ns = namespace(x='xx') %}{% for i in range(60) %}{% set ns.x = "


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ range(10 ** 9) | list }}",
        "{{ 'x' * 10 ** 11 }}",
        "{{ ['x'] * 10 ** 11 }}",
        "{{ 9 ** (9 ** 9) }}",
        TWICE + "ns.x ~ ns.x %}{% endfor %}",
        TWICE + "ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=9) %}"
        "{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{% macro m(n) %}{% for i in range(9) %}{% if n %}{{ m(n - 1) }}{% endif %}{% endfor %}"
        "{% endmacro %}{{ m(50) }}",
        "{{ 'x'.ljust(10 ** 11) }}",
        "{{ 'x' | center(10 ** 11) }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ '%99999999999d' | format(1) }}",
        "{{ '{:99999999999}'.format(1) }}",
        "{{ lipsum(n=10 ** 9) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ '{0.__class__}'.format(1) }}",
    ],
)
def test_templates_end_and_stay_inside(source: str) -> None:
    template = PromptTemplate(source)
    with pytest.raises((SecurityError, UndefinedError)):
        template.render({})


def test_a_long_text_is_fine() -> None:
    text = "x" * (MAX_SIZE - 1)
    assert PromptTemplate("{{ t }}!").render({"t": text}) == text + "!"


def test_each_row_has_all_steps() -> None:
    template = PromptTemplate("{% for a in range(9000) %}{{ a }}{% endfor %}")
    for _ in range(150):
        template.render({})
