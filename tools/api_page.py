"""The reference of docs/api.md, from the docstrings: python -m tools.api_page

The page's own text stays; what stands between the two marks is written anew.
tests/tools/test_api_page.py fails where the page is not what the docstrings say.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import riskpo_kernels
from riskpo_kernels import causal_lm

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
BEGIN, END = (f"<!-- from docstrings: {word} -->\n" for word in ("begin", "end"))


def page() -> str:
    """The page with its reference as the docstrings have it now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    entries = [text for module in (riskpo_kernels, causal_lm) for text in module_entries(module)]
    return before + BEGIN + "\n".join(entries) + END + after


def module_entries(module: Any) -> Iterator[str]:
    """The public names of a module; one that a module before it has is not repeated."""
    yield f"### {module.__name__}\n"
    for name in sorted(module.__all__, key=str.lower):
        if module is riskpo_kernels or name not in riskpo_kernels.__all__:
            yield entry(name, getattr(module, name))


def entry(name: str, thing: Any) -> str:
    """Heading, call and docstring of a function, or of a class and its methods."""
    shown = (
        f"#### {name}\n\n```python\n{call(name, thing)}\n```\n\n```text\n{told(name, thing)}\n```\n"
    )
    methods = vars(thing).items() if inspect.isclass(thing) else ()
    for method, function in methods:
        public = method == "__call__" or not method.startswith("_")
        if public and inspect.isfunction(function) and function.__doc__:
            own = f"{name}.{method}" if method != "__call__" else f"{name}(...)"
            text = told(own, function)
            shown += f"\n```python\n{call(own, function)}\n```\n\n```text\n{text}\n```\n"
    return shown


def call(name: str, thing: Any) -> str:
    """The signature, one argument a line where it does not fit on one."""
    signature = inspect.signature(thing)
    arguments, starred = [], False
    for argument in signature.parameters.values():
        if argument.name == "self":
            continue
        if argument.kind is argument.KEYWORD_ONLY and not starred:
            arguments.append("*")
            starred = True
        starred = starred or argument.kind is argument.VAR_POSITIONAL
        bare = argument.replace(annotation=argument.empty, default=argument.empty)
        text = str(bare) + (
            f": {spelled(argument.annotation)}" * (argument.annotation is not argument.empty)
        )
        if argument.default is not argument.empty:
            text += f" = {argument.default!r}"
        arguments.append(text)
    returned = signature.return_annotation
    arrow = "" if returned is signature.empty else f" -> {spelled(returned)}"
    line = f"{name}({', '.join(arguments)}){arrow}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{name}(", *(f"    {a}," for a in arguments), f"){arrow}"])


def spelled(annotation: Any) -> str:
    return (
        annotation
        if isinstance(annotation, str)
        else getattr(annotation, "__name__", str(annotation))
    )


def told(name: str, thing: Any) -> str:
    text = inspect.getdoc(thing)
    if not text:
        raise ValueError(f"api: {name} has no docstring. Write one.")
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
