"""What every page has in common: the templates, the style, and a policy that allows only the page's own parts and no request.

A page contains everything it needs. Its content security policy names its style and scripts by their hashes. Text from outside
(a model's name, a path, a message) is escaped by Jinja. Data for a script is JSON without any `<`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from uncollapse.report import wording
from uncollapse.report.anatomy import not_measured_sentences
from uncollapse.report.page.packed import packed_rows, sort_key


def render(template: str, *, styles: Sequence[str], scripts: Sequence[str], **content: Any) -> str:
    """The page that `template` draws from `content`. `styles` are names of files from `report/` on, `scripts` are programs. Before
    them runs what unpacks large tables."""
    style = "".join(map(source, styles))
    scripts = [source("page/packed.js"), *scripts]
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        _environment()
        .get_template(template)
        .render(policy=policy, style=Markup(style), scripts=list(map(Markup, scripts)), **content)
    )


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
    environment.globals["not_measured_sentences"] = not_measured_sentences
    return environment


def _data(value: object) -> Markup:
    """JSON that can stand inside a script element: without `<` it can neither close it nor open a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
