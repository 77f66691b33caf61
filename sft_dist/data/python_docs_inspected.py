"""Documentation entries of what has no Python source: builtins, and C modules from a short fixed list."""

from __future__ import annotations

import builtins
import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from sft_dist.data.python_docs_entries import Entry, Kind, Parameter, Passing, make_entry

# C modules that every usual build has and that are imported without a side effect.
INSPECTED = (
    *("array", "atexit", "binascii", "cmath", "collections", "functools", "gc", "itertools", "marshal", "math", "os"),
    *("select", "signal", "struct", "sys", "time", "unicodedata", "weakref", "zlib"),
)
# What of `os` is C code differs from platform to platform; these are everywhere.
_OS_WORDS = """
abort access chdir chmod close cpu_count dup fsencode fspath fstat fsync getcwd getlogin getpid isatty kill link
listdir lseek lstat mkdir open pipe putenv read readlink remove rename replace rmdir scandir stat strerror symlink
system times truncate umask unlink unsetenv urandom utime waitpid write
"""
_OS = frozenset(_OS_WORDS.split())

_PASSED: dict[Any, Passing] = {
    inspect.Parameter.POSITIONAL_ONLY: "positional-only",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "positional",
    inspect.Parameter.VAR_POSITIONAL: "variadic",
    inspect.Parameter.KEYWORD_ONLY: "keyword-only",
    inspect.Parameter.VAR_KEYWORD: "variadic",
}
_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def entries() -> Iterator[Entry]:
    """The builtin functions and types, then the C modules; a module that this build lacks is left out."""
    for name, value in sorted(vars(builtins).items()):
        if not name.startswith("_") and getattr(value, "__module__", None) in ("builtins", "io", "_io"):
            yield from _from_object(f"{name}", "builtins", value, family=f"builtins.{name}")
    for module_name in INSPECTED:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        yield from _from_module(module_name, module)


def _from_module(name: str, module: ModuleType) -> Iterator[Entry]:
    doc = inspect.getdoc(module)
    if doc and (entry := make_entry(name, "module", name, doc)):
        yield entry
    for key, current in sorted(vars(module).items()):
        # A program may have put a hook of its own in the place of one in `sys`; the original is kept beside it.
        value = vars(module).get(f"__{key}__", current)
        of_c = inspect.isbuiltin(value) or inspect.isclass(value)
        if key.startswith("_") or not of_c or (name == "os" and key not in _OS):
            continue
        home = str(getattr(value, "__module__", ""))
        if home in (name, f"_{name}", "posix", "nt") or (name == "weakref" and home == "weakref"):
            yield from _from_object(f"{name}.{key}", name, value, family=name)


def _from_object(qualname: str, module: str, value: Any, family: str) -> Iterator[Entry]:
    if inspect.isclass(value) and any(inspect.isfunction(member) for member in vars(value).values()):
        return  # written in Python: its source says what is public
    kind: Kind = "class" if inspect.isclass(value) else "function"
    if entry := _inspected(qualname, kind, module, value, family):
        yield entry
    if not inspect.isclass(value) or issubclass(value, BaseException):
        return
    for key, member in sorted(vars(value).items()):
        if key.startswith("_") or isinstance(member, type):
            continue
        of: Kind = "method" if callable(getattr(value, key, None)) else "property"
        if entry := _inspected(f"{qualname}.{key}", of, module, member, family):
            yield entry


def _inspected(qualname: str, kind: Kind, module: str, value: Any, family: str) -> Entry | None:
    doc = getattr(value, "__doc__", None)
    if not isinstance(doc, str) or (kind == "property" and doc == type(value).__doc__):
        return None
    signature: str = ""
    parameters: tuple[Parameter, ...] = ()
    if kind != "property":
        signature, parameters = _inspected_signature(value)
    return make_entry(qualname, kind, module, doc, signature=signature, parameters=parameters, family=family)


def _inspected_signature(value: Any) -> tuple[str, tuple[Parameter, ...]]:
    if inspect.isclass(value) and not getattr(value, "__text_signature__", None):
        return "", ()
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError, AttributeError, NameError, SyntaxError):
        return "", ()
    listed = [p for p in found.parameters.values() if p.name not in ("self", "cls", "type")]
    if any("<" in repr(p.default) for p in listed if p.default is not p.empty):
        return "", ()
    parameters = tuple(
        Parameter(
            _STARS.get(one.kind, "") + one.name,
            _PASSED[one.kind],
            None if one.default is one.empty else repr(one.default),
        )
        for one in listed
    )
    return str(found.replace(parameters=listed, return_annotation=found.empty)), parameters
