"""Documentation entries from the sources of the standard library, which are parsed and never run."""

from __future__ import annotations

import ast
import functools
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sft_dist.data.python_docs_entries import Entry, Kind, Parameter, Passing, make_entry

# Not documentation of what a user calls, not on every distribution, or gone from later versions of Python.
_SKIPPED_WORDS = """
antigravity asynchat asyncore aifc audioop cgi cgitb chunk crypt curses distutils encodings ensurepip idlelib imp
imghdr lib2to3 mailcap msilib nis nntplib nturl2path ossaudiodev pip pipes pydoc pydoc_data smtpd sndhdr spwd
sre_compile sre_constants sre_parse sunau telnetlib test tests this tkinter turtledemo uu xdrlib
"""
SKIPPED = frozenset(_SKIPPED_WORDS.split())
# Where the Python source of a public module has another name.
RENAMED = {
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
    "posixpath": "os.path",
    "genericpath": "os.path",
    "ntpath": "",
    "pathlib._abc": "pathlib",
    "pathlib._local": "pathlib",
    "importlib._abc": "importlib.abc",
}
_ACCESSORS = ("property", "cached_property", "setter", "getter", "deleter")


def entries() -> Iterator[Entry]:
    """Every documented public module, class, function, method and property, module after module by path."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(_source_files(root), key=lambda path: path.relative_to(root).parts):
        parts = file.relative_to(root).with_suffix("").parts
        dotted = ".".join(part for part in parts if part != "__init__")
        tree = _parse(file)
        if tree is not None:
            yield from _from_tree(RENAMED.get(dotted, dotted), dotted, tree)


def _source_files(root: Path) -> Iterator[Path]:
    for top in root.iterdir():
        if top.stem in SKIPPED or top.stem not in sys.stdlib_module_names:
            continue
        for file in top.rglob("*.py") if top.is_dir() else [top]:
            parts = file.relative_to(root).with_suffix("").parts
            dotted = ".".join(parts)
            private = any(part.startswith("_") and part != "__init__" for part in parts)
            skipped = any(part in SKIPPED or not part.isidentifier() for part in parts)
            if file.suffix == ".py" and not skipped and (not private or dotted in RENAMED):
                yield file


def _parse(file: Path) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):
            return None


def _from_tree(module: str, dotted: str, tree: ast.Module) -> Iterator[Entry]:
    if not module:
        return
    doc = ast.get_docstring(tree)
    if doc and module == dotted and (entry := make_entry(module, "module", module, doc)):
        yield entry
    public = _public_names(tree)
    shown = _exported_by_package(dotted)
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("_") or (public is not None and node.name not in public):
            continue
        home = shown.get(node.name, shown.get("*", module) if public else module)
        if isinstance(node, ast.ClassDef):
            yield from _from_class(home, f"{home}.{node.name}", node)
        elif entry := _from_function(home, home, node, "function"):
            # A decorator made something else of a function outside a class that takes `self`, such as `typing.Union`.
            special = entry.signature.startswith("(self")
            yield replace(entry, kind="topic", signature="", parameters=()) if special else entry


def _public_names(tree: ast.Module) -> set[str] | None:
    """The names in a literal `__all__`, or None where there is none or it is computed."""
    names: set[str] = set()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
            value = getattr(node, "value", None)
            if not isinstance(value, ast.List | ast.Tuple):
                return None
            names |= {str(item.value) for item in value.elts if isinstance(item, ast.Constant)}
    return names or None


def _exported_by_package(dotted: str) -> dict[str, str]:
    """Names of a submodule that its package imports for its users (`*` for all), with the package's name."""
    package, _, last = dotted.rpartition(".")
    return dict.fromkeys(_imports_of(package).get(last, ()), package) if package else {}


@functools.cache
def _imports_of(package: str) -> dict[str, tuple[str, ...]]:
    tree = _parse(Path(sysconfig.get_path("stdlib"), *package.split("."), "__init__.py"))
    return {
        node.module: tuple(alias.name for alias in node.names if alias.asname is None)
        for node in (tree.body if tree else ())
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
    }


def _from_class(module: str, qualname: str, node: ast.ClassDef) -> Iterator[Entry]:
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    start = next((n for n in methods if n.name == "__init__"), None)
    parameters = _parameters(start.args, drop_first=True) if start else ()
    doc = ast.get_docstring(node) or (start and ast.get_docstring(start))
    if doc:
        signature = _signature(start.args, drop_first=True) if start else ""
        if entry := make_entry(qualname, "class", module, doc, signature=signature, parameters=parameters):
            yield entry
    # The turtle module makes a function of every method of these at import.
    flat = module == "turtle" and node.name in ("TNavigator", "TPen", "RawTurtle", "TurtleScreen", "TurtleScreenBase")
    for method in methods:
        if not method.name.startswith("_"):
            entry = _from_function(module, qualname, method, "method")
            if entry and flat:
                entry = replace(entry, qualname=f"turtle.{method.name}", kind="function")
            if entry:
                yield entry
    for inner in node.body:
        if isinstance(inner, ast.ClassDef) and not inner.name.startswith("_"):
            yield from _from_class(module, f"{qualname}.{inner.name}", inner)


def _from_function(module: str, owner: str, node: ast.FunctionDef | ast.AsyncFunctionDef, kind: Kind) -> Entry | None:
    doc = ast.get_docstring(node)
    # The commands of the debugger's prompt are documented in its own terms, not as methods.
    if not doc or (module == "pdb" and node.name.startswith(("do_", "help_"))):
        return None
    marks = {ast.unparse(mark).split("(")[0].rsplit(".", 1)[-1] for mark in node.decorator_list}
    if "overload" in marks:
        return None
    if marks & set(_ACCESSORS):
        return make_entry(f"{owner}.{node.name}", "property", module, doc)
    bound = kind == "method" and "staticmethod" not in marks
    return make_entry(
        f"{owner}.{node.name}",
        kind,
        module,
        doc,
        signature=_signature(node.args, drop_first=bound),
        parameters=_parameters(node.args, drop_first=bound),
        coroutine=isinstance(node, ast.AsyncFunctionDef),
    )


def _parameters(args: ast.arguments, drop_first: bool) -> tuple[Parameter, ...]:
    found: list[Parameter] = []
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + [ast.unparse(d) for d in args.defaults]
    for at, (arg, default) in enumerate(zip(positional, defaults, strict=True)):
        if at == 0 and drop_first:
            continue
        kind: Passing = "positional-only" if at < len(args.posonlyargs) else "positional"
        found.append(Parameter(arg.arg, kind, default))
    if args.vararg:
        found.append(Parameter(f"*{args.vararg.arg}", "variadic"))
    for arg, node in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        found.append(Parameter(arg.arg, "keyword-only", ast.unparse(node) if node else None))
    if args.kwarg:
        found.append(Parameter(f"**{args.kwarg.arg}", "variadic"))
    return tuple(found)


def _signature(args: ast.arguments, drop_first: bool) -> str:
    shown = ast.unparse(args)
    if drop_first and (args.posonlyargs or args.args):
        shown = re.sub(r"^[^,]+(?:, /)?(?:, |$)", "", shown)
    return f"({shown})"
