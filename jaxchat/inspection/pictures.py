"""Draws the values of this package with matplotlib. `PICTURES` maps the kind of a value to its pictures."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat.decode.sampling import FILTERS
from jaxchat.evaluation.curves import drawing

COLUMNS = 96  # Characters per line of a coloured text.
MOST_DOCUMENTS, MOST_LINES = 20, 40  # Drawn of a step; the JSON file has all.
MOST_LABELS = 60  # Labels of a map.
LOSS_LIMIT = 8.0  # Nats: colours do not change beyond.


def draw(out: Path, kind: str, suffix: str, value: Any) -> list[str]:
    """Writes the pictures of a value into a directory; returns their names."""
    names, pyplot = [], drawing()
    for name, picture in PICTURES.get(kind, {}).items():
        figure = picture(value)
        figure.savefig(out / f"{name}{suffix}.png", dpi=100)
        pyplot.close(figure)
        names.append(f"{name}{suffix}.png")
    return names


@functools.cache
def _characters() -> frozenset[int]:
    """The characters of matplotlib's own font, which has no Hangul and no emoji."""
    from matplotlib import font_manager, ft2font

    return frozenset(ft2font.FT2Font(font_manager.findfont("DejaVu Sans Mono")).get_charmap())


def printable(text: str) -> str:
    """The text with its line ends visible, and with a code point in place of a character that cannot be drawn."""
    text = text.replace("\n", "\u21b5").replace("$", "\\$")  # A dollar sign begins a formula.
    return "".join(c if ord(c) in _characters() and c.isprintable() else f"<{ord(c):x}>" for c in text)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **ratios: Any) -> tuple[Any, Any]:
    about = {"figsize": (width, height), "constrained_layout": True, "squeeze": False}
    return drawing().subplots(rows, columns, **about, **ratios)


def _label(name: str, most: int = 14) -> str:
    """A token's name without quotes, shortened."""
    name = name[1:-1] if name[:1] in "'\"" and len(name) > 2 else name
    name = printable(name.replace(" ", "\u2423"))
    return name if len(name) <= most else name[: most - 1] + "\u2026"


def _coloured(axis: Any, pieces: Sequence[str], values: Sequence[float | None], lines: int = 10_000) -> int:
    """Writes pieces of text with a background by value (grey for None) from the top of an axis; returns the lines."""
    pyplot = drawing()
    column = line = 0
    for piece, value in zip(pieces, values):
        piece = printable(piece)
        if column + len(piece.replace("\\$", "$")) > COLUMNS:
            column, line = 0, line + 1
        if line == lines:
            axis.text(0, line, "\u2026", va="center", family="DejaVu Sans Mono", fontsize=9)
            break
        width = len(piece.replace("\\$", "$"))
        colour = "0.93" if value is None else pyplot.get_cmap("YlOrRd")(min(value, LOSS_LIMIT) / LOSS_LIMIT * 0.8)
        axis.add_patch(pyplot.Rectangle((column, line - 0.45), width, 0.9, color=colour, linewidth=0))
        axis.text(column, line, piece, va="center", family="DejaVu Sans Mono", fontsize=9)
        column += width
    axis.set(xlim=(0, COLUMNS + 1), ylim=(line + 1, -1))
    axis.axis("off")
    return line + 1


def _line_count(pieces: Sequence[str]) -> int:
    return 2 + sum(len(printable(piece)) for piece in pieces) // (COLUMNS - 8)


def draw_losses(value: Mapping[str, Any]) -> Any:
    """The text with its losses as colours, and as bars."""
    tokens = value["tokens"]
    pieces, losses = [value["first"], *(_plain(one["name"]) for one in tokens)], [one["loss"] for one in tokens]
    height = 0.2 * _line_count(pieces)
    figure, ((text,), (bars,)) = _figure(8.4, height + 3.4, 2, height_ratios=(height, 3))
    _coloured(text, pieces, [None, *losses])
    text.set_title(f"mean loss {np.mean(losses):.3f} nats per token (yellow: expected, red: surprising)", fontsize=9)
    bars.bar(range(len(losses)), losses, color="C3")
    bars.set(ylabel="loss (nats)", xlim=(-0.7, len(losses) - 0.3))
    bars.set_xticks(range(len(losses)), [_label(one["name"]) for one in tokens], rotation=90, fontsize=_size(losses))
    return figure


def _plain(name: str) -> str:
    """The text of a token's name: without quotes, with the escapes of repr resolved where that is safe."""
    return name[1:-1].replace("\\n", "\n") if name[:1] in "'\"" and len(name) > 2 else name


def _size(tokens: Sequence[Any]) -> float:
    return max(3.0, min(8.0, 480 / max(len(tokens), 1)))


def draw_candidates(value: Mapping[str, Any]) -> Any:
    """The candidates of one token as bars, one panel per step of sampling."""
    step = value["steps"][min(value["token"], len(value["steps"]) - 1)]
    stages = ["model", "temperature", *(name for name, row in FILTERS.items() if value["sampling"][name] != row.off)]
    largest = max(one["probabilities"][stage] for one in step for stage in stages)
    figure, axes = _figure(2.6 * len(stages), 0.3 * len(step) + 1.2, 1, len(stages))
    for axis, stage in zip(axes[0], stages):
        shares = [one["probabilities"][stage] for one in step]
        axis.barh(range(len(step)), shares, color=["C1" if one["chosen"] else "C0" for one in step])
        for i, share in enumerate(shares):
            axis.text(share, i, f" {share:.3f}" if share else " -", va="center", fontsize=7)
        setting = value["sampling"].get(stage)
        axis.set_title("in the model" if setting is None else f"after {stage}={setting:g}", fontsize=9)
        axis.set(xlim=(0, 1.3 * largest), ylim=(len(step) - 0.5, -0.5), xlabel="probability")
        axis.set_yticks(range(len(step)), [_label(one["name"]) for one in step])
    return figure


def _heads(value: Mapping[str, Any], side: float, height: float) -> tuple[Any, list[tuple[Any, int, np.ndarray]]]:
    """A panel per head with its weights as a full matrix."""
    heads, T = value["heads"], len(value["names"])
    columns = min(4, len(heads))
    rows = -(-len(heads) // columns)
    figure, axes = _figure(side * columns, height * rows, rows, columns)
    for axis in axes.flat[len(heads) :]:
        axis.set_visible(False)
    matrices = [np.array([[*row, *[0.0] * (T - len(row))] for row in head]) for head in heads]
    return figure, [(axis, number, matrix) for number, (axis, matrix) in enumerate(zip(axes.flat, matrices))]


def draw_attention(value: Mapping[str, Any]) -> Any:
    """Heat maps: row t shows from which tokens token t takes."""
    labels = [_label(name) for name in value["names"]]
    figure, panels = _heads(value, 4.2, 4.4)
    for axis, head, matrix_TT in panels:
        axis.imshow(matrix_TT, cmap="Blues", vmin=0, vmax=1)
        axis.set_title(f"layer {value['layer']}, head {head}", fontsize=9)
        axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=_size(labels) * 0.8)
        axis.set_yticks(range(len(labels)), labels, fontsize=_size(labels) * 0.8)
    return figure


def draw_arcs(value: Mapping[str, Any]) -> Any:
    """Arcs: from every token on the right to those on the left that it takes from, as dark as the weight."""
    labels, T = [_label(name) for name in value["names"]], len(value["names"])
    figure, panels = _heads(value, 3.2, min(0.2 * T + 0.8, 20))
    for axis, head, matrix_TT in panels:
        for to in range(T):
            for source in np.flatnonzero(matrix_TT[to] > 0.05):
                axis.plot([0, 1], [source, to], color="C0", alpha=float(matrix_TT[to, source]), linewidth=1.5)
        axis.set_title(f"layer {value['layer']}, head {head}", fontsize=9)
        axis.set(xlim=(-0.02, 1.02), ylim=(T - 0.5, -0.5), xticks=[])
        axis.set_yticks(range(T), labels, fontsize=_size(labels))
        axis.secondary_yaxis("right").set_yticks(range(T), labels, fontsize=_size(labels))
    return figure


def draw_lens(value: Mapping[str, Any]) -> Any:
    """A table: for every token (column) and number of layers (row), the best candidate, coloured by probability."""
    names, rows = value["names"], value["rows"]
    figure, axes = _figure(0.62 * len(names) + 1.6, 0.34 * len(rows) + 1.7)
    axis = axes[0, 0]
    best = [[one["candidates"][0] for one in row] for row in rows]
    axis.imshow([[one["probability"] for one in row] for row in best], cmap="Greens", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(best):
        for x, one in enumerate(row):
            dark = "white" if one["probability"] > 0.6 else "black"
            axis.text(x, y, _label(one["name"], 8), ha="center", va="center", fontsize=6.5, color=dark)
    axis.set_yticks(range(len(rows)), [f"{n} layer{'s' * (n != 1)}" for n in range(len(rows))], fontsize=8)
    axis.set_xticks(range(len(names)), [_label(name, 10) for name in names], rotation=90, fontsize=7)
    axis.set_title("the most likely next token if the model ended after so many layers", fontsize=9)
    return figure


def draw_neighbours(value: Mapping[str, Any]) -> Any:
    found = value["neighbours"]
    figure, axes = _figure(5, 0.27 * len(found) + 1)
    axes[0, 0].barh(range(len(found)), [one["cosine"] for one in found], color="C2")
    axes[0, 0].set_yticks(range(len(found)), [_label(one["name"]) for one in found])
    axes[0, 0].set(ylim=(len(found) - 0.5, -0.5), xlabel=f"cosine with the embedding of {_label(value['name'])}")
    return figure


def draw_map(value: Mapping[str, Any]) -> Any:
    """All embeddings as points; those of the text and the neighbours with their names."""
    points, marked = value["points"], set(value["marked"])
    figure, axes = _figure(8, 6.5)
    named = [one for one in points if one["token"] in marked]
    for group, style in ((points, {"s": 4, "color": "0.8"}), (named, {"s": 14, "color": "C0"})):
        axes[0, 0].scatter([one["x"] for one in group], [one["y"] for one in group], **style)
    for one in named[:MOST_LABELS]:
        axes[0, 0].annotate(
            _label(one["name"]), (one["x"], one["y"]), fontsize=7, xytext=(3, 2), textcoords="offset points"
        )
    first, second = value["variance"]
    axes[0, 0].set(xlabel=f"first component ({first:.1%} of the variance)", ylabel=f"second ({second:.1%})")
    return figure


def draw_cache(value: Mapping[str, Any]) -> Any:
    figure, axes = _figure(6, 4)
    for layer in value["layers"]:
        axes[0, 0].plot(value["lengths"], np.array(layer["bytes"]) / 2**10, color="C0", alpha=0.3, linewidth=1)
    axes[0, 0].plot(value["lengths"], np.array(value["bytes"]) / 2**10, marker="o", label="all layers")
    axes[0, 0].set(xlabel="tokens", ylabel="KiB of cache per row", title="thin: each layer")
    axes[0, 0].grid(alpha=0.3)
    axes[0, 0].legend()
    return figure


def draw_merges(value: Sequence[Mapping[str, Any]]) -> Any:
    """For the parts with the most merges, the pieces after every merge; the newest piece is marked."""
    longest = sorted(value, key=lambda part: -len(part["steps"]))[:4]
    shown = list({part["text"]: part for part in longest}.values())
    lines = sum(len(part["steps"]) + 1 for part in shown)
    width = max((len(part["text"]) * 2.2 + 12 for part in shown), default=20)
    figure, axes = _figure(max(4.0, 0.11 * width), 0.24 * lines + 0.3)
    axis, y = axes[0, 0], 0
    for part in shown:
        for step in part["steps"]:
            x, merged = 0.0, step["merged"]
            for i, piece in enumerate(step["pieces"]):
                new = merged is not None and i == merged["index"]
                box = {"boxstyle": "round,pad=0.15", "facecolor": "#ffd28a" if new else "0.93", "linewidth": 0}
                shape = printable(piece.replace("\u2581", "\u2423"))
                axis.text(x, y, shape, va="center", family="DejaVu Sans Mono", fontsize=9, bbox=box)
                x += len(shape) + 1.2
            if merged is not None:
                axis.text(x + 1, y, f"merge {merged['rank']}", va="center", fontsize=7, color="0.4")
            y += 1
        y += 1
    axis.set(xlim=(-0.5, width), ylim=(y - 0.5, -0.8))
    axis.axis("off")
    return figure


def draw_checkpoints(value: Sequence[Mapping[str, Any]]) -> Any:
    """By step: the loss of every token as a heat map, and the greedy answer."""
    names = [one["name"] for one in value[0]["losses"]]
    width = max(5.0, 0.2 * len(names) + 1.5)
    figure, ((heat, said),) = _figure(width + 7, 0.34 * len(value) + 1.7, 1, 2, width_ratios=(width, 7))
    steps = range(len(value))
    if names:
        losses = [[one["loss"] for one in row["losses"]] for row in value]
        shown = heat.imshow(losses, cmap="YlOrRd", vmin=0, vmax=min(LOSS_LIMIT, np.max(losses)), aspect="auto")
        figure.colorbar(shown, ax=heat, label="loss (nats)")
    heat.set_yticks(steps, [f"step {row['step']}" for row in value], fontsize=8)
    heat.set_xticks(range(len(names)), [_label(name) for name in names], rotation=90, fontsize=7)
    for y, row in enumerate(value):
        mean = "" if row["loss"] is None else f"{row['loss']:.2f}  "
        shown_text = row["error"] or row["text"]
        shown_text = printable(shown_text if len(shown_text) <= 92 else shown_text[:91] + "\u2026")
        said.text(0, y, mean + shown_text, va="center", fontsize=7.5, family="DejaVu Sans Mono")
    said.set(xlim=(0, 1), ylim=(len(value) - 0.5, -0.5), xticks=[], yticks=[])
    said.set_title("mean loss, and the greedy answer", fontsize=9, loc="left")
    said.axis("off")
    return figure


def draw_step(value: Mapping[str, Any]) -> Any:
    """The documents with the largest shares of the loss as bars, and the text of the first with its losses."""
    found = value["documents"][:MOST_DOCUMENTS]
    pieces = [_plain(name) for name in found[0]["names"]]
    lines = min(MOST_LINES, _line_count(pieces))
    sizes = (0.24 * len(found) + 1, 0.2 * lines + 0.4)
    figure, ((bars,), (text,)) = _figure(8.4, sum(sizes), 2, height_ratios=sizes)
    bars.barh(range(len(found)), [one["share"] for one in found], color="#f2a1a1")
    for i, one in enumerate(found):  # Not beside the axis, because the text below needs the whole width.
        label = f" row {one['row']}, token {one['start']}, loss {one['loss'] or 0:.2f}"
        bars.text(0, i, label, va="center", fontsize=7)
    same = "equal to" if value["equal"] else "not equal to"
    recorded = value["replayed"][-1]["recorded_loss"]
    title = f"step {value['step']}: loss {value['loss']}, {same} the recorded {recorded}"
    bars.set(ylim=(len(found) - 0.5, -0.5), yticks=[], xlabel="share of the batch's loss")
    bars.set_title(title, fontsize=9)
    _coloured(text, pieces, found[0]["losses"], MOST_LINES)
    text.set_title("the document with the largest share", fontsize=9)
    return figure


PICTURES: Mapping[str, Mapping[str, Callable[[Any], Any]]] = {
    "losses": {"losses": draw_losses},
    "candidates": {"candidates": draw_candidates},
    "attention": {"attention": draw_attention, "arcs": draw_arcs},
    "lens": {"lens": draw_lens},
    "neighbours": {"neighbours": draw_neighbours},
    "map": {"map": draw_map},
    "cache": {"cache": draw_cache},
    "merges": {"merges": draw_merges},
    "checkpoints": {"checkpoints": draw_checkpoints},
    "step": {"step": draw_step},
}
