"""Makes one document, or one set of metrics, of those of several processes. Values in, values out.

A document is that of dashboard/state.py. In one of several processes,

    gateway      has "processes": a row for each one
    totals       are sums. Hostnames are counted once, though several processes serve them
    sessions     are those of all, each with its "process": an agent has one with each
    hostnames    have one row each; its visits, bytes and rates are sums
    the rest     is this process's own: certificates and blocks are the same for all

Metrics are not added up: each sample has a label ``process``, by which a query can sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gotunnel_agent.common.exposition import Labels, Metric, Sample, counter

Document = dict[str, Any]

MOST_LISTED = 1000  # entries of each list: as dashboard.state
RECENT = 10  # seconds over which visits_per_second is the mean: as dashboard.state
SUMS = ("visits", "failed", "received_bytes", "sent_bytes", "running")
PROCESS = "process"


def documents(
    own: int, found: Mapping[int, Document], processes: Sequence[Document], uptime: float
) -> Document:
    """One document of those of several processes, by number; ``own`` is the number of this one.
    ``processes``: the rows of all, as the supervisor knows them. ``uptime``: its own, in
    seconds."""
    numbers = [own, *sorted(found.keys() - {own})]
    mine = found[own]
    hostnames = _hostnames([found[number]["hostnames"] for number in numbers])
    names = {row["hostname"] for row in hostnames}  # each agent of a pool has a row
    if mine["public"]:
        return {
            **mine,
            "totals": {"hostnames": max(_count(found.values(), "hostnames"), len(names))},
            "hostnames": hostnames[:MOST_LISTED],
        }
    sessions = [
        {**session, PROCESS: number}
        for number in sorted(numbers) for session in found[number]["sessions"]
    ]  # fmt: skip
    sessions.sort(key=lambda session: session["connected_at"])
    totals = [found[number]["totals"] for number in numbers]
    spark = _summed([each["spark"] for each in totals])
    return {
        **mine,
        "gateway": {
            **mine["gateway"],
            "started_at": int(mine["gateway"]["now"] - uptime),
            "uptime_seconds": int(uptime),
            "processes": _rows(found, processes),
        },
        "totals": {
            **mine["totals"],
            "sessions": sum(each["sessions"] for each in totals),
            "hostnames": max(_count(found.values(), "hostnames"), len(names)),
            "certificates": max(
                _count(found.values(), "certificates"), len(mine["certificates"]) + len(names)
            ),
            **{key: _sum([each[key] for each in totals]) for key in SUMS},
            "visits_per_second": _rate(spark),
            "spark": spark,
        },
        "sessions": sessions[:MOST_LISTED],
        "hostnames": hostnames[:MOST_LISTED],
    }


def _rows(found: Mapping[int, Document], processes: Sequence[Document]) -> list[Document]:
    rows = []
    for process in sorted(processes, key=lambda row: (row[PROCESS], row["pid"])):
        totals: Document = {}
        if process["state"] == "serving":
            totals = found.get(process[PROCESS], {}).get("totals", {})
        # None: it does not answer, or does not serve.
        told = {key: totals.get(key) for key in ("sessions", "visits", "running")}
        rows.append({**process, **told})
    return rows


def _count(found: Iterable[Document], key: str) -> int:
    """More than the lists have, if these are full."""
    return max(int(document["totals"][key]) for document in found)


def _hostnames(lists: Sequence[Sequence[Document]]) -> list[Document]:
    """One row for each hostname and agent. An agent has a session with each process, so its
    hostnames come once in each list."""
    rows: dict[tuple[object, ...], Document] = {}
    for found in lists:
        seen: Counter[tuple[object, ...]] = Counter()
        for row in found:
            # Two agents of a pool may have one name: their rows are matched in their order.
            name = (row["hostname"], row.get("agent"), row.get("target"))
            seen[name] += 1
            key = (*name, seen[name])
            rows[key] = _joined(rows[key], row) if key in rows else row
    return sorted(rows.values(), key=lambda row: str(row["hostname"]))


def _joined(one: Document, other: Document) -> Document:
    joined = {**one}
    for key in SUMS:
        if key in one:
            joined[key] = _sum([one[key], other.get(key)])
    pools = [row["pool"] for row in (one, other) if isinstance(row.get("pool"), dict)]
    if len(pools) == 2:
        joined["pool"] = {**pools[0], "visits": pools[0]["visits"] + pools[1]["visits"]}
    if "spark" in one:
        joined["spark"] = _summed([one["spark"], other["spark"]])
        joined["visits_per_second"] = _rate(joined["spark"])
    return joined


def _sum(values: Sequence[Any]) -> Any:
    """None if one of them is not known."""
    return None if None in values else sum(values)


def _summed(sparks: Sequence[Sequence[int]]) -> list[int]:
    return [sum(second) for second in zip(*sparks)]


def _rate(spark: Sequence[int]) -> float:
    return round(sum(spark[-RECENT:]) / RECENT, 1)


# Metrics


def as_values(metrics: Iterable[Metric]) -> list[Any]:
    """Metrics as JSON."""
    return [
        [name, kind, help, [[value, labels, suffix] for value, labels, suffix in samples]]
        for name, kind, help, samples in metrics
    ]


def metrics(found: Mapping[int, Sequence[Any]]) -> list[Metric]:
    """The metrics of several processes, as as_values() made them, by the number of each."""
    joined: dict[str, Metric] = {}
    for number, values in sorted(found.items()):
        for name, kind, help, samples in values:
            labelled = tuple(
                Sample(value, _labelled(labels, number), suffix)
                for value, labels, suffix in samples
            )
            before = joined.get(name, Metric(name, kind, help, ()))
            joined[name] = before._replace(samples=(*before.samples, *labelled))
    return list(joined.values())


def restarts(processes: Sequence[Document]) -> Metric:
    """What the supervisor knows: how often each process has ended though it should not."""
    counts = {row[PROCESS]: row["restarts"] for row in processes}
    return counter(
        "gotunnel_gateway_process_restarts_total",
        "Processes of PROCESSES that ended by themselves, or hung, and were started again.",
        *(Sample(count, ((PROCESS, str(number)),)) for number, count in sorted(counts.items())),
    )


def _labelled(labels: Iterable[Sequence[str]], number: int) -> Labels:
    return (*((name, text) for name, text in labels), (PROCESS, str(number)))


# Visits


def visits(
    known: Mapping[int, tuple[object, int]], found: Mapping[int, Sequence[Any]],
    make: Callable[..., Any],
) -> tuple[dict[int, tuple[object, int]], list[Any]]:  # fmt: skip
    """The visits that other processes have had since, in the order of their times. ``known``: by
    process, its life, and the number of its last visit that is known. ``found``: by process, its
    life, the number of its last visit, and the visits. ``make(*visit)`` makes one. Returns what is
    known now, too."""
    now = dict(known)
    came: list[Any] = []
    for number, (life, last, listed) in found.items():
        now[number] = (life, last)
        came += [make(*visit) for visit in listed]
    came.sort(key=lambda visit: visit.at)
    return now, came
