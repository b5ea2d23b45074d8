"""The corpus and the experts on the page of a diagnosis: what each figure means stands beside those of the other measures."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html import unescape

from rich.console import Console

from tests.helpers import records_samples as samples
from tests.helpers.pages import Page, references_of
from uncollapse.records.diagnosis import CorpusRecord, DiagnosisRecord, RouterRecord
from uncollapse.report import draw, show, wording
from uncollapse.report.diagnosis import corpus

PLAIN = {"points", "attainable rank", "attainable centred rank", "experts", "chosen for a token", "tokens"}
PLAIN |= {"smallest load", "largest load", "never chosen", "directions for 95 %"}
PLAIN |= {"share of the first direction", "share of the first ten"}  # their names say it


def observed() -> DiagnosisRecord:
    spectrum = (12.0, 9.0, 5.0, 2.0, 1.2, 1.1, 1.3, 7, 8, 0.4, 0.9, 0.2, 0.7, 0.6)
    cloud = CorpusRecord("block.0", 0, None, "mean", 20, 32, None, 20, 19, *spectrum, 20, 0.1, 0.9, 0.8, 0.7)
    router = RouterRecord(0, None, 4, 2, 10, load=[0.1, 0.2, 0.3, 0.4], entropy=0.9, effective_experts=3.5, dead=[])
    return replace(samples.encoder(), corpus=[cloud], routers=[router])


def printed(record: DiagnosisRecord) -> str:
    file = io.StringIO()
    show(record, Console(file=file, width=200))
    return " ".join(file.getvalue().split())


def titles(page: str, key: str) -> set[str]:
    head = page.split(f'<table id="{key}"')[1].split("</thead>")[0]
    return {unescape(title) for title in re.findall(r"<span>(.*?)</span>", head)}


def test_every_figure_of_the_corpus_and_the_experts_is_defined() -> None:
    page = draw(observed())
    defined = {name for terms in re.findall(r"<dt>(.*?)</dt>", page) for name in terms.split(", ")}
    shown = titles(page, "corpus-mean") | titles(page, "routers")
    assert {"novelty", "unbiased CKA", "decay of variances", "entropy of the load"} <= shown
    assert shown - PLAIN - {"site", "block"} <= defined


def test_the_experts_stand_beside_even_choice_at_random() -> None:
    record = observed()
    (router,) = record.routers
    drawn = replace(router, random_entropy=0.875, random_dead=0.23, random_load=[0.05, 0.51])
    even = replace(drawn, block=1, random_dead=1e-9, entropy=0.95)
    page = Page(draw(replace(record, routers=[drawn, even])))
    assert references_of(page, "routers") == {
        "block": "",
        "experts": "",
        "chosen for a token": "",
        "tokens": "",
        "entropy of the load": "by chance 0.875",
        "effective experts": f"by chance {wording.number(4**0.875)}",
        "smallest load": "even 0.250; by chance at least 0.0500",
        "largest load": "even 0.250; by chance at most 0.510",
        "never chosen": "by chance 0 … 0.230",
    }
    assert corpus.CHANCE in page.text
    words = printed(replace(record, routers=[drawn, even]))
    assert "entropy 0.900 of 1 (by chance 0.875), 3.50 effective experts of 4" in words
    assert "every expert got some token (by chance 0.230)" in words
    assert corpus.CHANCE in words
    alone = replace(record, routers=[even])
    assert references_of(Page(draw(alone)), "routers")["never chosen"] == "by chance none"
    assert "(by chance none)" in printed(alone)


def test_a_record_of_before_says_what_is_even_only() -> None:
    page = Page(draw(observed()))
    assert corpus.CHANCE not in page.text
    assert {words for words in references_of(page, "routers").values() if words} == {"even 0.250"}
    assert "by chance" not in printed(observed())


def test_the_models_own_pooling_stands_beside_pooled_outputs() -> None:
    record = observed()
    (cloud,) = record.corpus
    own = replace(record, corpus=[cloud, replace(cloud, site="pooler_output", block=None, pooling="own")])
    assert corpus.POOLED_OUTPUT in draw(own)
    assert corpus.POOLED_OUTPUT not in draw(record)
    assert corpus.of_corpus(own)[1][0] in unescape(draw(own))
    words = printed(own)
    assert "The model's own pooling, pooler_output, uses 9 of 19 directions; its mean cosine is 0.700." in words
    assert f"({corpus.POOLED_OUTPUT}): directions " in words
    assert "own pooling" not in printed(record)


def test_a_page_without_them_does_not_define_them() -> None:
    page = draw(samples.encoder())
    assert "CKA" not in page
    assert "entropy of the load" not in page


def test_a_sample_of_the_tokens_is_not_called_every_token() -> None:
    record = observed()
    (cloud,) = record.corpus
    sampled = replace(cloud, pooling="tokens", points=3627, sampled=64)
    page = draw(replace(record, corpus=[sampled]))
    assert "The corpus as one cloud: a sample of the tokens" in page
    assert "3,627<small>64 taken</small>" in page
    whole = draw(replace(record, corpus=[replace(sampled, sampled=None)]))
    assert "The corpus as one cloud: every token" in whole
    assert "64 taken" not in whole
