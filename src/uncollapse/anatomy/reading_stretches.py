"""Which stretch of a pass is one block: the run of a module, or a piece of the code of one that holds several."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import nn

from uncollapse.anatomy.norm_reading import next_products, pieces_between
from uncollapse.anatomy.reading_parts import Parts
from uncollapse.anatomy.reading_sums import Sum
from uncollapse.anatomy.torch_calls import PASSES
from uncollapse.anatomy.tracing import Call
from uncollapse.anatomy.vocabulary import (
    Layout,
)
from uncollapse.errors import UnsupportedModel


@dataclass
class Stretch:
    """The stretch of a pass that is one block: the run of its module, or of the module in whose own code it stands beside
    others (then with `entry` and `exit`, the values where it begins and ends, and a `label`). `group` tells stacks apart."""

    call: Call
    sums: list[Sum]
    group: tuple[int, int]
    entry: int | None = None
    exit: int | None = None
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or self.call.name


class Stretches(Parts):
    """The stretches of the pass that are blocks."""

    def _stretches(self, layout: Layout | None) -> list[Stretch]:
        """The blocks, in the order they run."""
        holds = {c.index: [s for s in self.sums if c.first <= s.root < c.last] for c in self.t.calls}
        attending = {s.root for s in self.sums if any(p.kind == "attention" for p in self._group(s)[0])}
        attends = {index: [s for s in held if s.root in attending] for index, held in holds.items()}
        if layout is not None:
            return self._laid_out(layout, holds, attending)
        chosen: list[int] = []
        shared: list[int] = []  # modules in whose own code the additions of several blocks stand
        for found in (s for s in self.sums if s.root in attending):
            scores = self._scores_of(found)
            path = self.t.call_path(self.t.nodes[found.root].call)
            home = next(i for i in path if all(self.t.calls[i].first <= s < self.t.calls[i].last for s in scores))
            if len(attends[home]) > 1 and not self._is_one(home, holds, attends[home]):
                shared.append(home)
                continue
            outermost = path[0]
            members: list[int] = []
            for index in path:
                if len(attends[index]) > 1:
                    break
                outermost = index
                if self._is_member(index, holds):
                    members.append(index)
            inside = [s for leaf in found.leaves if leaf != found.stream for s in self._attending(leaf, found.stream)]
            chosen.append(self._deepest(members[-1] if members else outermost, holds, inside))
            if not self._enters(chosen[-1], holds):  # one block alone, in the model's own code
                shared.append(chosen.pop())
        chosen = list(dict.fromkeys(chosen))
        chosen = [c for c in chosen if not any(c != other and self._within(other, c) for other in chosen)]
        lists = {self.t.calls[i].name.rpartition(".")[0] for i in chosen if self._is_listed(self.t.calls[i].name)}
        for call in self.t.calls:  # blocks without attention between blocks with it: hybrids
            covered = any(self._within(call.index, c) or self._within(c, call.index) for c in chosen)
            if call.name and call.name.rpartition(".")[0] in lists and holds[call.index] and not covered:
                chosen.append(call.index)
        found_blocks = [self._of_module(i, holds) for i in chosen]
        taken = {s.root for i in chosen for s in holds[i]}
        for home in dict.fromkeys(shared):
            found_blocks += self._side_by_side(home, [s for s in holds[home] if s.root not in taken], attending)
        return sorted(found_blocks, key=lambda stretch: stretch.sums[0].root if stretch.sums else stretch.call.first)

    def _of_module(self, index: int, holds: Mapping[int, list[Sum]]) -> Stretch:
        call = self.t.calls[index]
        return Stretch(call, holds[index], (call.parent, 0))

    def _laid_out(self, layout: Layout, holds: Mapping[int, list[Sum]], attending: Collection[int]) -> list[Stretch]:
        """The blocks that a layout names: modules that run, or that hold what runs in the code of a module around them."""
        whole = [c for c in self.t.calls if c.name in set(layout.blocks) and holds[c.index]]
        found = [self._of_module(c.index, holds) for c in whole]
        for name in (n for n in layout.blocks if n not in {c.name for c in whole}):
            scores = [
                i for i in self.attentions if f"{self.t.calls[self.t.nodes[i].call].name}.".startswith(f"{name}.")
            ]
            home = next((s for s in self.sums if s.root in attending and self._scores_of(s) & set(scores)), None)
            beside = [] if home is None else self._side_by_side(*self._shared_home(home, holds), attending)
            own = [b for b in beside if home is not None and home.root in {s.root for s in b.sums}]
            if not own:
                start = self._layout(layout)
                advice = f", or start from {start}" if start else ""
                raise UnsupportedModel(
                    f"anatomy: expected the Layout's blocks among the modules that run, got no run of {name!r} in "
                    f"{type(self.model).__name__}. Look at model.named_modules() for the names{advice}.",
                    found=self._found(),
                    identity=f"the Layout's block {name!r} runs",
                    layout=start,
                )
            found += [replace(b, label=name) for b in own]
        return sorted(found, key=lambda stretch: stretch.sums[0].root if stretch.sums else stretch.call.first)

    def _shared_home(self, found: Sum, holds: Mapping[int, list[Sum]]) -> tuple[int, list[Sum]]:
        """The innermost run that holds a sum and its attention, and the sums in it."""
        scores = self._scores_of(found)
        path = self.t.call_path(self.t.nodes[found.root].call)
        home = next(i for i in path if all(self.t.calls[i].first <= s < self.t.calls[i].last for s in scores))
        return home, holds[home]

    def _is_one(self, home: int, holds: Mapping[int, list[Sum]], attending: list[Sum]) -> bool:
        """Whether a run with several self-attention additions is one block all the same: a member of a list of its like, and
        its attentions are not themselves members of a list inside it."""
        inner = {self._listed_inside(home, found) for found in attending}
        return self._is_member(home, holds) and inner == {None}

    def _listed_inside(self, home: int, found: Sum) -> str | None:
        """The member of a list inside the module of `home` that an attention stands in."""
        around = self.t.calls[home].name
        owner = self.t.calls[self.t.nodes[min(self._scores_of(found))].call].name
        steps = owner.split(".") if owner else []
        for end in range(around.count(".") + 2 if around else 1, len(steps) + 1):
            name = ".".join(steps[:end])
            if isinstance(
                self.model.get_submodule(name.rpartition(".")[0]), (nn.ModuleList, nn.Sequential, nn.ModuleDict)
            ):
                return name
        return None

    def _side_by_side(self, home: int, sums: list[Sum], attending: Collection[int]) -> list[Stretch]:
        """Blocks whose additions stand in one module's own code: each a self-attention addition and those after it, up to the
        next. Where as many stand before the first as are missing behind the last (macaron), each takes its own before it."""
        starts = [i for i, s in enumerate(sums) if s.root in attending]
        gaps = {b - a for a, b in itertools.pairwise(starts)}
        lead = starts[0]
        if gaps and gaps != {len(sums) - starts[-1] + lead}:
            lead = 0
        starts = [0, *(i - lead for i in starts[1:]), len(sums)]
        pieces = [sums[a:b] for a, b in itertools.pairwise(starts)]
        call, found = self.t.calls[home], []
        group, left, behind_norm = 0, None, False
        for number, piece in enumerate(pieces):
            entry = self._beginning(call, piece[0].stream, left)
            if piece[0].read is not None:
                entry = self._laid_like(entry, piece[0].root)
            group += left is not None and entry != left
            if number + 1 < len(pieces):
                leaving = self._leaving(piece[-1].root, pieces[number + 1][0].stream)
                behind_norm = leaving != piece[-1].root
            else:
                within = [self._leaving(a.root, b.stream) != a.root for a, b in itertools.pairwise(piece)]
                leaving = self._leaving_last(piece[-1].root) if behind_norm or any(within) else piece[-1].root
            summed = self._summed(leaving)
            named = self._listed_inside(home, next((s for s in piece if s.root in attending), piece[0]))
            label = named or f"block {number} of {call.name or 'the model itself'}"
            found.append(Stretch(call, piece, (home, group), entry, summed, label))
            left = summed
        return found

    def _summed(self, root: int) -> int:
        """The sum itself, where it is the sum over a stack."""
        return self.t.consumers[root][0] if self.t.nodes[root].operation == "stack" else root

    def _beginning(self, call: Call, stream: int, left: int | None) -> int:
        """Where the stream of a block's first addition begins: where the block before left it, as an argument of the module
        around, or where it is made."""
        carried = self._carried(stream, () if left is None else (left,))
        if left in carried:
            return left
        given = [i for i in call.inputs.values() if i in carried and self.t.nodes[i].size == self.t.nodes[stream].size]
        return max(given) if given else stream

    def _laid_like(self, stream: int, root: int) -> int:
        """Several streams as they lie in a sum: where a view of them was found, the value that it is a view of."""
        index: int | None = stream
        while index is not None and self.t.nodes[index].shape != self.t.nodes[root].shape:
            index = self.t.passes_through(index) if self.t.nodes[index].operation in PASSES else None
        return stream if index is None else index

    def _leaving(self, root: int, following: int) -> int:
        """Where a block is left whose last addition is `root`: behind the norms that the sum passes before it is carried on to
        the stream of the following block."""
        return root if root == following else self._behind_norms(root, [following])

    def _leaving_last(self, root: int) -> int:
        """The same for the last of several blocks that are left behind a norm: behind the first norm that the sum passes."""
        targets = [*next_products(self.t, root, self.t.results), *self.t.results]
        return self._behind_norms(root, [i for i in targets if self.t.depends(i, root)][:1], first=True)

    def _behind_norms(self, root: int, targets: Collection[int], *, first: bool = False) -> int:
        """The last value of the norms between `root` and the targets; where a module makes it, the module's."""
        pieces = pieces_between(self.t, root, targets)
        if not pieces:
            return root
        piece = pieces[0] if first else pieces[-1]
        for call in self.t.calls:  # the outermost module that holds the norm and no more than it
            result = call.outputs.get(None)
            if (
                result is not None
                and root < call.first <= piece.bare < call.last
                and self._only_moved(piece.target, result)
            ):
                return result
        return piece.target

    def _within(self, inner: int, outer: int) -> bool:
        return outer in self.t.call_path(inner)

    def _is_member(self, index: int, holds: Mapping[int, list[Sum]]) -> bool:
        """Whether the call runs one of a list of like modules, another of which holds additions too."""
        call = self.t.calls[index]
        around, _, _ = call.name.rpartition(".")
        if not call.name or not isinstance(
            self.model.get_submodule(around), (nn.ModuleList, nn.Sequential, nn.ModuleDict)
        ):
            return False
        kind = type(self.model.get_submodule(call.name))
        return any(
            c.name != call.name
            and c.name.rpartition(".")[0] == around
            and holds[c.index]
            and type(self.model.get_submodule(c.name)) is kind
            for c in self.t.calls
        )

    def _deepest(self, index: int, holds: Mapping[int, list[Sum]], scores: list[int]) -> int:
        """The deepest call inside `index` that still holds all of its additions and the attention."""
        while True:
            inside = [
                c
                for c in self.t.calls[index].children
                if len(holds[c]) == len(holds[index])
                # Not where only some tokens go through it, unless the stream only begins in here.
                and (self._sizes(c) & (self._sizes(index) or self._sizes(c)) or not self._enters(index, holds))
                and all(
                    self.t.calls[c].first <= s < self.t.calls[c].last
                    for s in scores
                    if self.t.calls[index].first <= s < self.t.calls[index].last
                )
            ]
            if not inside:
                return index
            index = inside[0]

    def _enters(self, index: int, holds: Mapping[int, list[Sum]]) -> bool:
        """Whether the stream of a call's additions comes from outside, among its arguments."""
        given = tuple(self.t.calls[index].inputs.values())
        stream = holds[index][0].stream
        return index > 0 and bool(set(given) & self._carried(stream, given))

    def _sizes(self, index: int) -> set[int]:
        call = self.t.calls[index]
        return {self.t.nodes[i].size for i in (*call.outputs.values(), *call.written.values())}

    def _is_listed(self, name: str) -> bool:
        """Whether the module stands in a list with others."""
        around = self.model.get_submodule(name.rpartition(".")[0])
        return isinstance(around, (nn.ModuleList, nn.Sequential)) and len(around) > 1
