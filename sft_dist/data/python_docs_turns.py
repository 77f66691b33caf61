"""Questions as people ask them, and their answers, from documentation entries.

Every answer is the documentation's own text, or states what the source says (names, defaults, members).
The phrasing is chosen by a hash of the entry's name, so it varies and is always the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from sft_dist.data import python_docs_text as text
from sft_dist.data.python_docs_entries import Entry, Parameter

LIMIT = 1500
_DESCRIBE = {
    "function": (
        *("What does {x} do?", "What does {x} do in Python?", "Explain {x}.", "Can you explain what {x} does?"),
        *("What is {x} for?", "Describe {x} in Python.", "I came across {x} in some code. What does it do?"),
        *("Tell me about the `{name}` function in the `{module}` module.", "Python: what is {x} used for?"),
        *("In Python, what does `{name}` from the `{module}` module do?", "When would I use {x}?"),
    ),
    "method": (
        *("What does {x} do?", "What does the `{name}` method of `{owner}` do?", "Explain {x}."),
        *("What happens when I call `{name}` on an object of type `{owner}`?", "Can you explain {x} to me?"),
        *("I have an instance of `{owner}`. What does its `{name}` method do?", "What is {x} used for?"),
        *("Tell me about the method `{name}` of `{owner}`.", "In Python, what does {x} do?"),
    ),
    "property": (
        *("What is {x}?", "What does the attribute {x} hold?", "What does the `{name}` property of `{owner}` tell me?"),
        *("I have an instance of `{owner}`. What is its `{name}` attribute?", "Explain the attribute {x}."),
    ),
    "class": (
        *("What is {x}?", "What is the class {x} for?", "Explain the `{name}` class of the `{module}` module."),
        *("What is {x} used for in Python?", "Tell me about {x}.", "When would I use {x}?", "Describe the class {x}."),
        *("Can you explain what {x} is?", "What does the `{name}` class in `{module}` represent?"),
    ),
    "module": (
        *("What is the {x} module for?", "What does Python's {x} module do?", "Tell me about the {x} module."),
        *("What can I do with the {x} module?", "Give me an overview of {x}.", "When should I use the {x} module?"),
        *("What is {x} in the Python standard library?", "Explain the {x} module of the standard library."),
    ),
    "topic": (
        *("Explain {x} in Python.", "How does Python define {x}?", "What should I know about {x} in Python?"),
        *("What does the Python reference say about {x}?", "Can you explain {x} in Python?"),
        *("Python language question: {x}. How does that work?", "Tell me about {x} in Python."),
    ),
}
_USAGE = (
    *("How do I use {x}?", "How do I call {x}?", "What is the signature of {x}, and what does it do?"),
    *("Show me how {x} is called and what it does.", "What is the syntax of {x}?", "How is {x} used?"),
    *("I want to use {x}. How do I call it?", "Give me the signature and a description of {x}."),
)
_FIND = (
    *("I want to {task}. Which function of the `{module}` module does that?", "How can I {task} in Python?"),
    *("Which function in `{module}` should I use to {task}?", "How do I {task} with the `{module}` module?"),
    *("Is there something in Python's `{module}` module to {task}?", "What do I call to {task} in Python?"),
)
_ARGUMENTS = (
    *("What arguments does {x} take?", "Which parameters does {x} accept?", "What are the arguments of {x}?"),
    *("Which arguments of {x} are required and which are optional?", "What can I pass to {x}?"),
)
_THEN_ARGUMENTS = (
    *("What arguments does it take?", "Which parameters does it accept?", "And what do I pass to it?"),
    *("Which of its arguments are optional?", "What is its signature?", "How do I call it?"),
)
_THEN_MORE = (
    *("Can you tell me more?", "What else should I know about it?", "Are there details I should know?"),
    *("Please go into more detail.", "Anything else to keep in mind?", "Could you elaborate?", "How exactly?"),
)
_THEN_EXAMPLE = (
    *("Can you show me an example?", "Do you have an example?", "Show me how that looks in code."),
    *("What does that look like in practice?", "Give me an example, please."),
)
_THEN_MEMBERS = {
    "class": (
        *("Which methods does it have?", "What are its methods?", "What can I do with such an object?"),
        *("Which methods and attributes are documented?", "Give me an overview of its methods."),
    ),
    "module": (
        *("Which functions and classes does it have?", "What does it contain?", "What are its main parts?"),
        *("Which names does it offer?", "What is in it?"),
    ),
}
_MEMBERS = {
    "class": ("Which methods does {x} have?", "List the methods of {x}.", "What methods can I call on {x}?"),
    "module": (
        *("Which functions and classes does the {x} module have?", "What does the {x} module contain?"),
        *("List what the {x} module offers.", "What is in the {x} module?"),
    ),
}
_THEN_MEMBER = (
    *("What does `{name}` do?", "And what does `{name}` do?", "Tell me more about `{name}`.", "Explain `{name}`."),
    *("How does `{name}` work?", "What about `{name}`?"),
)
_VERBS_WORDS = """
add append apply ask assert attach build calculate call cancel change check clear close compare compile compute
concatenate configure connect construct convert copy count create decode decorate delete deliver detach determine
disable discard dispatch divide download emit enable encode end ensure enter escape evaluate execute expand extend
extract fetch fill find finish fix flush forget format generate get handle indicate initialize insert install
invoke iterate join jump kill list load log look make mark match merge modify move normalize notify obtain open
parse pass perform pickle pop prepare print process produce push put quote raise read receive record recompute
reduce refresh register release reload remove rename render replace report request reset resolve restore resume
retrieve return reverse rotate round run save scan schedule seek select send serialize set shift show shut sleep
sort split start stop store strip substitute subtract suspend switch terminate test tokenize transform translate
truncate turn undo unlink unlock unpack unregister update use validate verify visit wait walk wrap write
"""
_VERBS = frozenset(_VERBS_WORDS.split())
_FINITE = re.compile(
    r"\b(?:is|are|was|were|can|has|have|will|must|may|should|does|provides?|returns?|yields?|contains?|represents?|"
    r"allows?|implements?|holds?|gives?|takes?|supports?|adds?|uses?|defines?|describes?|makes?|means?|creates?|"
    r"simulates?|consists?|occurs?|required|had|acts?|performs?|handles?|serves?)\b"
)
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def draw(entry: Entry, purpose: str, count: int) -> int:
    """A number below `count` that depends on the entry's name and on what it is drawn for, and on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{purpose}\0{entry.qualname}".encode()).digest()[:6]) % count


def _phrase(entry: Entry, purpose: str, choices: Sequence[str], **words: str) -> str:
    choice = choices[draw(entry, purpose, len(choices))]
    call = "()" if entry.kind in ("function", "method") and draw(entry, "call", 2) else ""
    shown = entry.qualname if entry.kind == "topic" or not draw(entry, "quote", 4) else f"`{entry.qualname}{call}`"
    if entry.kind == "topic":
        shown = re.sub(r"^The (?=[`a-z])", "the ", shown)
    return choice.format(x=shown, name=entry.name, owner=entry.owner, module=entry.module, **words)


def ask(entry: Entry) -> str:
    """A question for what an entry is or does."""
    choices = _DESCRIBE[entry.kind]
    if entry.module == "builtins":
        choices = tuple(c for c in choices if "{module}" not in c)
    return _phrase(entry, "describe", choices)


def ask_usage(entry: Entry) -> str:
    """A question for how a function is called."""
    return _phrase(entry, "usage", _USAGE)


def ask_finding(entry: Entry) -> str:
    """A question that names the task, for which the entry is the answer. Only where :func:`task` is not empty."""
    choices = [c for c in _FIND if "{module}" in c or entry.module == "builtins"]
    if entry.module == "builtins":
        choices = [c for c in _FIND if "{module}" not in c]
    return _phrase(entry, "find", choices, task=task(entry))


def ask_arguments(entry: Entry, then: bool = False) -> str:
    """A question for the parameters, on its own or as a follow-up."""
    return _phrase(entry, "arguments", _THEN_ARGUMENTS if then else _ARGUMENTS)


def ask_more(entry: Entry, turn: int = 0) -> str:
    """A follow-up that asks for the rest; no two of one conversation are the same."""
    return _THEN_MORE[(draw(entry, "more", len(_THEN_MORE)) + turn) % len(_THEN_MORE)]


def ask_example(entry: Entry) -> str:
    """A follow-up that asks for code."""
    return _phrase(entry, "example", _THEN_EXAMPLE)


def ask_members(entry: Entry, then: bool = False) -> str:
    """A question for the contents of a module or class."""
    return _phrase(entry, "members", (_THEN_MEMBERS if then else _MEMBERS)[entry.kind])


def ask_member(member: Entry) -> str:
    """A follow-up for one of the members that were just named."""
    return _phrase(member, "member", _THEN_MEMBER)


def task(entry: Entry) -> str:
    """What a function is for, as the end of `I want to ...`; empty where the text does not say it that way."""
    sentence = text.first_sentence(entry.summary)
    verb, _, rest = sentence.partition(" ")
    vague = re.search(r"\b(?:this|self|it|that|these|the given|see)\b|[:;(]", rest, re.I)
    if entry.kind != "function" or verb.lower() not in _VERBS or vague or not 25 <= len(sentence) <= 110:
        return ""
    if verb.lower() in ("return", "raise", "handle", "set", "test", "look") or rest.startswith(("of ", "for ")):
        return f"get {rest.rstrip('.')}" if verb == "Return" and rest.startswith(("the ", "a ", "an ")) else ""
    return f"{verb.lower()} {rest.rstrip('.')}"


def describe(entry: Entry, limit: int = LIMIT) -> str:
    """What an entry is or does: its text, its first sentence with the name as the subject where that reads well."""
    parts = text.cut(text.split_blocks(entry.body), limit - len(entry.qualname) - 4)
    return "\n\n".join([_with_subject(entry, parts[0]), *parts[1:]])


def usage(entry: Entry) -> str:
    """The call's signature as code, then the text."""
    return f"{_call(entry)}\n\n" + "\n\n".join(text.cut(text.split_blocks(entry.body), LIMIT))


def finding(entry: Entry) -> str:
    """The function to use, its signature, and the text."""
    return f"Use `{entry.qualname}`:\n\n{usage(entry)}"


def opening(entry: Entry) -> str:
    """The summary alone, for a conversation that goes on to the details."""
    return _with_subject(entry, entry.summary)


def details(entry: Entry, limit: int = LIMIT) -> list[str]:
    """The blocks after the summary, in answers of at most `limit` characters."""
    answers: list[str] = []
    rest = text.split_blocks(entry.body)[1:]
    while rest:
        taken = text.cut(rest, limit)
        answers.append("\n\n".join(taken))
        rest = rest[len(taken) :]
    return answers


def without_examples(entry: Entry) -> str:
    """The text without its doctests, and without a line that only announces them."""
    parts = [part for part in text.split_blocks(entry.body) if part not in entry.examples]
    while len(parts) > 1 and parts[-1].endswith(":"):
        parts.pop()
    parts = text.cut(parts, LIMIT)
    return "\n\n".join([_with_subject(entry, parts[0]), *parts[1:]])


def examples(entry: Entry) -> str:
    """The doctests of an entry."""
    return "\n\n".join(text.cut(list(entry.examples), LIMIT))


def arguments(entry: Entry) -> str:
    """The signature and one line a parameter: how it is passed, and its default."""
    awaited = " It is a coroutine function, so the call must be awaited." if entry.coroutine else ""
    count = len(entry.parameters)
    number = _NUMBERS[count] if count < len(_NUMBERS) else str(count)
    head = f"`{entry.qualname}` takes {number} argument{'s' if count != 1 else ''}:"
    lines = "\n".join(f"- {_parameter(one)}" for one in entry.parameters)
    return f"{head}\n\n{lines}\n\nThe full signature is:\n\n{_call(entry)}" + (
        f"\n\n{awaited.strip()}" if awaited else ""
    )


def member_list(entry: Entry, members: Sequence[Entry]) -> str:
    """The documented members: with their first sentences where they are few, by name where they are many."""
    what = "methods and attributes" if entry.kind == "class" else "functions and classes"
    if len(members) <= 12:
        lines = [f"- `{one.name}`: {_short(text.first_sentence(one.summary))}" for one in members]
        return f"These {what} of `{entry.qualname}` are documented:\n\n" + "\n".join(lines)
    names = ", ".join(f"`{one.name}`" for one in members[:60])
    more = f", and {len(members) - 60} more" if len(members) > 60 else ""
    return f"`{entry.qualname}` documents {len(members)} {what}: {names}{more}."


def _short(sentence: str) -> str:
    sentence = re.sub(r"\s+", " ", re.sub(r":$", " ...", sentence))
    return sentence if len(sentence) <= 120 else sentence[:117].rsplit(" ", 1)[0] + " ..."


def _call(entry: Entry) -> str:
    prefix = "await " if entry.coroutine else ""
    return f"```python\n{prefix}{entry.qualname}{entry.signature}\n```"


def _parameter(one: Parameter) -> str:
    if one.kind == "variadic":
        what = "any further keyword arguments" if one.name.startswith("**") else "any further positional arguments"
        return f"`{one.name}`: {what}"
    needed = "required"
    if one.default is not None:
        # A name with a leading underscore is how the source says "not given".
        needed = "optional" if one.default.startswith("_") else f"optional, default `{one.default}`"
    passed = {"keyword-only": ", keyword-only", "positional-only": ", positional-only"}.get(one.kind, "")
    return f"`{one.name}`: {needed}{passed}"


def _with_subject(entry: Entry, paragraph: str) -> str:
    """`Return the sum.` as `` `math.fsum` returns the sum. ``; unchanged where that could go wrong."""
    first, _, rest = paragraph.partition(" ")
    verb = first.lower()
    if entry.kind in ("function", "method") and rest and not rest.startswith(("of ", "for ")):
        also = re.search(r"(?:\b(?:and|or|then|otherwise|else),?|,) (\w+)\b", text.first_sentence(rest))
        if verb in _VERBS and not (also and also[1].lower() in _VERBS):
            return f"`{entry.qualname}` {_third_person(verb)} {rest}"
        if verb.endswith("s") and (verb[:-1] in _VERBS or verb[:-2] in _VERBS):
            return f"`{entry.qualname}` {verb} {rest}"
    if entry.kind == "property" and verb in ("return", "returns") and rest.startswith(("the ", "a ", "an ")):
        return f"`{entry.qualname}` is {rest}"
    article = ("A", "An", "The") if entry.kind == "property" else ("A", "An")
    noun = re.split(r"\b(?:that|which|where|who|whose|when|if|to)\b|[:,;(]", text.first_sentence(rest))[0]
    named = entry.name.lower() in noun.lower().split()[:2]
    if entry.kind in ("class", "module", "property") and first in article and not named and not _FINITE.search(noun):
        return f"`{entry.qualname}` is {verb} {rest}"
    return paragraph


def _third_person(verb: str) -> str:
    if verb.endswith(("s", "x", "z", "ch", "sh")):
        return verb + "es"
    return verb[:-1] + "ies" if re.search(r"[^aeiou]y$", verb) else verb + "s"
