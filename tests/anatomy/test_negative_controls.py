"""Negative controls: a picture that is wrong in one respect is refused by the proof, whatever family the model is of.

Each control takes the honest reading of a family, spoils one thing in every block, and hands it to the proof.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import uncollapse as uc
from tests.helpers.families import FAMILIES, Family, inputs_for
from uncollapse.anatomy import proof
from uncollapse.anatomy.examples import example
from uncollapse.anatomy.proof import prove
from uncollapse.anatomy.vocabulary import Anatomy, Block, Part, Residual

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
Spoil = Callable[[Block], Block]


def chosen(*placements: str, parts: int = 1) -> Any:
    """The families of these placements."""
    names = {n: f for n, f in FAMILIES.items() if f.placement in placements}
    return pytest.mark.parametrize("family", names.values(), ids=names)


def spoiled(monkeypatch: pytest.MonkeyPatch, family: Family, spoil: Spoil) -> Anatomy:
    """The proof's answer to the family's anatomy with every block spoiled."""
    honest = proof.read

    def dishonest(*args: Any, several: bool = False) -> Anatomy:
        if several:  # a second look, at several streams: these families have one
            raise uc.UnsupportedModel("one stream")
        anatomy = honest(*args)
        blocks = tuple(spoil(b) for b in anatomy.blocks)
        assert blocks != anatomy.blocks
        return replace(anatomy, blocks=blocks)

    monkeypatch.setattr(proof, "read", dishonest)
    return prove(family.build(), example(inputs_for(family)))


def refused(monkeypatch: pytest.MonkeyPatch, family: Family, spoil: Spoil) -> uc.UnsupportedModel:
    with pytest.raises(uc.UnsupportedModel) as caught:
        spoiled(monkeypatch, family, spoil)
    error = caught.value
    assert error.identity
    assert "off by" in error.identity
    layout = eval(error.layout, {"uc": uc})
    assert isinstance(layout, uc.Layout)
    assert set(layout.blocks) <= {name for name, _ in family.build().named_modules()}
    return error


# An addition withheld --------------------------------------------------------------------------------------------------


def without_residual(number: int) -> Spoil:
    """The block as if its `number`-th residual addition, and the parts it adds, were not there."""

    def spoil(block: Block) -> Block:
        if len(block.residuals) == 1:  # parallel parts: the addition that sums them
            (residual,) = block.residuals
            return replace(block, residuals=(replace(residual, additions=residual.additions[1:]),))
        gone = block.residuals[number]
        kept = [i for i in range(len(block.parts)) if i not in gone.parts]
        renumbered = {old: new for new, old in enumerate(kept)} | {-1: -1}

        def moved(residual: Residual) -> Residual:
            additions = tuple(
                replace(n, leaves=tuple(frozenset(renumbered[i] for i in leaves) for leaves in n.leaves))
                for n in residual.additions
            )
            return replace(residual, additions=additions, parts=tuple(renumbered[i] for i in residual.parts))

        return replace(
            block,
            residuals=tuple(moved(r) for r in block.residuals if r is not gone),
            parts=tuple(block.parts[i] for i in kept),
        )

    return spoil


@families
@pytest.mark.parametrize("number", [0, -1], ids=["first", "last"])
def test_a_withheld_addition_is_refused(monkeypatch: pytest.MonkeyPatch, family: Family, number: int) -> None:
    refused(monkeypatch, family, without_residual(number))


# Two roles swapped -----------------------------------------------------------------------------------------------------


def stream_and_update_swapped(block: Block) -> Block:
    residuals = tuple(
        replace(r, additions=tuple(replace(n, leaves=n.leaves[::-1]) for n in r.additions)) for r in block.residuals
    )
    return replace(block, residuals=residuals)


def attention_called_mlp(block: Block) -> Block:
    """Attention keeps its place and loses its name."""
    parts = tuple(Part("mlp", (), p.module) if p.attention else p for p in block.parts)
    return replace(block, parts=parts)


def labels_swapped(block: Block) -> Block:
    """The MLP is called attention, with the attention's own calls, and the self-attention is called MLP."""
    first, last = block.parts[0], block.parts[-1]
    return replace(block, parts=(replace(last), *block.parts[1:-1], replace(first)))


def self_called_cross(block: Block) -> Block:
    kinds = {"attention": "cross", "cross": "attention", "mlp": "mlp"}
    return replace(block, parts=tuple(replace(p, kind=kinds[p.kind]) for p in block.parts))  # type: ignore[arg-type]


@families
def test_stream_and_update_swapped_are_refused(monkeypatch: pytest.MonkeyPatch, family: Family) -> None:
    refused(monkeypatch, family, stream_and_update_swapped)


@families
def test_attention_called_mlp_is_found_to_mix_tokens(monkeypatch: pytest.MonkeyPatch, family: Family) -> None:
    anatomy = spoiled(monkeypatch, family, attention_called_mlp)
    assert [b.parts[0].kind for b in anatomy.blocks] == ["mixer"] * family.blocks
    assert {b.parts[-1].kind for b in anatomy.blocks} == {"mlp"}


@families
def test_attention_and_mlp_swapped_are_refused(monkeypatch: pytest.MonkeyPatch, family: Family) -> None:
    refused(monkeypatch, family, labels_swapped)


@families
def test_self_attention_called_cross_attention_is_refused(monkeypatch: pytest.MonkeyPatch, family: Family) -> None:
    refused(monkeypatch, family, self_called_cross)


# A norm mislabelled ----------------------------------------------------------------------------------------------------


def post_norms_forgotten(block: Block) -> Block:
    return replace(block, residuals=tuple(replace(r, norms_post=()) for r in block.residuals))


def norms_called_post(block: Block) -> Block:
    """Each norm on the way into a part, or out of it, is said to stand behind the addition."""
    where = {p: i for i, r in enumerate(block.residuals) for p in r.parts} | {None: 0}
    moved = [(n, where[n.place]) for n in block.norms if n.role in {"before", "after"}]
    residuals = tuple(
        replace(r, norms_post=(*(n.module for n, place in moved if place == i), *r.norms_post))
        for i, r in enumerate(block.residuals)
    )
    return replace(block, residuals=residuals)


@chosen("post")
def test_a_forgotten_post_norm_is_refused(monkeypatch: pytest.MonkeyPatch, family: Family) -> None:
    refused(monkeypatch, family, post_norms_forgotten)


@chosen("pre", "pre, parallel", "sandwich", "output")
def test_a_norm_of_a_part_claimed_to_be_of_the_stream_is_refused(
    monkeypatch: pytest.MonkeyPatch, family: Family
) -> None:
    refused(monkeypatch, family, norms_called_post)


# A block's output bent -------------------------------------------------------------------------------------------------


@families
def test_a_block_whose_output_is_bent_behind_its_last_addition_is_refused(family: Family) -> None:
    model = family.build()
    name = prove(model, example(inputs_for(family))).blocks[1].module.name

    def bent(module: object, args: object, output: Any) -> Any:
        stream = output if isinstance(output, Tensor) else output[0]
        changed = stream + 0.05 * stream.roll(1, -1)  # linear, but no longer feature by feature
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    model.get_submodule(name).register_forward_hook(bent)
    with torch.no_grad(), pytest.raises(uc.UnsupportedModel) as caught:
        prove(model, example(inputs_for(family)))
    assert caught.value.identity
    assert isinstance(eval(caught.value.layout, {"uc": uc}), uc.Layout)
