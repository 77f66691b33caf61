"""Which stage needs which, told by the references in the file, and the order that follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from launch.pipeline.references import FORMS, Reference, in_text, texts
from launch.pipeline.spec import EVAL, Written
from sft_dist.recipe_names import near_name
from sft_dist.recipe_yaml import COMMAND_LINE, Fault


@dataclass(frozen=True)
class Link:
    """One reference of a stage: the key it stands in, and where that is."""

    reference: Reference
    key: str
    place: int


def links(written: Written) -> tuple[dict[str, list[Link]], list[Fault]]:
    """The references of each stage, and the faults: what is no reference, no stage, or has no output."""
    found: dict[str, list[Link]] = {name: [] for name in written.spec.stages}
    faults: list[Fault] = []
    for name in written.spec.stages:
        for text, key, place in _texts(written, name):
            references, wrong = in_text(text)
            faults += [Fault(place, key, words) for words in wrong]
            for reference in references:
                fault = _fault(written, name, reference)
                if fault:
                    faults.append(Fault(place, key, fault))
                else:
                    found[name].append(Link(reference, key, place))
        faults += _model_faults(written, name)
    return found, faults


def needs(links_of: Mapping[str, Sequence[Link]]) -> dict[str, tuple[str, ...]]:
    """The stages that each stage takes something from, without repetition."""
    return {name: tuple(dict.fromkeys(link.reference.stage for link in every)) for name, every in links_of.items()}


def ordered(links_of: Mapping[str, Sequence[Link]]) -> tuple[list[str], list[Fault]]:
    """The stages such that each comes behind what it needs, else as in the file; and the cycles, told by their path."""
    need = needs(links_of)
    order: list[str] = []
    while len(order) < len(need):
        free = [name for name in need if name not in order and set(need[name]) <= set(order)]
        if not free:
            path = _cycle({name: [n for n in need[name] if n not in order] for name in need if name not in order})
            link = next(link for link in links_of[path[0]] if link.reference.stage == path[1])
            return order, [Fault(link.place, link.key, f"the stages need one another: {' -> '.join(path)}; break it")]
        order.append(free[0])
    return order, []


def _cycle(need: Mapping[str, Sequence[str]]) -> list[str]:
    """A way from a stage back to itself, where every stage needs another."""
    path = [next(iter(need))]
    while path[-1] not in path[:-1]:
        path.append(need[path[-1]][0])
    return path[path.index(path[-1]) :]


def _texts(written: Written, name: str) -> Iterator[tuple[str, str, int]]:
    """All texts of a stage that may hold references, with key and place."""
    for key in ("model", "set"):
        for text in texts(written.node(name, key)):
            yield text.text, f"stages.{name}.{key}", text.place
    for word in written.overrides.get(name, ()):
        yield word.partition("=")[2], f"{name}.{word.partition('=')[0]}", COMMAND_LINE


def _fault(written: Written, name: str, reference: Reference) -> str | None:
    stages = written.spec.stages
    if reference.stage not in stages:
        near = near_name(reference.stage, list(stages))
        return f"{reference}: no such stage, " + (
            f"did you mean {near}" if near else f"the pipeline has {', '.join(stages)}"
        )
    if reference.stage == name:
        return f"{reference}: the stage refers to itself; name another one"
    if reference.what == "output" and stages[reference.stage].kind == EVAL:
        return f"{reference}: an evaluation makes no model; its folder is ${{stages.{reference.stage}.run}}"
    return None


def _model_faults(written: Written, name: str) -> Iterator[Fault]:
    """A model is one reference as a whole, to an output, or none."""
    model = written.spec.stages[name].model
    for reference in in_text(model)[0] if model else ():
        place, key = written.place(name, "model"), f"stages.{name}.model"
        if reference.what == "run":
            yield Fault(place, key, f"{reference} is a run's folder; its model is ${{stages.{reference.stage}.output}}")
        elif model != str(reference):
            yield Fault(place, key, f"{model} is more than a reference; write {FORMS.split(' or ')[0]} alone")
