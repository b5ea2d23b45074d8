"""The corpus and the experts on the page of a diagnosis: what each figure means stands beside those of the other measures."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape

from tests.helpers import records_samples as samples
from uncollapse.records.diagnosis import CorpusRecord, DiagnosisRecord, RouterRecord
from uncollapse.report import draw

PLAIN = {"points", "attainable rank", "attainable centred rank", "experts", "chosen for a token", "tokens"}
PLAIN |= {"smallest load", "largest load", "never chosen", "directions for 95 %"}
PLAIN |= {"share of the first direction", "share of the first ten"}  # their names say it


def observed() -> DiagnosisRecord:
    spectrum = (12.0, 9.0, 5.0, 2.0, 1.2, 1.1, 1.3, 7, 8, 0.4, 0.9, 0.2, 0.7, 0.6)
    cloud = CorpusRecord("block.0", 0, None, "mean", 20, 32, None, 20, 19, *spectrum, 20, 0.1, 0.9, 0.8, 0.7)
    router = RouterRecord(0, None, 4, 2, 10, load=[0.1, 0.2, 0.3, 0.4], entropy=0.9, effective_experts=3.5, dead=[])
    return replace(samples.encoder(), corpus=[cloud], routers=[router])


def titles(page: str, key: str) -> set[str]:
    head = page.split(f'<table id="{key}"')[1].split("</thead>")[0]
    return {unescape(title) for title in re.findall(r"<span>(.*?)</span>", head)}


def test_every_figure_of_the_corpus_and_the_experts_is_defined() -> None:
    page = draw(observed())
    defined = {name for terms in re.findall(r"<dt>(.*?)</dt>", page) for name in terms.split(", ")}
    shown = titles(page, "corpus-mean") | titles(page, "routers")
    assert {"novelty", "unbiased CKA", "decay of variances", "entropy of the load"} <= shown
    assert shown - PLAIN - {"site", "block"} <= defined


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
    assert "3,627<small>64 of them taken</small>" in page
    whole = draw(replace(record, corpus=[replace(sampled, sampled=None)]))
    assert "The corpus as one cloud: every token" in whole
    assert "of them taken" not in whole
