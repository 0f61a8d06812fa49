"""Draws a ladder as a page: one HTML file without scripts and without anything from elsewhere."""

from html import escape

from trace_ladder import KINDS, LANES, header_fields

TITLES = {
    "http": "a GET in http mode",
    "upload": "an upload in http mode",
    "tcp": "lines both ways in tcp mode",
    "websocket": "a WebSocket",
}

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --text: #1f2328; --faint: #59636e; --line: #c4ccd4; --box: #f4f6f8;
  --link: #59636e; --bytes: #0a6c92; --open: #1a7f37; --message: #8250df; --payload: #0550ae;
  --credit: #8a5a00; --probe: #0f766e; --end: #c4212b;
  --lane: 76px; --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #0d1117; --text: #e6edf3; --faint: #9aa7b4; --line: #3a434d; --box: #161c24;
    --link: #9aa7b4; --bytes: #56c5e8; --open: #56d364; --message: #d2a8ff; --payload: #79b8ff;
    --credit: #e3b341; --probe: #4fd1c5; --end: #ff8a80;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 20px 60px; max-width: 1160px; background: var(--ground);
  color: var(--text); font: 15px/1.45 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 8px; }
p { max-width: 760px; margin: 0 0 12px; }
code, pre, .hex, time { font-family: var(--mono); font-size: 13px; }
.legend { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr));
  gap: 2px 24px; margin: 0 0 20px; padding: 0; list-style: none; font-size: 14px; }
.legend li { display: flex; align-items: center; gap: 10px; }
.legend .way { flex: none; width: 44px; top: 0; position: relative; }
.names, .row { display: grid; column-gap: 40px;
  grid-template-columns: 68px calc(3 * var(--lane) + 2px) minmax(0, 1fr); }
.names { position: sticky; top: 0; z-index: 1; background: var(--ground); font-weight: 600;
  border-bottom: 1px solid var(--line); padding: 8px 0 6px; }
.names div { position: relative; height: 1.4em; }
.names span { position: absolute; left: calc(var(--at) * var(--lane) + 1px);
  transform: translateX(-50%); }
.names > span { position: static; transform: none; justify-self: end; color: var(--faint);
  font-weight: 400; }
time { justify-self: end; padding-top: 9px; color: var(--faint); }
.lanes { position: relative; background: repeating-linear-gradient(to right, var(--line) 0 2px,
  transparent 2px var(--lane)); }
.way { position: absolute; top: 18px; height: 0; border-top: 2px solid var(--kind);
  left: calc(var(--from) * var(--lane) + 2px); width: calc(var(--lane) - 2px); }
.way::after { content: ""; position: absolute; top: -6px; border: 5px solid transparent; }
.right::after { right: -1px; border-left: 9px solid var(--kind); border-right: 0; }
.left::after { left: -1px; border-right: 9px solid var(--kind); border-left: 0; }
.dot { border: 0; width: 10px; height: 10px; border-radius: 5px; background: var(--kind); top: 13px;
  left: calc(var(--from) * var(--lane) - 4px); }
.dot::after { border: 0; }
.link .way { border-top-style: dotted; }
.bytes .way { border-top-width: 4px; margin-top: -1px; border-top-style: double; }
.bytes .way::after { top: -7px; }
.words { padding: 6px 0 10px; min-width: 0; overflow-wrap: anywhere; }
.title { font-weight: 600; }
.link .title { font-weight: 400; }
.title::before { content: ""; display: inline-block; width: 9px; height: 9px; border-radius: 2px;
  background: var(--kind); margin-right: 8px; }
.hex { margin: 5px 0 0; }
.fields { display: flex; flex-wrap: wrap; gap: 4px 6px; }
.fields span { border: 1px solid var(--line); border-left: 3px solid var(--kind);
  border-radius: 3px; padding: 1px 7px 2px; background: var(--box); }
.fields small, .payload small { display: block; color: var(--faint); font: 12px/1.3 system-ui,
  "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.payload { padding-left: 10px; border-left: 3px solid var(--line); }
pre { margin: 6px 0 0; padding: 7px 10px; background: var(--box); border-radius: 4px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.remark { margin: 4px 0 0; color: var(--faint); font-size: 13px; }
.windows { display: grid; grid-template-columns: max-content minmax(40px, 200px) max-content;
  gap: 1px 10px; align-items: center; margin-top: 6px; color: var(--faint); font-size: 13px; }
.windows > p { grid-column: 1 / -1; margin: 0; }
.bar { height: 8px; border: 1px solid var(--faint); border-radius: 2px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--faint); }
.link { --kind: var(--link); } .bytes { --kind: var(--bytes); } .open { --kind: var(--open); }
.message { --kind: var(--message); } .payload-row { --kind: var(--payload); }
.credit { --kind: var(--credit); } .probe { --kind: var(--probe); } .end { --kind: var(--end); }
@media (max-width: 760px) {
  :root { --lane: 26px; }
  body { padding: 16px 12px 40px; font-size: 14px; }
  h1 { font-size: 20px; }
  code, pre, .hex, time { font-size: 12px; }
  .names, .row { grid-template-columns: calc(3 * var(--lane) + 2px) minmax(0, 1fr);
    column-gap: 16px; padding-left: 6px; }
  .names div { height: 62px; }
  .names span { writing-mode: vertical-rl; transform: translateX(-50%) rotate(180deg); bottom: 0; }
  .names > span { writing-mode: horizontal-tb; transform: none; align-self: end;
    justify-self: start; order: 2; }
  .row time { grid-column: 2; grid-row: 1; justify-self: start; padding-top: 8px; }
  .row .lanes { grid-column: 1; grid-row: 1 / span 2; }
  .row .words { grid-column: 2; grid-row: 2; padding-top: 0; }
  .way { top: 17px; } .dot { top: 12px; }
  .way::after { border-width: 4px; top: -5px; }
  .right::after { border-left-width: 7px; } .left::after { border-right-width: 7px; }
  .bytes .way::after { top: -6px; }
}
"""

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<title>gotunnel: {title}</title>
<style>{style}</style>
</head>
<body>
<h1>One visit through gotunnel: {title}</h1>
<p>Time runs down the page. An arrow goes from its sender to its receiver. The number on its left is
the time, in milliseconds since the agent dialled. Between gateway and agent each arrow is one frame
of yamux, as it is inside TLS. Its header of 12 bytes is shown in hex, field by field. The first
bytes of its payload follow. The two bars are the windows of the frame&#8217;s stream after it: how
many bytes each side may still send before it must wait for credit. DATA takes from its
sender&#8217;s window, credit adds to its receiver&#8217;s.</p>
<ul class="legend">
{legend}
</ul>
<div class="names"><span>ms</span><div>{names}</div></div>
{rows}
</body>
</html>
"""


def page(kind, rows) -> str:
    return PAGE.format(
        title=TITLES[kind],
        style=STYLE,
        legend="\n".join(
            f'<li class="{css(name)}"><span class="way right" style="--from:0"></span>'
            f"<span>{escape(words)}</span></li>"
            for name, words in KINDS.items()
        ),
        names="".join(f'<span style="--at:{at}">{name}</span>' for at, name in enumerate(LANES)),
        rows="\n".join(map(_row, rows)),
    )


def css(kind):
    """The class of a kind of rows. "payload" is that of the first bytes of one."""
    return "payload-row" if kind == "payload" else kind


def _row(row):
    start, end = LANES.index(row.source), LANES.index(row.sink)
    way = "dot" if start == end else "right" if start < end else "left"
    until = f"; until {row.until * 1000:.2f} ms" if row.until > row.at else ""
    return (
        f'<div class="row {css(row.kind)}"><time>{row.at * 1000:.2f}</time>'
        f'<div class="lanes"><span class="way {way}" style="--from:{min(start, end)}"></span></div>'
        f'<div class="words"><div class="title">{escape(row.title + until)}</div>'
        f"{_hex(row)}{_lines(row)}{_windows(row)}</div></div>"
    )


def _hex(row):
    parts = []
    if row.header is not None:
        fields = (
            f"<span>{code}<small>{escape(words)}</small></span>"
            for code, words in header_fields(row.header)
        )
        parts.append(f'<div class="hex fields">{"".join(fields)}</div>')
    for code, words in row.hex:
        parts.append(f'<div class="hex payload">{escape(code)}<small>{escape(words)}</small></div>')
    return "".join(parts)


def _lines(row):
    """What was sent, and remarks on it, which stand in parentheses."""
    remarks = [line for line in row.lines if line.startswith("(")]
    sent = "\n".join(line for line in row.lines if line not in remarks)
    parts = [f'<p class="remark">{escape(remark)}</p>' for remark in remarks]
    return "".join([*parts, f"<pre>{escape(sent)}</pre>" if sent else ""])


def _windows(row):
    if row.windows is None:
        return ""
    widest = max(row.full.values())
    bars = "".join(
        f'<span>{side} may send</span><span class="bar">'
        f'<i style="width:{100 * row.windows[side] / widest:.1f}%"></i></span>'
        f"<span>{row.windows[side]}</span>"
        for side in ("gateway", "agent")
    )
    return f'<div class="windows"><p>windows of stream {row.stream_id}, in bytes</p>{bars}</div>'
