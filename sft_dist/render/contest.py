"""Several models on the same held-out prompts: rewards, distances from the first model, and samples side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sft_dist.render.comparison import Measure
from sft_dist.render.contest_page import contest_page
from sft_dist.render.text import prose, reveal, tolerate_encoding
from sft_dist.render.wording import count, number, share

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_WIDEST = 160
_CHARACTERS = 240  # of an answer in the terminal


@dataclass(frozen=True)
class Sample:
    """A model's response to a prompt.

    `tokens` count the one that ended it, where one did (`ended`). `kl`: in nats, from the first model, summed over the
    response; None of the first model itself.
    """

    text: str
    reward: float
    tokens: int
    ended: bool
    kl: float | None


@dataclass(frozen=True)
class Contender:
    """A model, by its name and path, with its responses in the order of the prompts."""

    name: str
    path: str
    measure: Measure
    samples: tuple[Sample, ...]

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(sample.reward for sample in self.samples)

    @property
    def mean_tokens(self) -> float:
        return float(np.mean([sample.tokens for sample in self.samples]))

    @property
    def ended(self) -> int:
        return sum(sample.ended for sample in self.samples)

    @property
    def mean_kl(self) -> float | None:
        found = [sample.kl for sample in self.samples if sample.kl is not None]
        return float(np.mean(found)) if found else None


@dataclass(frozen=True)
class Asked:
    """A held-out prompt as (role, content) turns, the data's own answer, and the reward of that."""

    prompt: tuple[tuple[str, str], ...]
    reference: str
    reward: float


@dataclass(frozen=True)
class Contest:
    """What the models came to. The first of the contenders is what the others are measured against."""

    reward_model: str
    dataset: str
    temperature: float
    max_new_tokens: int
    asked: tuple[Asked, ...]
    contenders: tuple[Contender, ...]
    facts: tuple[tuple[str, str], ...] = ()

    @property
    def reference_rewards(self) -> tuple[float, ...]:
        return tuple(one.reward for one in self.asked)


@dataclass(frozen=True)
class Line:
    """A row of the table, in words. Empty where there is nothing to say."""

    name: str
    reward: str
    change: str
    better: bool | None
    """Whether the change is for the better; None where it is within two standard errors, or there is none."""
    wins: str
    kl: str
    tokens: str
    ended: str
    perplexity: str


HEADINGS = ("", "reward", "change", "wins", "KL", "tokens", "ended", "perplexity")


def lines(contest: Contest) -> list[Line]:
    """The table: a row a model, and one of the data's own answers."""
    first = contest.contenders[0]
    found = []
    for contender in contest.contenders:
        change, better, wins = ("", None, "") if contender is first else _against(contender.rewards, first.rewards)
        kl = contender.mean_kl
        found.append(
            Line(contender.name, with_error(contender.rewards), change, better, wins,
                 "" if kl is None else number(kl), number(contender.mean_tokens, 0),
                 share(contender.ended, len(contender.samples)), number(contender.measure.perplexity))
        )  # fmt: skip
    change, better, wins = _against(contest.reference_rewards, first.rewards)
    return [*found, Line("the data's answers", with_error(contest.reference_rewards), change, better, wins,
                         "", "", "", "")]  # fmt: skip


def with_error(values: tuple[float, ...], sign: str = "") -> str:
    """A mean and its standard error, `0.83 ± 0.12`."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:{sign}.2f}"
    return f"{mean:{sign}.2f} ± {standard_error(values):.2f}"


def standard_error(values: tuple[float, ...]) -> float:
    """Of the mean of independent values."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def about(contest: Contest) -> str:
    """What the columns are, in sentences."""
    drawn = f"at temperature {contest.temperature:g}" if contest.temperature else "greedily"
    first = contest.contenders[0].name
    measure = contest.contenders[0].measure
    return (
        f"Means over {count(len(contest.asked), 'held-out prompt')}, each answered {drawn} with at most "
        f"{contest.max_new_tokens} tokens, ± one standard error. change, wins: reward against {first} on the same "
        f"prompts, and the share of them with a higher one. KL: from {first}, in nats per response. ended: responses "
        f"that came to an end by themselves. perplexity: of {count(measure.tokens, 'token')} of the data's own answers."
    )


def to_html(contest: Contest) -> str:
    """The contest as a page, with every response whole."""
    return contest_page(contest, lines(contest), about(contest))


def to_terminal(contest: Contest, console: Console, prompts: int = 2) -> None:
    """Print the table, the first `prompts` prompts with their responses shortened, and the facts."""
    from rich.text import Text

    tolerate_encoding(console)
    console.print()
    console.print(Text(reveal(f"rewards by {contest.reward_model} on {contest.dataset}"), "bold"))
    console.print(_table(contest))
    console.print(Text(about(contest), "dim"))
    for at, one in enumerate(contest.asked[:prompts]):
        console.print()
        console.print(Text(reveal(f"Prompt {at + 1} of {len(contest.asked)}"), "bold"))
        console.print(Text(prose(one.prompt[-1][1])))
        console.print(_responses(contest, at, min(console.width, _WIDEST)))
    if contest.facts:
        console.print()
        width = max(len(name) for name, _ in contest.facts)
        for name, value in contest.facts:
            console.print(Text.assemble((f"{reveal(name):<{width}}  ", "dim"), reveal(value)), soft_wrap=True)


def _against(rewards: tuple[float, ...], first: tuple[float, ...]) -> tuple[str, bool | None, str]:
    """The mean difference on the same prompts, what it says, and the share of prompts with a higher reward."""
    differences = tuple(a - b for a, b in zip(rewards, first, strict=True))
    mean, error = float(np.mean(differences)), standard_error(differences)
    # Within two standard errors it may be chance.
    better = None if not abs(mean) > 2 * error else mean > 0
    return with_error(differences, "+"), better, share(sum(d > 0 for d in differences), len(differences))


def _table(contest: Contest) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.ROUNDED, header_style="bold")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left")
    style = {True: "green", False: "red", None: ""}
    for line in lines(contest):
        table.add_row(Text(reveal(line.name), "bold"), line.reward, Text(line.change, style[line.better]), line.wins,
                      line.kl, line.tokens, line.ended, line.perplexity)  # fmt: skip
    return table


def _responses(contest: Contest, at: int, width: int) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.ROUNDED, width=width, show_header=False, show_lines=True)
    table.add_column("name", no_wrap=True)
    table.add_column("reward", justify="right", no_wrap=True)
    table.add_column("response", ratio=1, overflow="fold")

    def shortened(text: str) -> Text:
        text = prose(text)
        cut = len(text) > _CHARACTERS
        return Text(text[:_CHARACTERS] + ("…" if cut else "")) if text else Text("(empty)", "dim italic")

    for contender in contest.contenders:
        sample = contender.samples[at]
        table.add_row(Text(reveal(contender.name), "bold"), f"{sample.reward:.2f}", shortened(sample.text))
    one = contest.asked[at]
    table.add_row(Text("data", "dim"), f"{one.reward:.2f}", shortened(one.reference))
    return table
