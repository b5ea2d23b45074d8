"""What every page has in common: the templates, the style, and a policy that allows only the page's own parts and no request.

A page contains everything it needs. Its content security policy names its style and scripts by their hashes. Text from outside
(a model's name, a path, a message) is escaped by Jinja. Data for a script is JSON without any `<`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from uncollapse.report import wording
from uncollapse.report.anatomy import not_measured_sentences
from uncollapse.report.page.packed import packed_rows, sort_key

LONGEST_PRINTED = 400  # rows of a folded table that is printed, about ten pages; a longer one stays folded on paper


def render(template: str, *, styles: Sequence[str], scripts: Sequence[str], **content: Any) -> str:
    """The page that `template` draws from `content`. `styles` are names of files from `report/` on, `scripts` are programs. What
    unpacks large tables runs before page.js, which reads them."""
    style = "".join(map(source, styles))
    if source("page/page.js") in scripts:
        scripts = [source("page/packed.js"), *scripts]
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    page = (
        _environment()
        .get_template(template)
        .render(policy=policy, style=Markup(style), scripts=list(map(Markup, scripts)), **content)
    )
    return typeset(page)


_AS_IT_IS = re.compile(r"(<(script|style|pre|title|option|code)\b.*?</\2>)", re.DOTALL)
_TEXT = re.compile(r">([^<>]*(?:`|--)[^<>]*)<")
_QUOTED = re.compile(r"`([^`]+)`")
_OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]*)(?![\w-])")
_IN_TAG = re.compile(r'="[^"<>]*`[^"<>]*"')


def typeset(page: str) -> str:
    """The page with code set as code. Messages come from Python, where `uncollapse ablate` stands in backticks and an option may
    end a line after its dashes; on a page a command looks like one, and an option is never torn.

    >>> typeset("<p>Run `uncollapse ablate --grid`, or use --grid.</p>")
    '<p>Run <code>uncollapse ablate --grid</code>, or use <code class="option">--grid</code>.</p>'
    >>> typeset("<pre>`a` --b</pre><abbr title='`c`'>1</abbr>") == "<pre>`a` --b</pre><abbr title='`c`'>1</abbr>"
    True
    """
    parts = _AS_IT_IS.split(page)
    # A split with two groups: text, the element, its name, text, ...
    for place in range(0, len(parts), 3):
        text = _IN_TAG.sub(lambda found: found[0].replace("`", ""), parts[place])
        parts[place] = _TEXT.sub(lambda found: f">{_as_code(found[1])}<", f">{text}<")[1:-1]
    return "".join(part for place, part in enumerate(parts) if place % 3 != 2)


def _as_code(text: str) -> str:
    pieces = _QUOTED.split(text)
    for place, piece in enumerate(pieces):
        if place % 2:
            pieces[place] = f"<code>{piece}</code>"
        else:
            pieces[place] = _OPTION.sub(r'<code class="option">\1</code>', piece)
    return "".join(pieces)


@functools.cache
def source(name: str) -> str:
    """A file next to the templates, as text."""
    loader = _environment().loader
    assert loader is not None
    return loader.get_source(_environment(), name)[0]


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("uncollapse.report", ""),  # a template lies beside the code that fills it
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data"] = _data
    environment.filters["sort_key"] = sort_key
    environment.globals["packed_rows"] = packed_rows
    environment.globals["wording"] = wording
    environment.globals["LONGEST_PRINTED"] = LONGEST_PRINTED
    environment.globals["not_measured_sentences"] = not_measured_sentences
    return environment


def _data(value: object) -> Markup:
    """JSON that can stand inside a script element: without `<` it can neither close it nor open a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
