"""`python -m sft_dist.chat MODEL_DIR`: talk to a model in the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from sft_dist import builtin_models
from sft_dist.config import DataSection, EvalSection, ModelSection
from sft_dist.data.formats import Turn
from sft_dist.process import guarded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sft_dist.data.template import ChatTemplate

_HELP = "an empty line or Ctrl-D ends, /new begins a new conversation"


def main(words: list[str]) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sft_dist.chat")
    parser.add_argument("model")
    parser.add_argument("--system", default=None)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args(words)

    def work() -> None:
        settings = EvalSection(max_new_tokens=options.max_new_tokens, temperature=options.temperature)
        model, template = load(options.model)
        talk(model, template, settings, options.system)

    return guarded(work)


def load(name: str) -> tuple[PreTrainedModel, ChatTemplate]:
    """Model and template of a model directory, hub id or built-in name."""
    import torch

    from sft_dist.data.template import load_template
    from sft_dist.data.tokenizer import load_tokenizer
    from sft_dist.models import load_model

    path = builtin_models.resolve(name)
    section = ModelSection(model_name_or_path=path)
    tokenizer = load_tokenizer(path, section)
    model = load_model(path, section, tokenizer)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, load_template(tokenizer, DataSection(dataset_name="none"))


def talk(model: PreTrainedModel, template: ChatTemplate, settings: EvalSection, system: str | None) -> None:
    """Read questions from standard input and answer each with the whole conversation in view."""
    from transformers import TextStreamer

    from sft_dist.evaluation.generation import answer
    from sft_dist.modelinfo import max_positions

    opening = [Turn("system", system)] if system else []
    turns = list(opening)
    limit = max_positions(model.config.to_dict()) or 1 << 20
    print(_HELP)
    while question := _ask():
        if question == "/new":
            turns = list(opening)
            continue
        turns.append(Turn("user", question))
        print("\nmodel> ", end="", flush=True)
        streamer = TextStreamer(template.tokenizer, skip_prompt=True, skip_special_tokens=True)
        (text,) = answer(model, template, [tuple(turns)], settings, limit, streamer)
        turns.append(Turn("assistant", text))
        print()


def _ask() -> str:
    try:
        return input("you> ").strip()
    except EOFError:
        print()
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
