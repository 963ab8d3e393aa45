"""deploy/render.py does as Helm does, as far as it knows the language, and refuses the rest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy import render

VALUES = {
    "yes": True,
    "no": False,
    "empty": "",
    "word": "a b",
    "n": 16777215,
    "list": ["x", "y"],
    "map": {"b": 1, "a": ["z"]},
}


@pytest.fixture(autouse=True)
def chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "templates").mkdir()
    monkeypatch.setattr(render, "CHART", tmp_path)
    return tmp_path


def rendered(chart: Path, template: str) -> str:
    (chart / "templates" / "t.yaml").write_text(template)
    return render._Rendering(VALUES, "ns").file("templates/t.yaml")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("a {{ .Values.word }} b", "a a b b"),
        ("a  {{- .Values.word }} b", "aa b b"),
        ("a {{ .Values.word -}}\n\n  b", "a a bb"),
        ("a\n{{- if .Values.yes }}\nb\n{{- end }}\nc", "a\nb\nc"),
        ("{{ .Values.word -}}  {{- .Values.word }}", "a ba b"),
        ("{{ .Values.word }} {{ .Values.word }}", "a b a b"),
        ("{{ if .Values.no }}1{{ else if .Values.yes }}2{{ else }}3{{ end }}", "2"),
        ("{{ if .Values.no }}1{{ else if .Values.empty }}2{{ else }}3{{ end }}", "3"),
        ("{{ if not .Values.missing }}1{{ end }}", "1"),
        ('{{ if or .Values.no (eq .Values.word "a b") }}1{{ end }}', "1"),
        ("{{ with .Values.word }}<{{ . }}>{{ $.Release.Namespace }}{{ end }}", "<a b>ns"),
        ("{{ with .Values.empty }}<{{ . }}>{{ else }}{{ .Release.Namespace }}{{ end }}", "ns"),
        ("{{ range .Values.list }}<{{ . }}>{{ end }}", "<x><y>"),
        ("{{ .Values.word | quote }}{{ quote .Values.yes }}", '"a b""true"'),
        ("{{ int .Values.n }}", "16777215"),
        ('{{ printf "--port=%d" (int .Values.n) | quote }}', '"--port=16777215"'),
        ('{{ printf "%s:%s" .Values.word .Release.Namespace }}', "a b:ns"),
        ("x:\n  {{- toYaml .Values.map | nindent 2 }}", "x:\n  a:\n  - z\n  b: 1"),
        ("{{ .Values.no }}", "false"),
        ('{{ "abc" | sha256sum }}', "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
    ],
)
def test_template_renders_as_helm_renders_it(chart: Path, template: str, expected: str) -> None:
    assert rendered(chart, template) == expected


def test_include_gives_the_whole_text_of_another_file(chart: Path) -> None:
    (chart / "templates" / "other.yaml").write_text("ns: {{ .Release.Namespace }}\n")
    assert rendered(chart, '{{ include (print $.Template.BasePath "/other.yaml") . }}') == "ns: ns\n"


@pytest.mark.parametrize(
    "template",
    [
        "{{ .Values.n }}",
        "{{ .Values.missing }}",
        "{{ .Values.missing.deeper }}",
        "{{ .Values.list }}",
        "{{ range .Values.map }}{{ end }}",
        "{{ range $i, $x := .Values.list }}{{ end }}",
        "{{ $x := .Values.word }}",
        '{{ define "x" }}{{ end }}',
        '{{ template "x" . }}',
        '{{ lookup "v1" "Node" "" "" }}',
        "{{ .Values.word | upper }}",
        "{{ .Values.word .Values.word }}",
        "{{ .Values.word | .Values.word }}",
        "{{ quote }}",
        "{{ eq .Values.yes true }}",
        '{{ int "x" }}',
        "{{ int 1.5 }}",
        "{{ quote (quote .Values.word }}",
        "{{ quote .Values.word) }}",
        '{{ printf "%v" .Values.word }}',
        '{{ printf "%d" .Values.n }}',
        '{{ printf "%s %s" .Values.word }}',
        "{{/* a comment */}}",
        "{{.Values.word}}",
        "{{ if .Values.yes }}",
        "{{ end }}",
        "{{ if }}1{{ end }}",
        "{{ if .Values.yes }}1{{ else if }}2{{ end }}",
        "{{ if .Values.yes }}1{{ else }}2{{ else }}3{{ end }}",
        "{{ if .Values.no }}{{ .Values.word | upper }}{{ end }}",
        "{{ if .Values.yes }}1{{ else if hasKey .Values 1 }}2{{ end }}",
        "{{ else }}",
        "{{ with .Values.yes }}{{ else if .Values.no }}{{ end }}",
        '{{ include (print $.Template.BasePath "/t.yaml") .Values }}',
        "{{ .Values.word }",
        "}}",
    ],
)
def test_template_with_something_unknown_is_refused(chart: Path, template: str) -> None:
    with pytest.raises(render.TemplateError):
        rendered(chart, template)


def test_chart_that_refuses_its_values_says_why(chart: Path) -> None:
    with pytest.raises(render.ChartError, match=re.escape("not this (really)")):
        rendered(chart, '{{- if .Values.yes }}{{- fail "not this (really)" }}{{- end }}')


def test_values_are_merged_as_helm_merges_them() -> None:
    values = {"a": {"b": 1, "c": 2}, "list": [1, 2], "gone": 1}
    over = {"a": {"c": 3}, "list": [4], "gone": None, "new": {"d": 5}}
    assert render.merge(values, over) == {"a": {"b": 1, "c": 3}, "list": [4], "new": {"d": 5}}
    assert values["a"] == {"b": 1, "c": 2}
