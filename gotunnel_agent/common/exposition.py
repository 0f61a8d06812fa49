"""Writes figures in Prometheus' text format (exposition formats, version 0.0.4). Values, no I/O.

By hand, not with prometheus_client: the format is these few lines. That package would be one more
for the gateway's operator to install, its counters take a lock and look up their labels at each
addition, and most of our figures are known by other parts anyway and only have to be asked. A test
reads what is written here with that package's own parser.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_LABEL = 256  # characters of a label's value; a hostname has at most 253
COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

Labels = tuple[tuple[str, str], ...]  # (name, value)


class Sample(NamedTuple):
    value: float
    labels: Labels = ()
    suffix: str = ""  # behind the metric's name; for histograms


class Metric(NamedTuple):
    """``name`` ends in a unit, a counter's in _total."""

    name: str
    kind: str  # COUNTER, GAUGE or HISTOGRAM
    help: str
    samples: Sequence[Sample]


def counter(name: str, help: str, *samples: Sample) -> Metric:
    return Metric(name, COUNTER, help, samples)


def gauge(name: str, help: str, *samples: Sample) -> Metric:
    return Metric(name, GAUGE, help, samples)


def histogram(
    bounds: Sequence[float], counts: Sequence[int], total: float, labels: Labels = ()
) -> Iterator[Sample]:
    """The samples of one histogram. ``bounds``: the upper ends of its buckets. ``counts``: the
    values in each bucket, and last the values above all. ``total``: the sum of all values."""
    sum_so_far = 0
    for bound, count in zip((*bounds, math.inf), counts):
        sum_so_far += count
        yield Sample(sum_so_far, (*labels, ("le", _number(bound))), "_bucket")
    yield Sample(total, labels, "_sum")
    yield Sample(sum_so_far, labels, "_count")


def text(metrics: Iterable[Metric]) -> str:
    """All of them. Those without a sample are left out."""
    return "".join(line for metric in metrics for line in _lines(metric))


def _lines(metric: Metric) -> Iterator[str]:
    name, kind, help, samples = metric
    if samples:
        yield f"# HELP {name} {help}\n# TYPE {name} {kind}\n"
    for value, labels, suffix in samples:
        inner = ",".join(f'{key}="{escaped(text)}"' for key, text in labels)
        yield (
            f"{name}{suffix}{{{inner}}} {_number(value)}\n"
            if inner
            else (f"{name}{suffix} {_number(value)}\n")
        )


def escaped(text: str) -> str:
    """A label's value. Unprintable characters are shown as Python writes them, so that they stay
    visible; what UTF-8 cannot have would make the whole page unreadable."""
    text = "".join(
        character if character.isprintable() else ascii(character)[1:-1]
        for character in text[:MOST_LABEL]
    )
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _number(value: float) -> str:
    if value == math.inf:
        return "+Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1 << 53 else repr(float(value))
