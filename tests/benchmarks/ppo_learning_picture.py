"""The picture of what PPO learns: reward, KL, length and entropy over rollouts, as an SVG file of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sft_dist.render.axis import Axis
from sft_dist.render.page import escape

# The numbers of each rollout, of each seed, by task and model.
Curves = Mapping[tuple[str, str], Sequence[Sequence[Mapping[str, float]]]]

_WIDTH, _HEIGHT = 760, 646
_PANELS = (
    ("objective/scores", "reward, of 1 at most"),
    ("objective/kl", "KL to the reference, nats a response"),
    ("completions/mean_length", "length, tokens"),
    ("objective/entropy", "entropy, nats a token"),
)
_WIDE, _HIGH = 300, 190
_LEFTS, _TOPS = (56, 434), (134, 398)
_DASHES = {"llama": "", "opt": ' stroke-dasharray="5 4"'}
# Plain colours and a background of its own: programs that show pictures know no variables, and pages have any colour.
_STYLE = """
  text { font: 13px system-ui, "Liberation Sans", "DejaVu Sans", sans-serif; fill: #1c1e21; }
  .paper { fill: #fbfbf9; } .title { font-size: 17px; font-weight: 650; } .name { font-weight: 650; }
  .soft { fill: #5b626b; } .line { stroke: #dfe1e4; } .floor { stroke: #5b626b; }
  .goal { stroke: #5b626b; stroke-dasharray: 2 3; }
  polyline, .key { fill: none; stroke-width: 2; stroke-linejoin: round; } polygon { opacity: .14; }
  .one { stroke: #2a62c4; } .two { stroke: #b4530a; } .three { stroke: #14692f; }
  .one-area { fill: #2a62c4; } .two-area { fill: #b4530a; } .three-area { fill: #14692f; }
  .model { stroke: #5b626b; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6e7e9; } .paper { fill: #16181b; } .soft { fill: #a0a7b0; } .line { stroke: #363b42; }
    .floor, .goal, .model { stroke: #a0a7b0; } polygon { opacity: .2; }
    .one { stroke: #7ba9f5; } .two { stroke: #f0a35e; } .three { stroke: #6fd08c; }
    .one-area { fill: #7ba9f5; } .two-area { fill: #f0a35e; } .three-area { fill: #6fd08c; }
  }
"""
_COLOURS = ("one", "two", "three")


def learning_svg(curves: Curves, title: str, about: str, goal: float) -> str:
    """The picture: the mean over the seeds as a line, between the least and the most. `goal`: the reward to reach."""
    tasks = list(dict.fromkeys(task for task, _ in curves))
    colours = dict(zip(tasks, _COLOURS, strict=False))
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(_caption(curves))}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{_WIDTH}" height="{_HEIGHT}"/>',
        f'<text class="title" x="{_LEFTS[0]}" y="32">{escape(title)}</text>',
        f'<text class="soft" x="{_LEFTS[0]}" y="54">{escape(about)}</text>',
        *_legend(colours, list(dict.fromkeys(model for _, model in curves))),
    ]
    for number, (name, heading) in enumerate(_PANELS):
        row, column = divmod(number, 2)
        parts += _panel(curves, colours, name, heading, _LEFTS[column], _TOPS[row], goal if number == 0 else None)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(colours: Mapping[str, str], models: Sequence[str]) -> Iterator[str]:
    left, y = _LEFTS[0], 84
    for task, colour in colours.items():
        yield f'<line class="key {colour}" x1="{left}" x2="{left + 22}" y1="{y - 4}" y2="{y - 4}"/>'
        yield f'<text x="{left + 28}" y="{y}">{escape(task)}</text>'
        left += 62 + 7 * len(task)
    left += 30
    for model in models:
        yield f'<line class="key model"{_DASHES[model]} x1="{left}" x2="{left + 30}" y1="{y - 4}" y2="{y - 4}"/>'
        yield f'<text x="{left + 36}" y="{y}">{escape(model)}</text>'
        left += 70 + 7 * len(model)


def _panel(
    curves: Curves, colours: Mapping[str, str], name: str, heading: str, left: int, top: int, goal: float | None
) -> Iterator[str]:
    floor, right = top + _HIGH, left + _WIDE
    every = [one[name] for seeds in curves.values() for seed in seeds for one in seed]
    x = Axis.over(0, max(len(seed) for seeds in curves.values() for seed in seeds), left, right, 5, whole=True)
    y = Axis.over(min(0.0, *every), max(every), floor, top, 4, rounded=True)
    yield f'<text class="name" x="{left}" y="{top - 12}">{escape(heading)}</text>'
    for tick in y.ticks:
        yield f'<line class="line" x1="{left}" x2="{right}" y1="{y.at(tick):.1f}" y2="{y.at(tick):.1f}"/>'
        yield f'<text class="soft" x="{left - 8}" y="{y.at(tick) + 4:.1f}" text-anchor="end">{y.label(tick)}</text>'
    for tick in x.ticks:
        place = f'x="{x.at(tick):.1f}" y="{floor + 20}"'
        yield f'<text class="soft" {place} text-anchor="middle">{x.label(tick)}</text>'
    yield f'<line class="floor" x1="{left}" x2="{right}" y1="{floor}" y2="{floor}"/>'
    yield f'<text class="soft" x="{(left + right) / 2}" y="{floor + 40}" text-anchor="middle">rollout</text>'
    if goal is not None:
        yield f'<line class="goal" x1="{left}" x2="{right}" y1="{y.at(goal):.1f}" y2="{y.at(goal):.1f}"/>'
    for (task, model), seeds in curves.items():
        yield from _curve([[one[name] for one in seed] for seed in seeds], x, y, colours[task], _DASHES[model])


def _curve(seeds: Sequence[Sequence[float]], x: Axis, y: Axis, colour: str, dash: str) -> Iterator[str]:
    columns = list(zip(*seeds, strict=True))
    edges = [(place, max(column)) for place, column in enumerate(columns)]
    edges += [(place, min(column)) for place, column in reversed(list(enumerate(columns)))]
    mean = [(place, sum(column) / len(column)) for place, column in enumerate(columns)]
    around, along = (" ".join(f"{x.at(p):.1f},{y.at(v):.1f}" for p, v in points) for points in (edges, mean))
    yield f'<polygon class="{colour}-area" points="{around}"/>'
    yield f'<polyline class="{colour}"{dash} points="{along}"/>'


def _caption(curves: Curves) -> str:
    told = []
    for (task, model), seeds in curves.items():
        first, last = (sum(seed[place]["objective/scores"] for seed in seeds) / len(seeds) for place in (0, -1))
        told.append(f"{model}, {task}: reward from {first:.2f} to {last:.2f}")
    return "Learning curves: " + "; ".join(told)
