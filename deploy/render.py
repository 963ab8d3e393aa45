#!/usr/bin/env python3
"""Render deploy/chart as Helm does, without Helm.

    deploy/render.py               write deploy/kube-flannel.yml and deploy/cleanup.yml
    deploy/render.py VALUES.yaml   print the chart with these values over its own

The template language of Helm is large.  This knows what the chart uses: blocks (if, else if, else, with, range, end),
pipelines, and `_FUNCTIONS`.  Everything else it refuses, also in branches that the values do not take.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

CHART = Path(__file__).resolve().parent / "chart"

NAMESPACE = "kube-flannel"

FILES: Mapping[str, Mapping[str, object]] = {"kube-flannel.yml": {}, "cleanup.yml": {"cleanup": True}}
"""What is written beside the chart, each with the values that it takes over the chart's own."""

_ORDER = ("Namespace", "ServiceAccount", "ConfigMap", "ClusterRole", "ClusterRoleBinding", "DaemonSet")
"""Helm sorts by kind: first what others need."""


class TemplateError(Exception):
    """The template uses what this script does not know, or what Helm refuses or renders as nonsense."""


class ChartError(TemplateError):
    """The chart itself refuses the values, by `fail`."""


# ------------------------------------------------------------------------------------------------------------- parsing


@dataclass(slots=True)
class _Block:
    """An if, with or range: `branches` are its pipelines, each with what it encloses; an else has the pipeline ''."""

    keyword: str
    branches: list[tuple[str, list[_Node]]] = field(default_factory=list)


_Node = str | tuple[str] | _Block
"""Text, the pipeline of an action, or a block."""

_ACTION = re.compile(r"\{\{(-?) (.*?) (-?)\}\}", re.DOTALL)


def _parse(template: str) -> list[_Node]:
    open_blocks: list[_Block] = [_Block("", [("", [])])]
    for node in _nodes(template):
        if not isinstance(node, tuple):
            open_blocks[-1].branches[-1][1].append(node)
            continue
        keyword, _, rest = node[0].partition(" ")
        if keyword in ("if", "with", "range"):
            _words(rest)
            open_blocks.append(_Block(keyword, [(rest, [])]))
        elif keyword == "else" and len(open_blocks) > 1:
            what, _, condition = rest.partition(" ")
            if what not in ("", "if") or (what == "if" and open_blocks[-1].keyword != "if"):
                raise TemplateError(f"not known: {node[0]}")
            if not open_blocks[-1].branches[-1][0]:
                raise TemplateError(f"after an else: {node[0]}")
            if what:
                _words(condition)
            open_blocks[-1].branches.append((condition, []))
        elif keyword == "end" and len(open_blocks) > 1 and not rest:
            block = open_blocks.pop()
            open_blocks[-1].branches[-1][1].append(block)
        elif keyword in ("else", "end", "define", "template", "block", "break", "continue"):
            raise TemplateError(f"not known, or not here: {node[0]}")
        else:
            _words(node[0])
            open_blocks[-1].branches[-1][1].append(node)
    if len(open_blocks) > 1:
        raise TemplateError(f"{open_blocks[-1].keyword} without an end")
    return open_blocks[0].branches[0][1]


def _nodes(template: str) -> Iterator[str | tuple[str]]:
    """Text, and what is in each pair of braces; a hyphen inside takes away the white space on its side."""
    at, trims = 0, False
    for action in _ACTION.finditer(template):
        left, inside, right = action.groups()
        text = template[at : action.start()]
        text = text.lstrip() if trims else text
        yield _text(text.rstrip() if left else text)
        yield (inside,)
        at, trims = action.end(), bool(right)
    yield _text(template[at:].lstrip() if trims else template[at:])


def _text(text: str) -> str:
    if "{{" in text or "}}" in text:
        raise TemplateError(f"not known: {text.strip()[:80]}")
    return text


_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?![\w.])|\$?(?:\.\w+)+|\.(?!\w)|[A-Za-z]\w*|[()|]')

_FUNCTIONS = {
    *("quote", "int", "toYaml", "trim", "nindent", "not", "or", "eq", "print", "printf", "include", "sha256sum", "fail")
}


def _words(pipeline: str) -> list[str]:
    words = _WORD.findall(pipeline)
    if not words or "".join(words) != re.sub(r'("(?:[^"\\]|\\.)*")|\s+', r"\1", pipeline):
        raise TemplateError(f"not known: {pipeline or 'nothing'}")
    if unknown := [it for it in words if it.isidentifier() and it not in _FUNCTIONS | {"true", "false"}]:
        raise TemplateError(f"not known: {unknown[0]} in {pipeline}")
    return words


# ----------------------------------------------------------------------------------------------------------- rendering


class _Number(int):
    """What `int` returns.  Values are floating point to Helm, which writes 16777215 as 1.6777215e+07."""


class _Rendering:
    """One chart with one set of values."""

    def __init__(self, values: Mapping[str, object], namespace: str) -> None:
        self._root = {
            "Values": values,
            "Release": {"Namespace": namespace},
            "Template": {"BasePath": "templates"},
        }

    def file(self, name: str) -> str:
        return self._nodes(_parse((CHART / name).read_text()), self._root)

    def _nodes(self, nodes: Sequence[_Node], dot: object) -> str:
        rendered = []
        for node in nodes:
            if isinstance(node, str):
                rendered.append(node)
            elif isinstance(node, tuple):
                rendered.append(_shown(self._pipeline(node[0], dot)))
            else:
                rendered.append(self._block(node, dot))
        return "".join(rendered)

    def _block(self, block: _Block, dot: object) -> str:
        for condition, inside in block.branches:
            value = self._pipeline(condition, dot) if condition else True
            if not value:
                continue
            if not condition or block.keyword == "if":
                return self._nodes(inside, dot)
            if block.keyword == "with":
                return self._nodes(inside, value)
            if not isinstance(value, list):
                raise TemplateError(f"range of what is no list: {condition}")
            return "".join(self._nodes(inside, each) for each in value)
        return ""

    def _pipeline(self, text: str, dot: object) -> object:
        words = _words(text)
        value = self._evaluate(words, dot)
        if words:
            raise TemplateError(f"not known: {text}")
        return value

    def _evaluate(self, words: list[str], dot: object) -> object:
        """Take a pipeline from the front of `words`, up to its end or a closing parenthesis."""
        value: object = None
        is_piped = False
        while True:
            arguments: list[object] = []
            function = words.pop(0) if words and words[0].isidentifier() and words[0] not in ("true", "false") else ""
            while words and words[0] not in ("|", ")"):
                arguments.append(self._operand(words, dot))
            if is_piped:
                arguments.append(value)
            if function:
                value = self._call(function, arguments)
            elif len(arguments) == 1 and not is_piped:
                (value,) = arguments
            else:
                raise TemplateError(f"no function, but several values, or none: {arguments}")
            if not words or words[0] == ")":
                return value
            words.pop(0)
            is_piped = True

    def _operand(self, words: list[str], dot: object) -> object:
        word = words.pop(0)
        if word == "(":
            value = self._evaluate(words, dot)
            if not words or words.pop(0) != ")":
                raise TemplateError("a parenthesis is not closed")
            return value
        if word.startswith('"'):
            return json.loads(word)
        if word in ("true", "false"):
            return word == "true"
        if re.fullmatch(r"-?\d+", word):
            return _Number(word)
        if word[0] not in ".$":
            raise TemplateError(f"a function within a command needs parentheses: {word}")
        value = self._root if word[0] == "$" else dot
        for name in word.lstrip("$").split(".")[1:] if word != "." else ():
            if not isinstance(value, Mapping):
                raise TemplateError(f"{word}: there is nothing that has {name}")
            value = value.get(name)
        return value

    def _call(self, function: str, arguments: list[object]) -> object:
        match function, arguments:
            case "quote", [value]:
                return json.dumps(_shown(value), ensure_ascii=False)
            case "int", [int() as value]:
                return _Number(value)
            case "toYaml", [value]:
                return yaml.safe_dump(value, default_flow_style=False).strip()
            case "trim", [str() as value]:
                return value.strip()
            case "nindent", [int() as n, str() as value]:
                return "\n" + "\n".join(" " * n + line for line in value.split("\n"))
            case "not", [value]:
                return not value
            case "or", [_, _, *_]:
                return next(filter(None, arguments), arguments[-1])
            case "eq", [str() as one, str() as other]:
                return one == other
            case "print", values if all(isinstance(it, str) for it in values):
                return "".join(map(str, values))
            case "printf", [str() as form, *values]:
                return _formatted(form, values)
            case "include", [str() as name, dot] if dot is self._root:
                return self.file(name)
            case "sha256sum", [str() as value]:
                return hashlib.sha256(value.encode()).hexdigest()
            case "fail", [str() as why]:
                raise ChartError(why)
        kinds = ", ".join(type(it).__name__ for it in arguments)
        raise TemplateError(f"not known: {function} of {kinds or 'nothing'}")


def _shown(value: object) -> str:
    """As Go writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | _Number):
        return str(value)
    raise TemplateError(f"{value!r} cannot be written as it is: a number goes through `int`, all else through `toYaml`")


def _formatted(form: str, values: list[object]) -> str:
    kinds: dict[str, type] = {"%d": _Number, "%s": str}
    verbs = re.findall(r"%.?", form)
    if len(verbs) != len(values) or not all(
        verb in kinds and isinstance(value, kinds[verb]) for verb, value in zip(verbs, values, strict=True)
    ):
        raise TemplateError(f"not known: printf {form!r} of {values}")
    return form % tuple(values)


# -------------------------------------------------------------------------------------------------------------- a chart


def merge(values: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    """`values` with those of `over`: maps are merged, lists replaced, and null takes a value away."""
    merged = dict(values)
    for name, value in over.items():
        old = merged.get(name)
        if value is None:
            merged.pop(name, None)
        elif isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[name] = merge(old, value)
        else:
            merged[name] = value
    return merged


def render(over: Mapping[str, object], namespace: str = NAMESPACE) -> str:
    """The manifests, as `helm template` gives them.  Raises TemplateError."""
    values = merge(yaml.safe_load((CHART / "values.yaml").read_text()), over)
    rendering = _Rendering(values, namespace)
    documents: list[tuple[int, str]] = []
    for path in sorted((CHART / "templates").iterdir()):
        for text in re.split(r"^---\n", rendering.file(f"templates/{path.name}"), flags=re.MULTILINE):
            if (found := yaml.safe_load(text)) is not None:
                documents.append((_ORDER.index(found["kind"]), text.strip()))
    return "".join(f"---\n{text}\n" for _, text in sorted(documents, key=lambda it: it[0]))


def written(name: str) -> str:
    """What is in deploy/`name`."""
    return f"# Written by deploy/render.py from deploy/chart.\n{render(FILES[name])}"


def main() -> None:
    if len(sys.argv) > 1:
        try:
            print(end=render(yaml.safe_load(Path(sys.argv[1]).read_text()) or {}))
        except TemplateError as exc:
            sys.exit(f"{sys.argv[1]}: {exc}")
        return
    for name in FILES:
        (CHART.parent / name).write_text(written(name))


if __name__ == "__main__":
    main()
