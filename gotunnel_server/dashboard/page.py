"""Renders the dashboard's page and its login form. Values, no I/O.

page.html holds the page with its style and its script. The script shows the state document (see
state.py) and keeps it up to date. Without JavaScript the page shows the same document as tables,
which are rendered here, and reloads itself.

Peers' texts come from anywhere, so they are escaped and bounded, and what is invisible in them or
turns a line around (bidi overrides) is shown as its code point. The Content-Security-Policy names
the style and the script by hash: should HTML get in all the same, nothing in it would run.
"""

from __future__ import annotations

import json
import re
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from gotunnel_agent.common import content_policy

from ..visitors.pages import Page

Document = Mapping[str, Any]  # the state document, or one entry of its lists

REFRESH = 10  # seconds between two reloads of a page without JavaScript
MOST_TEXT = 100  # characters of a peer's text in a cell; its title shows more
MOST_TITLE = 2048
MOST_ERROR = 8000
MOST_DIGITS = 20  # of a number in a name; to read one takes time by the square of its digits
MOST_VISITS = 100  # rows without JavaScript
MOST_MARKS = 4  # combining marks on one letter; more would paint over the lines around
SOON = 14  # days; a certificate that ends sooner should have been renewed

_SOURCE = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
_PLACEHOLDER = re.compile(r"\{\{([a-z]+)\}\}")
_PARTS = _PLACEHOLDER.split(_SOURCE)

# Characters that isprintable() lets pass, but that show nothing.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")


CONTENT_POLICY = content_policy.for_page(_SOURCE.encode(), "data:")


def render(document: Document, csrf: str = "") -> Page:
    """The page of a state document. ``csrf``: the token that its forms and its script send with
    what they ask for; "" for the public form of the page, which can only be read."""
    is_public = bool(document.get("public"))
    gateway = document.get("gateway") or {}
    version = visible(gateway.get("version"))
    logout = f'<form method="post" action="logout">{_csrf(csrf)}' + (
        '<button class="button">Log out</button></form>'
    )
    return _page(
        200,
        kind="public" if is_public else "",
        host=escape(visible(gateway.get("host"))),
        about=escape(_about(gateway, version, is_public)),
        csrf=escape(csrf),
        refresh=str(REFRESH),
        logout="" if is_public or not csrf else logout,
        tables=_tables(document, csrf),
        footer=_footer(version, is_public),
        # Nothing in it may look like the end of its element.
        state=json.dumps(document, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _page(status: int, **parts: str) -> Page:
    pieces = [parts[p] if number % 2 else p for number, p in enumerate(_PARTS)]
    return Page(
        status, "".join(pieces).encode(), fields=(("Content-Security-Policy", CONTENT_POLICY),)
    )


def _csrf(token: str) -> str:
    return f'<input type="hidden" name="csrf" value="{escape(token)}">'


def _about(gateway: Document, version: str, is_public: bool) -> str:
    if is_public:
        return "The hostnames that agents serve here"
    stops = " \u00b7 stopping" if gateway.get("state") == "draining" else ""
    return f"gotunnel {version} \u00b7 up {span(gateway.get('uptime_seconds') or 0)}{stops}"


def _footer(version: str, is_public: bool) -> str:
    if is_public:
        return "gotunnel \u00b7 set DASHBOARD_PASSWORD to see more"
    return f"gotunnel {escape(version)}"


# Words and numbers, the same as those of the script.


def visible(text: object) -> str:
    """A peer's text with what cannot be seen as its code point: control characters, zero-width
    ones, bidi overrides, blanks that are no space, lone surrogates."""
    text = "" if text is None else str(text)
    if text.isascii() and text.isprintable():
        return text
    shown, marks = [], 0
    for character in text:
        marks = marks + 1 if unicodedata.category(character)[0] == "M" else 0
        if not character.isprintable() or character in _BLANK or _is_selector(character):
            character = f"[U+{ord(character):04X}]"
        if marks <= MOST_MARKS:
            shown.append(character)
    return "".join(shown)


def _is_selector(character: str) -> bool:
    """Variation selectors: invisible, and any text can be hidden in a row of them."""
    return "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"


def clip(text: str, most: int) -> str:
    """The beginning of a text; one that is cut ends in an ellipsis."""
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def size(count: float | None) -> str:
    """Bytes as people say them."""
    if count is None:
        return "\u2013"
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    scaled, at = float(count), 0
    while scaled >= 1000 and at < len(units) - 1:
        scaled, at = scaled / 1000, at + 1
    return f"{scaled:.3g} {units[at]}" if scaled < 1000 else f"{scaled:.0f} {units[at]}"


def span(seconds: float) -> str:
    """A length of time in its two largest units: "3 d 4 h", "12 min"."""
    left = max(0, int(seconds))
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    for (length, unit), (lesser, second) in zip(units, units[1:]):
        if left >= length:
            count, rest = left // length, left % length // lesser
            return f"{count} {unit} {rest} {second}" if rest and count < 10 else f"{count} {unit}"
    return f"{left} s"


def lasting(milliseconds: float | None) -> str:
    """A duration: "12 ms", "1.25 s", "3 min 20 s"."""
    if milliseconds is None:
        return "\u2013"
    if milliseconds < 1000:
        return f"{milliseconds:.3g} ms"
    seconds = milliseconds / 1000
    return f"{seconds:.3g} s" if seconds < 60 else span(seconds)


def natural(name: str) -> tuple[tuple[str | int, ...], str]:
    """Sorts names as people do: app2 before app10."""
    parts = re.split(r"([0-9]+)", name.lower())
    numbered = (int(p[:MOST_DIGITS]) if number % 2 else p for number, p in enumerate(parts))
    return tuple(numbered), name


def _number(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:,}"


def _rate(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.3g}/s"


def _instant(at: object) -> str:
    """An instant, seconds since 1970 or a text, in UTC; "" if there is none."""
    if isinstance(at, str):
        return visible(at)
    if not isinstance(at, (int, float)):
        return ""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
    except (ValueError, OverflowError, OSError):  # beyond what the system's calendar holds
        return ""


# Tables


class _Column(NamedTuple):
    id: str  # the class of its cells, which page.html gives their places
    label: str
    cell: Callable[[Document], str]  # HTML
    kind: str = ""  # a further class


def _text(value: object, most: int = MOST_TEXT) -> str:
    """A peer's text as HTML; what is cut off is in its title."""
    shown = visible(value)
    if len(shown) <= most:
        return escape(shown) or "\u2013"
    return f'<span title="{escape(clip(shown, MOST_TITLE))}">{escape(clip(shown, most))}</span>'


def _table(name: str, caption: str, columns: Sequence[_Column], rows: Iterable[Document]) -> str:
    """A table with the roles that its elements lose when they are laid out as a grid."""
    heads = "".join(
        f'<th scope="col" role="columnheader" class="c-{c.id} {c.kind}">{c.label}' for c in columns
    )
    lines = "\n".join(
        '<tr role="row">'
        + "".join(
            f'<td role="cell" class="c-{c.id} {c.kind}" data-label="{c.label}">{c.cell(row)}'
            for c in columns
        )
        for row in rows
    )
    return (
        f'<table class="table {name}" role="table"><caption class="unseen">{caption}</caption>\n'
        f'<thead role="rowgroup"><tr role="row">{heads}</thead>\n'
        f'<tbody role="rowgroup">\n{lines}\n</tbody></table>'
    )


def _section(
    id: str,
    title: str,
    columns: Sequence[_Column],
    rows: Sequence[Document],
    empty: str,
    *,
    total: int = 0,
    form: str = "",
) -> str:
    """``rows`` are the first of ``total``. ``form`` stands beside the title."""
    count = f" <b>{max(total, len(rows)):,}</b>"
    body = _table(id, title, columns, rows) if rows else f'<p class="empty">{empty}</p>'
    if total > len(rows):
        body += f'<p class="note">{len(rows):,} of {total:,} are listed; the totals count all.</p>'
    return f'<section><div class="head"><h2>{title}{count}</h2>{form}</div>\n{body}\n</section>'


_BLOCK_FORM = """<form method="post" action="api/v1/blocks" class="head">{}
<label>Address <input type="text" name="address" required placeholder="192.0.2.7"></label>
<label>Seconds <input type="text" name="seconds" value="3600" inputmode="numeric"></label>
<label>Reason <input type="text" name="reason" maxlength="200"></label>
<button class="button">Block</button></form>"""


def _tables(document: Document, csrf: str) -> str:
    """The document as tables for browsers without JavaScript."""
    hostnames = sorted(document.get("hostnames") or (), key=lambda h: natural(str(h["hostname"])))
    no_agent = "No agent is connected. When one is, its hostnames appear here."
    totals = document.get("totals") or {}
    if document.get("public"):
        total = totals.get("hostnames", 0)
        sections = [
            _section("hostnames", "Hostnames", HOSTNAMES[:2], hostnames, no_agent, total=total)
        ]
    else:
        now = (document.get("gateway") or {}).get("now")
        since = _Column("since", "Since", lambda entry: _ago(entry, now), "number")
        by_session: dict[object, list[str]] = {}
        for entry in hostnames:
            by_session.setdefault(entry.get("session"), []).append(str(entry["hostname"]))
        names = _Column("hostnames", "Hostnames", lambda e: _names(e, by_session.get(e["id"], [])))
        sessions = sorted(
            document.get("sessions") or (), key=lambda s: natural(str(s.get("agent")))
        )
        visits = sorted(document.get("visits") or (), key=lambda v: v.get("id", 0), reverse=True)
        blocks = list(document.get("blocks") or ())
        end = _act("End session", lambda e: f"api/v1/sessions/{_in_path(e['id'])}/end", csrf)
        renew = _act(
            "Renew", lambda e: f"api/v1/certificates/{_in_path(e['hostname'])}/renew", csrf
        )
        unblock = _act("Unblock", lambda e: f"api/v1/blocks/{_in_path(e['address'])}/remove", csrf)
        sections = [
            _totals(totals),
            _section(
                "sessions", "Agents", (*SESSIONS[:2], since, *SESSIONS[2:], names, *end), sessions,
                no_agent, total=totals.get("sessions", 0),
            ),
            _section(
                "hostnames", "Hostnames", (*HOSTNAMES[:4], since, *HOSTNAMES[4:], *renew),
                hostnames, no_agent, total=totals.get("hostnames", 0),
            ),
            *_own(document.get("certificates") or (), renew),
            *_members(document.get("cluster") or {}),
            _section("visits", "Last visits", VISITS, visits[:MOST_VISITS], "No visit yet."),
            _section(
                "blocks", "Blocked addresses", (*BLOCKS, *unblock), blocks,
                "No address is blocked.",
                form=_BLOCK_FORM.format(_csrf(csrf)) if csrf else "",
            ),
        ]  # fmt: skip
    note = f"Without JavaScript this page has no live updates; it reloads every {REFRESH} seconds"
    return "<noscript>\n" + "\n".join(sections) + f'\n<p class="note">{note}.</p></noscript>'


def _own(entries: Sequence[Document], renew: Sequence[_Column]) -> Iterable[str]:
    """The certificates of the gateway's own names."""
    if entries:
        name = _Column("hostname", "Hostname", lambda e: _text(e["hostname"], 253), "title")
        state = _Column("cert", "Certificate", lambda e: _certificate({"certificate": e}))
        title = "The gateway's own certificates"
        yield _section("own", title, (name, state, *renew), entries, "")


def _members(cluster: Document) -> Iterable[str]:
    """The gateways that are one; nothing if this one is alone."""
    if cluster:
        rows = list(cluster.get("members") or ())
        yield _section("members", "Gateways", MEMBERS, rows, "No gateway is known yet.")


def _in_path(text: object) -> str:
    return quote(str(text), safe="", errors="replace")


def _act(label: str, path: Callable[[Document], str], csrf: str) -> tuple[_Column, ...]:
    """The column with a button for each row; none for a caller that may not act."""
    if not csrf:
        return ()
    field = _csrf(csrf)

    def cell(entry: Document) -> str:
        button = f'<button class="button small">{label}</button>'
        return f'<form method="post" action="{escape(path(entry))}">{field}{button}</form>'

    return (_Column("act", "Action", cell, "act"),)


def _totals(totals: Document) -> str:
    share = totals.get("failed", 0) / totals["visits"] * 100 if totals.get("visits") else 0
    told = (
        ("Visits a second", _rate(totals.get("visits_per_second"))),
        ("Under way", _number(totals.get("running"))),
        ("Visits", _number(totals.get("visits"))),
        ("Failed", f'<span title="{share:.2g} % of all">{_number(totals.get("failed"))}</span>'),
        ("Received", size(totals.get("received_bytes"))),
        ("Sent", size(totals.get("sent_bytes"))),
    )
    parts = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in told)
    parts = parts.replace("<div>", '<div class="rate">', 1)
    return f'<dl class="totals">{parts}</dl>'


def _ago(entry: Document, now: object) -> str:
    at = entry.get("connected_at", entry.get("since"))
    if not isinstance(at, (int, float)) or not isinstance(now, (int, float)):
        return _text(at)
    return f'<span title="{_instant(at)}">{span(now - at)}</span>'


def _hostname(entry: Document) -> str:
    name, url = _text(entry["hostname"], 253), str(entry.get("url") or "")
    if re.fullmatch(r"https?://\S+", url):
        name = f'<a href="{escape(url)}" rel="noopener noreferrer">{name}</a>'
    port = entry.get("port")
    return f'{name} <small class="quiet">port {int(port)}</small>' if port else name


def _mode(entry: Document) -> str:
    mode, protocol = entry.get("mode"), entry.get("protocol")
    return _text(f"{mode}, {protocol}" if protocol and protocol != mode else mode, 30)


def _target(entry: Document) -> str:
    target = _text(entry.get("target"))
    if entry.get("health") != "failed":
        return target
    reason = _text(entry.get("health_reason"), 200)
    return f'{target} <span class="bad" title="{reason}">not well: {reason}</span>'


def _failed(entry: Document) -> str:
    count = _number(entry.get("failed"))
    return f'<span class="bad">{count}</span>' if entry.get("failed") else count


def _names(session: Document, names: Sequence[str]) -> str:
    """The ``names`` of a session's hostnames. The list that they come from may be cut short."""
    count = session.get("hostnames")
    count = count if isinstance(count, int) else len(names)
    if not names:
        awaited = session.get("waits_for")
        if isinstance(awaited, list) and awaited:
            return f'<span class="warn">waits for {", ".join(map(_text, awaited))}</span>'
        return f"{count:,}"
    if len(names) <= 2:
        return ", ".join(map(_text, names))
    lines = "".join(f"<li>{_text(name)}" for name in names)
    summary = f"{_text(names[0])} and {count - 1:,} more"
    return f'<details><summary>{summary}</summary><ul class="names">{lines}</ul></details>'


def _certificate(entry: Document) -> str:
    given = entry.get("certificate")
    if not given:
        return "<span>\u2013</span>"
    state, days = given.get("state"), given.get("days_left")
    kind = {"ready": "ok", "waiting": "warn", "failed": "bad"}.get(state, "")
    if days is not None and days < SOON:
        kind = "warn" if days >= 3 and kind != "bad" else "bad"
    words = visible(state)
    if days is not None:
        words += f" \u00b7 {days:,.0f} day{'' if days == 1 else 's'}"
    html = f'<span class="{kind}" data-label="Certificate">{escape(words)}</span>'
    summary, text = given.get("error_summary"), given.get("error_text")
    if summary or text:
        full = "\n".join(map(visible, str(text or summary).splitlines()))
        next_at = _instant(given.get("next_order_at"))
        more = f'<p class="quiet">Next attempt {next_at}</p>' if next_at else ""
        html += (
            f'<details class="fault"><summary>{_text(summary or text, 200)}</summary>'
            f"<p>{escape(clip(full, MOST_ERROR))}</p>{more}</details>"
        )
    return html


def _status(entry: Document) -> str:
    status = entry.get("status") or 0
    kind = "bad strong" if status >= 500 else "warn" if status >= 400 else ""
    return f'<span class="{kind}">{int(status) or "–"}</span>'


def _error(entry: Document) -> str:
    error = entry.get("error")
    return f'<span class="bad">{_text(error)}</span>' if error else ""


def _time(entry: Document) -> str:
    told = _instant(entry.get("at"))
    return f'<span title="{escape(told)}">{escape(told[11:19] or told)}</span>'


def _place(session: Document) -> str:
    """The agent's address, and with PROCESSES which of them has the session."""
    process = session.get("process")
    address = str(session.get("address"))
    return _text(f"{address} (process {process})" if isinstance(process, int) else address)


SESSIONS = (
    _Column("agent", "Agent", lambda e: _text(e.get("agent")), "title"),
    _Column("address", "Address", _place),
    _Column("trip", "Round trip", lambda e: lasting(e.get("round_trip_ms")), "number"),
    _Column("streams", "Streams", lambda e: _number(e.get("streams")), "number"),
    _Column("visits", "Under way", lambda e: _number(e.get("visits")), "number"),
)


def _member(pool: Any) -> str:
    """How an agent stands in a pool; "" if it is in none."""
    if not isinstance(pool, dict):
        return ""
    standing = f"{_text(pool.get('state'))}, {_number(pool.get('visits'))} now"
    return f' <small class="quiet">{standing}</small>'


HOSTNAMES = (
    _Column("hostname", "Hostname", _hostname, "title"),
    _Column("mode", "Mode", _mode),
    _Column("target", "Target", _target),
    _Column("agent", "Agent", lambda e: _text(e.get("agent")) + _member(e.get("pool"))),
    _Column("rate", "Visits/s", lambda e: f"<span>{_rate(e.get('visits_per_second'))}</span>"),
    _Column("visits", "Visits", lambda e: _number(e.get("visits")), "number"),
    _Column("failed", "Failed", _failed, "number"),
    _Column("received", "Received", lambda e: size(e.get("received_bytes")), "number"),
    _Column("sent", "Sent", lambda e: size(e.get("sent_bytes")), "number"),
    _Column("cert", "Certificate", _certificate),
)
VISITS = (
    _Column("time", "Time (UTC)", _time),
    _Column("status", "Status", _status),
    _Column("method", "Method", lambda e: _text(e.get("method") or e.get("protocol"), 20)),
    _Column("hostname", "Hostname", lambda e: _text(e.get("hostname"))),
    _Column("path", "Path", lambda e: f'<span class="code">{_text(e.get("path"), 160)}</span>'),
    _Column("error", "Error", _error),
    _Column("duration", "Duration", lambda e: lasting(e.get("duration_ms")), "number"),
    _Column("sent", "Sent", lambda e: size(e.get("sent")), "number"),
    _Column("visitor", "Visitor", lambda e: _text(e.get("visitor"))),
)
MEMBERS = (
    _Column("id", "Gateway", lambda e: _text(e.get("id")), "title"),
    _Column("host", "Machine", lambda e: _text(e.get("host"))),
    _Column("address", "Address", lambda e: _text(e.get("address"))),
    _Column("version", "Version", lambda e: _text(e.get("version"))),
    _Column("since", "Since", lambda e: escape(_instant(e.get("started_at")))),
    _Column("state", "State", lambda e: "stopping" if e.get("leaving") else "serving"),
)
BLOCKS = (
    _Column("address", "Address", lambda e: _text(e.get("address")), "title"),
    _Column("until", "Until", lambda e: escape(_instant(e.get("until"))) or "for ever"),
    _Column("reason", "Reason", lambda e: _text(e.get("reason"), 200)),
    _Column("by", "By", lambda e: _text(e.get("by"))),
)


# The login form


_LOGIN = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Log in \u00b7 {host} \u00b7 gotunnel</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
<h1>{host}</h1>
<p class="quiet">The dashboard of this gateway</p>
<form method="post" action="login">
{problem}
<input class="unseen" type="text" name="username" value="dashboard" autocomplete="username"
 tabindex="-1" aria-hidden="true" readonly>
<label for="password">Password</label>
<input type="password" id="password" name="password" required autofocus
 autocomplete="current-password"{described}>
<button class="button strong">Log in</button>
</form>
</main>
</body>
</html>
"""
_LOGIN_STYLE = """
  main { max-width: 22rem; margin: 0 auto; padding: 16vh 1.25rem 3rem; overflow-wrap: anywhere }
  form { display: grid; gap: .4rem; margin-top: 1.75rem; padding: 1.25rem; background: var(--panel);
    border: 1px solid var(--line); border-radius: 12px }
  main .button, main input[type=password] { width: 100%; min-height: 2.5rem; font-size: 1rem }
  main .button { margin-top: .6rem }
  main label { font-weight: 600 }
  main .fault { margin: 0 0 .6rem; color: var(--bad) }
"""
_STYLE = re.findall(r"<style>(.*?)</style>", _SOURCE, re.DOTALL)[0] + _LOGIN_STYLE
_LOGIN_HASH = content_policy.hashes("style", f"<style>{_STYLE}</style>".encode())
LOGIN_POLICY = (
    f"default-src 'none'; style-src {_LOGIN_HASH}; img-src data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def login(host: str, problem: str = "", status: int = 200) -> Page:
    """The login form. ``problem``: why the last attempt was refused; "" at the first."""
    told = f'<p class="fault" id="problem" role="alert">{escape(problem)}</p>' if problem else ""
    html = _LOGIN.format(
        host=escape(visible(host)),
        style=_STYLE,
        problem=told,
        described=' aria-describedby="problem" aria-invalid="true"' if problem else "",
    )
    return Page(status, html.encode(), fields=(("Content-Security-Policy", LOGIN_POLICY),))
