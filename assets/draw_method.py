"""Draw assets/coconut.png, the figure of the method at the top of README.

Above: one question, where each latent position reads the weighted average of the last three hidden
states in place of a word (docs/specification.md, section 6). Below: the stages that teach it
(docs/specification.md, section 3). The example is from the quickstart. The colours are those of
Okabe and Ito, which colour-blind readers can distinguish, and each is also labelled with text.
Lengths are in inches from the lower left corner.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

INK, NOTE, LINE, PAPER = "#222222", "#5b616b", "#8a8f96", "#ffffff"
FILLS = {
    "question": "#e3e6ea",
    "marker": "#5b616b",
    "thought": "#f0b330",
    "step": "#a6d5f2",
    "answer": "#007a59",
}
WIRE = "#c47f00"
WHITE_TEXT = ("marker", "answer")

QUESTION = ("3", "+", "4", "−", "2", "+", "5", "=")
STEPS = ("7", "5", "0")
ANSWER = ("###", "0")
WRITTEN = {"end": "###", "###": "0"}
WEIGHTS = (0.6, 0.3, 0.1)

WIDTH, HEIGHT = 10.0, 6.5
LEFT = 0.3
READS_Y, MODEL_Y, STATES_Y = 3.12, 3.74, 4.37
FIRST_WIRE_Y, WIRE_SPACING = 4.92, 0.42
BOX_HEIGHT, MODEL_HEIGHT = 0.36, 0.44
STAGES_Y, STAGE_SPACING = 1.82, 0.48


@dataclass(frozen=True)
class Box:
    """A token or thought in the upper half: its text, kind, centre and width."""

    text: str
    kind: str
    x: float
    width: float


def lay_out_sequence() -> list[Box]:
    """The boxes of question, markers, thoughts and answer, from left to right."""
    parts = [(token, "question", 0.34, 0.07) for token in QUESTION]
    parts.append(("start", "marker", 0.62, 0.14))
    parts += [(f"thought {i + 1}", "thought", 0.88, 0.3) for i in range(len(STEPS))]
    parts.append(("end", "marker", 0.54, 0.16))
    parts += [(ANSWER[0], "answer", 0.52, 0.12), (ANSWER[1], "answer", 0.36, 0.12)]
    boxes, right = [], LEFT
    for text, kind, width, gap in parts:
        boxes.append(Box(text, kind, right + gap + width / 2, width))
        right += gap + width
    return boxes


def draw_rounded(axes: Axes, x: float, y: float, width: float, height: float, **style) -> None:
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.06", **style)
    )


def draw_box(axes: Axes, x: float, y: float, width: float, text: str, kind: str) -> None:
    draw_rounded(axes, x, y, width, BOX_HEIGHT, facecolor=FILLS[kind], linewidth=0, zorder=4)
    colour = PAPER if kind in WHITE_TEXT else INK
    write(axes, x, y, text, color=colour, ha="center")


def write(axes: Axes, x: float, y: float, text: str, **style) -> None:
    style = {"fontsize": 11, "color": INK, "va": "center_baseline", "zorder": 6} | style
    axes.text(x, y, text, **style)


def draw_arrow(axes: Axes, start, end, colour=LINE, width=1.1) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0, "zorder": 3}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, linewidth=width, **style))


def draw_model(axes: Axes, boxes: list[Box]) -> None:
    """Draw the tokens, the model, its hidden states and the tokens it writes."""
    left = boxes[0].x - boxes[0].width / 2 - 0.06
    right = boxes[-1].x + boxes[-1].width / 2 + 0.06
    draw_rounded(
        axes,
        (left + right) / 2,
        MODEL_Y,
        right - left,
        MODEL_HEIGHT,
        facecolor="#f4f5f7",
        edgecolor=LINE,
        linewidth=1,
        zorder=2,
    )
    write(axes, left + 1.68, MODEL_Y, "language model", ha="center", fontsize=12)
    for box in boxes:
        draw_box(axes, box.x, READS_Y, box.width, box.text, box.kind)
        draw_arrow(axes, (box.x, READS_Y + BOX_HEIGHT / 2), (box.x, MODEL_Y - MODEL_HEIGHT / 2))
        draw_arrow(axes, (box.x, MODEL_Y + MODEL_HEIGHT / 2), (box.x, STATES_Y - 0.1))
        draw_rounded(
            axes, box.x, STATES_Y, 0.2, 0.2, facecolor=PAPER, edgecolor=INK, linewidth=1.2, zorder=4
        )
        if box.text in WRITTEN and box.kind != "question":
            draw_arrow(axes, (box.x, STATES_Y + 0.1), (box.x, STATES_Y + 0.38))
            write(
                axes, box.x, STATES_Y + 0.5, WRITTEN[box.text], ha="center", color=FILLS["answer"]
            )
    write(axes, left, STATES_Y + 0.3, "hidden states", color=NOTE)
    end = next(box for box in boxes if box.text == "end")
    write(axes, end.x - 0.25, STATES_Y + 0.86, "what it writes", color=NOTE)


def draw_thoughts(axes: Axes, boxes: list[Box]) -> None:
    """Draw a line for each thought, from the last three hidden states to the thought."""
    columns = [column for column, box in enumerate(boxes) if box.kind == "thought"]
    for number, column in enumerate(columns):
        box, y = boxes[column], FIRST_WIRE_Y + number * WIRE_SPACING
        left = box.x - box.width / 2
        down = left - 0.19
        taps = [boxes[column - distance].x for distance in range(1, len(WEIGHTS) + 1)]
        axes.plot(
            [taps[-1], down - 0.1, down, down, left - 0.06],
            [y, y, y - 0.1, READS_Y, READS_Y],
            color=WIRE,
            linewidth=1.8,
            solid_joinstyle="round",
            zorder=3,
        )
        draw_arrow(axes, (left - 0.1, READS_Y), (left, READS_Y), colour=WIRE, width=1.8)
        for x, weight in zip(taps, WEIGHTS, strict=True):
            axes.plot([x, x], [STATES_Y + 0.1, y], color=WIRE, linewidth=1.2, zorder=2)
            share = weight / WEIGHTS[0]
            tint = [1 + share * (c - 1) for c in to_rgb(FILLS["thought"])]
            style = {"facecolor": tint, "edgecolor": WIRE, "linewidth": 1.2, "zorder": 5}
            axes.add_patch(Circle((x, y), 0.165, **style))
            write(axes, x, y, f".{round(10 * weight)}", ha="center", fontsize=10)


def draw_stages(axes: Axes, right: float) -> None:
    """Draw a row for each stage: the written steps, and thoughts in place of the others."""
    names = ("all steps written", "one thought", "two thoughts", "no text left")
    for stage, name in enumerate(names):
        y = STAGES_Y - stage * STAGE_SPACING
        write(axes, LEFT + 0.07, y, f"stage {stage}", fontweight="bold")
        write(axes, LEFT + 0.82, y, name, color=NOTE)
        x = LEFT + 2.5
        parts = [("3 + 4 − 2 + 5 =", "question", 1.5), ("start", "marker", 0.62)]
        parts += [(f"thought {i + 1}", "thought", 0.88) for i in range(stage)]
        parts.append(("end", "marker", 0.54))
        parts += [(step, "step", 0.36) for step in STEPS[stage:]]
        parts += [(ANSWER[0], "answer", 0.52), (ANSWER[1], "answer", 0.36)]
        for text, kind, width in parts:
            draw_box(axes, x + width / 2, y, width, text, kind)
            x += width + 0.08


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent / "coconut.png"
    parser.add_argument("--out", type=Path, default=default, help=f"file (default: {default})")
    out = parser.parse_args(argv).out
    figure = plt.figure(figsize=(WIDTH, HEIGHT), dpi=160, facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    boxes = lay_out_sequence()
    draw_model(axes, boxes)
    draw_thoughts(axes, boxes)
    draw_stages(axes, boxes[-1].x)
    title = {"fontsize": 13, "fontweight": "bold"}
    left = LEFT + 0.07
    write(axes, left, 6.23, "A thought is the weighted average", **title)
    write(axes, left, 5.97, "of the last hidden states, and is", **title)
    write(axes, left, 5.71, "read in place of a word", **title)
    write(axes, left, STAGES_Y + 0.5, "Stage by stage, thoughts replace the written steps", **title)
    write(axes, 9.7, STAGES_Y + 0.5, "on a ten-hour clock 5 + 5 = 0", color=NOTE, ha="right")
    figure.savefig(out, metadata={"Software": None})
    print(out)


if __name__ == "__main__":
    main()
