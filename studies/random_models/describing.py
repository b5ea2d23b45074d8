"""A random model as its author would have written it down: sizes, odd pieces, and the lines that matter."""

from __future__ import annotations

from studies.random_models.drawing import CHOICES
from studies.random_models.specification import Specification


def odd_pieces(spec: Specification) -> dict[str, str]:
    """The pieces that are not the plain choice."""
    plain = {name: next(iter(of)) for name, of in CHOICES.items()}
    # What a fused call, or a model without a mask, leaves no choice about is not odd.
    forced = {"softmax": {"inside", "none"}, "masking": {"none"}, "forbidden": {"none"}, "route": {"none"}}
    return {n: c for n, c in spec.pieces.items() if c != plain[n] and c not in forced.get(n, ())}


def _sum(spec: Specification, stream: str, update: str) -> str:
    names: dict[str, str | dict[str, str]] = {
        "none": "",
        "fixed": {"s": "0.75 * ", "u": "0.5 * "},
        "learned": "self.scale * ",
        "buffered": "self.kept * ",
    }

    def scaled(kind: str, which: str, text: str) -> str:
        found = names.get(kind, "self.scales * ")
        return (found[which] if isinstance(found, dict) else found) + text

    x, f = scaled(spec.stream_scale, "s", stream), scaled(spec.update_scale, "u", update)
    ways = {"x + f": f"{x} + {f}", "f + x": f"{f} + {x}", "x.add_(f)": f"({x}).add_({f})", "x += f": f"{x}; x += {f}"}
    return ways.get(
        spec.addition, f"torch.add({x}, {f})" if spec.addition.startswith("torch.add(x") else f"torch.add({f}, {x})"
    )


def _logits(spec: Specification) -> list[str]:
    lines = []
    if spec.queries != "plain":
        lines.append(f"q, k = {spec.queries} of q, k")
    if spec.positions.startswith("rotary"):
        lines.append("q, k = rotated(q), rotated(k)")
    lines.append("L = <q, k> / sqrt(head_width)" + (" + slopes * distance" if spec.positions == "ALiBi" else ""))
    if spec.softcap != "none":
        lines.append("L = 4 tanh(L / 4)")
    mask = {"none": "padding" if spec.padding != "none" else "", "causal": "causal"}.get(spec.mask, spec.mask)
    if mask:
        lines.append(f"mask: {mask}, {spec.masking}, forbidden = {spec.forbidden}, passed {spec.route}")
    if spec.sink != "none":
        lines.append(f"sink: {spec.sink}")
    lines.append(f"A = {spec.softmax}(L); y = A @ v, by {spec.attention}")
    return lines


def described(spec: Specification) -> str:
    """The model in a screen of text."""
    name = "" if spec.norm == "none" else spec.norm
    before = f"{name}(x)" if spec.placement in {"pre", "sandwich"} or spec.is_parallel else "x"

    def sublayer(which: str) -> str:
        inner = f"{which}({before if name else 'x'})"
        return f"{name}({inner})" if spec.placement in {"sandwich", "output"} and name else inner

    if spec.is_parallel:
        block = [f"x = {_sum(spec, 'x', sublayer('attention'))} + {sublayer('mlp')}   # {spec.placement}"]
    else:
        block = [f"x = {_sum(spec, 'x', sublayer(which))}" for which in ("attention", "mlp")]
    if spec.placement == "post" and name:
        block = [f"{line.replace('x = ', f'x = {name}(', 1)})" for line in block]
    sizes = ", ".join(f"{b} sequences of {t} tokens" for b, t in spec.batches)
    lines = [
        f"seed {spec.seed}: {spec.blocks} blocks, {spec.heads} heads ({spec.key_value_heads} of keys) of {spec.head_width}, "
        f"width {spec.width}, {spec.dtype}; {sizes}",
        f"called with ({spec.signature}), wrapper: {spec.wrapper}, ids {spec.ids}, padding {spec.padding}",
        f"stream {spec.stream}, state {spec.state}, residuals {spec.residuals}, positions {spec.positions}",
        "block:",
        *(f"    {line}" for line in block),
        "attention:",
        f"    q, k, v by {spec.inputs}",
        *(f"    {line}" for line in _logits(spec)),
        *([f"    y = y * sigmoid(gate(x))   # {spec.gate}"] if spec.gate != "none" else []),
        f"    return {spec.projection}(y)" + ("" if spec.adapter == "none" else f" with {spec.adapter}"),
        f"mlp: {spec.mlp}; start: {spec.start}; output: {spec.output}",
        f"odd: {', '.join(f'{k}={v}' for k, v in odd_pieces(spec).items()) or 'nothing'}",
    ]
    return "\n".join(lines)
