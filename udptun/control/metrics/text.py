"""Samples as text: Prometheus' format 0.0.4, and OpenMetrics 1.0 for clients that ask for it.  Pure.

The formats: https://prometheus.io/docs/instrumenting/exposition_formats/, https://openmetrics.io/.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from udptun.control.metrics.table import Kind, Metric


class Sample(NamedTuple):
    """`labels` are the values of the metric's labels, in their order."""

    metric: Metric
    labels: tuple[str, ...]
    value: float


@dataclass(frozen=True, slots=True)
class Format:
    is_open_metrics: bool

    @property
    def content_type(self) -> str:
        if self.is_open_metrics:
            return "application/openmetrics-text; version=1.0.0; charset=utf-8"
        return "text/plain; version=0.0.4; charset=utf-8"


def format_for(accept: str) -> Format:
    """What an Accept header asks for: OpenMetrics where it is named and liked as much as plain text, else plain text.

    Whatever the header is, there is an answer: a part of it that means nothing counts as not there.
    """
    liked = dict(_parse_accept(accept))
    open_metrics = liked.get("application/openmetrics-text", 0.0)
    return Format(open_metrics > 0 and open_metrics >= liked.get("text/plain", 0.0))


def _parse_accept(accept: str) -> Iterable[tuple[str, float]]:
    """Media types with how much each is liked, 0..1 (RFC 9110 12.5.1), the least first."""
    found = []
    for part in accept.split(","):
        media_type, *parameters = (it.strip().lower() for it in part.split(";"))
        weights = [it.partition("=")[2].strip() for it in parameters if it.partition("=")[0].strip() == "q"]
        try:
            weight = float(weights[0]) if weights else 1.0
        except ValueError:
            continue
        if 0 <= weight <= 1:
            found.append((media_type, weight))
    return sorted(found, key=lambda it: it[1])


def render(samples: Iterable[Sample], form: Format) -> str:
    """The samples as text; those of a metric come together, in the order of the first of each."""
    by_metric: dict[Metric, list[Sample]] = {}
    for sample in samples:
        by_metric.setdefault(sample.metric, []).append(sample)
    parts = [_head(metric, form) + _lines(metric, of_it) for metric, of_it in by_metric.items()]
    return "".join(parts) + ("# EOF\n" if form.is_open_metrics else "")


def _head(metric: Metric, form: Format) -> str:
    name, kind, text = metric.name, metric.kind, metric.help
    if not form.is_open_metrics:
        # This format knows of no info.
        return f"# HELP {name} {text}\n# TYPE {name} {Kind.GAUGE if kind is Kind.INFO else kind}\n"
    name = name.removesuffix("_total").removesuffix("_info" if kind is Kind.INFO else "")
    unit = f"# UNIT {name} {metric.unit}\n" if metric.unit else ""
    return f"# TYPE {name} {kind}\n{unit}# HELP {name} {text}\n"


def _lines(metric: Metric, samples: Iterable[Sample]) -> str:
    labels = ",".join(f'{label}="%s"' for label in metric.labels)
    line = f"{metric.name}{{{labels}}} %s\n" if labels else f"{metric.name} %s\n"
    return "".join([line % (*map(_escaped, sample.labels), sample.value) for sample in samples])


# Each label of each sample is asked for, and hardly any has something to escape.
_needs_escape = re.compile(r'[\\"\n]').search
_ESCAPES: Mapping[int, str] = {ord("\\"): r"\\", ord('"'): r"\"", ord("\n"): r"\n"}


def _escaped(value: str) -> str:
    return value.translate(_ESCAPES) if _needs_escape(value) else value
