"""The bench's arithmetic: from the values of all rounds to medians, ratios and tables.

Pure: values in, text or JSON out.
"""

import math
import statistics
from dataclasses import dataclass, field

OURS, DIRECT = "ours", "direct"
MISSING = "–"

# Where a Markdown file keeps the table: what stands between the two is replaced.
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


@dataclass
class Figure:
    """One line of the table: what was measured, and its value for each subject in each round."""

    title: str
    # Subject: values, the first round's first. A value is a number, or a pair: gateway and agent.
    values: dict = field(default_factory=dict)

    def add(self, subject, value):
        self.values.setdefault(subject, []).append(value)

    def ratio(self, subject):
        """Ours to that of ``subject``: the median of the rounds' ratios. None if either was not
        measured.

        A ratio is taken within a round, because the machine may be slower in the next one. That of
        pairs is the ratio of their sums.
        """
        rounds = zip(self.values.get(OURS, ()), self.values.get(subject, ()))
        sums = [(total(ours), total(other)) for ours, other in rounds]
        # Memory that shrank while it was looked at has no ratio, nor has what was not there.
        ratios = [ours / other for ours, other in sums if ours >= 0 and other > 0]
        return statistics.median(ratios) if ratios else None


class Table:
    """All figures, in the order in which they were first measured."""

    def __init__(self, subjects):
        """``subjects``: their names, in the order of the columns."""
        self.subjects = subjects
        self.figures = {}  # title: Figure

    def add(self, subject, measured):
        """Take the values of one round: ``measured`` maps titles to values."""
        for title, value in measured.items():
            self.figures.setdefault(title, Figure(title)).add(subject, value)

    @property
    def others(self):
        return [subject for subject in self.subjects if subject != OURS]

    def lines(self, figures):
        """These figures as aligned text, a block for each."""
        width = max([8, *map(len, self.subjects)])
        for figure in figures:
            yield figure.title
            for subject, values in figure.values.items():
                ratio = figure.ratio(subject) if subject != OURS else None
                beside = "" if ratio is None else f"   ours / {subject} {number(ratio)}"
                yield f"    {subject:{width}} {cell(values):30}{beside}".rstrip()

    def markdown(self, notes=()):
        """The table in Markdown, with ``notes`` below it as a list."""
        head = ["", *self.subjects, *(f"ours / {subject}" for subject in self.others)]
        rows = [head, ["---"] * len(head)]
        for figure in self.figures.values():
            values = [cell(figure.values.get(subject, ())) for subject in self.subjects]
            ratios = [figure.ratio(subject) for subject in self.others]
            rows.append([figure.title, *values, *map(number, ratios)])
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"

    def as_json(self):
        """A list with one entry a figure, for json.dump()."""
        return [
            {
                "title": figure.title,
                "values": figure.values,
                "medians": {subject: middle(values) for subject, values in figure.values.items()},
                "ratios": {
                    subject: ratio
                    for subject in self.others
                    if (ratio := figure.ratio(subject)) is not None
                },
            }
            for figure in self.figures.values()
        ]


def total(value):
    return sum(value) if isinstance(value, tuple) else value


def middle(values):
    """The median; of pairs, a pair of medians."""
    if isinstance(values[0], tuple):
        return tuple(map(statistics.median, zip(*values)))
    return statistics.median(values)


def cell(values):
    """The median, and from what to what the rounds went if there were several. Of pairs: both
    medians, and from what to what their sum went."""
    if not values:
        return MISSING
    medians = middle(values)
    text = " + ".join(map(number, medians if isinstance(medians, tuple) else [medians]))
    low, high = (number(limit(map(total, values))) for limit in (min, max))
    return text if low == high else f"{text} ({low} to {high})"


def number(value):
    """Three digits that matter, or all in front of the point. None is a dash."""
    if value is None:
        return MISSING
    for decimals, least in ((0, 100), (1, 10), (2, 1)):
        if round(abs(value), decimals + 1) >= least:
            return f"{value:.{decimals}f}"
    return f"{value:.3f}"


def percentile(values, share):
    """The smallest value that at least ``share`` (0 to 1) of all do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def put_between(text, table, first=BEGIN, last=END):
    """``text`` with ``table`` between ``first`` and ``last``. Raises ValueError if it does not have
    both."""
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"expected a line {first} and, below it, a line {last}")
    return f"{before}{begin}\n\n{table}\n{end}{after}"
