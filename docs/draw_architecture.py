"""Draw architecture.png, the data flow and the model: python docs/draw_architecture.py"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, BLUE, GREEN, SAND = "#22272e", "#dbe7f5", "#dcefe2", "#f6ecd9"


def box(axes: Axes, x: float, y: float, text: str, color: str, width: float = 1.5, height: float = 0.8) -> None:
    shape = FancyBboxPatch((x - width / 2, y - height / 2), width, height, "round,pad=0.02", fc=color, ec=INK, lw=1)
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, lw=1.1, color=INK, connectionstyle=style)
    )


def draw_data_flow(axes: Axes) -> None:
    axes.set(xlim=(0, 14), ylim=(0, 2.1))
    axes.axis("off")
    stages = [
        ("images", "any source", BLUE),
        ("latents", "VAE, Arrow cache", BLUE),
        ("batches", "a pure function\nof seed and step", BLUE),
        ("objective", "noise, target,\nloss", GREEN),
        ("checkpoint", "atomic,\nexact resume", GREEN),
        ("pipeline", "sample, share", SAND),
        ("Hub", "from_pretrained", SAND),
    ]
    for i, (name, note, color) in enumerate(stages):
        x = 1 + 2 * i
        box(axes, x, 1.4, name, color)
        axes.text(x, 0.85, note, ha="center", va="top", fontsize=7.5, color=INK)
        if i:
            arrow(axes, (x - 1.2, 1.4), (x - 0.78, 1.4))


def draw_transformer(axes: Axes) -> None:
    axes.set(xlim=(0, 14), ylim=(-0.15, 6.3))
    axes.axis("off")
    # Left: the whole model.
    axes.text(3.6, 6.1, "LatentDiTTransformer2DModel", ha="center", fontsize=10, weight="bold", color=INK)
    box(axes, 1.9, 0.5, "noisy latents\n[4, 32, 32]", BLUE, 2.2)
    box(axes, 1.9, 1.8, "patches 2 x 2\n+ sin-cos positions", BLUE, 2.2)
    box(axes, 1.9, 3.3, "DiT block  x 10", GREEN, 2.2, 1.0)
    box(axes, 1.9, 4.7, "norm, linear,\nunpatchify", SAND, 2.2)
    box(axes, 1.9, 5.7, "prediction [4, 32, 32]", SAND, 2.2, 0.5)
    for low, high in ((0.92, 1.38), (2.22, 2.78), (3.82, 4.28), (5.12, 5.43)):
        arrow(axes, (1.9, low), (1.9, high))
    box(axes, 5.2, 0.5, "timestep t", BLUE, 2.0)
    box(axes, 5.2, 1.8, "conditions\nSmiling, Eyeglasses, ...", BLUE, 2.4)
    box(axes, 5.2, 3.3, "embeddings,\nsummed", SAND, 2.0)
    arrow(axes, (5.2, 2.22), (5.2, 2.88))
    arrow(axes, (6.22, 0.5), (6.22, 3.1), 0.35)
    arrow(axes, (4.18, 3.3), (3.04, 3.3))
    arrow(axes, (4.4, 3.72), (3.04, 4.7), 0.15)
    # Right: one block.
    axes.text(10.9, 6.1, "the block (adaLN-Zero)", ha="center", fontsize=10, weight="bold", color=INK)
    steps = [
        (0.55, "LayerNorm"),
        (1.35, "scale, shift"),
        (2.15, "self-attention, rotary"),
        (2.95, "gate, add"),
        (3.75, "LayerNorm, scale, shift"),
        (4.55, "feed-forward"),
        (5.35, "gate, add"),
    ]
    for i, (y, name) in enumerate(steps):
        color = GREEN if "attention" in name or "forward" in name else SAND
        box(axes, 10.0, y, name, color, 2.6, 0.5)
        if i:
            arrow(axes, (10.0, steps[i - 1][0] + 0.27), (10.0, y - 0.27))
    arrow(axes, (10.0, -0.1), (10.0, 0.28))
    for begin, end, x in ((0.02, 2.95, 10.0), (3.1, 5.35, 8.68)):  # past attention, and past the feed-forward layer
        axes.plot([x, 8.3, 8.3], [begin, begin, end], lw=1.1, color=INK)
        arrow(axes, (8.3, end), (8.68, end))
    box(axes, 13.0, 2.95, "SiLU, linear\n(starts at zero)", BLUE, 1.7)
    for y in (1.35, 2.95, 3.75, 5.35):
        arrow(axes, (12.13, 2.95), (11.32, y))


def main() -> None:
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[1, 3])
    draw_data_flow(top)
    draw_transformer(bottom)
    figure.savefig(Path(__file__).parent / "architecture.png", dpi=110)


if __name__ == "__main__":
    main()
