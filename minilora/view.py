"""A conversation as its tokens, by kind and by whether they carry loss: the mask, to be looked at.

    color_tokens(example, tokenizer)       the text in colours, trained stretches underlined
    list_tokens(example, tokenizer)        one token a line: place, id, kind, trained, text
    html_page(examples, tokenizer, …)      all of it in one file for a browser

The page loads nothing and has no script; its policy forbids both, so that a text which found a way
around the escaping would still be inert. Boxes ticked or not are read by the style sheet alone.
"""

import html
from collections.abc import Iterator, Sequence

from minilora.chat import Kind
from minilora.data import IGNORED, Example, column
from minilora.jsontext import dump_json
from minilora.report import visible
from minilora.tokenizer import Tokenizer

MOST = 100_000  # tokens in a page; a browser is still quick with them

# A colour for each kind: of a terminal, of a light page, of a dark one. Grey is only ever read.
COLORS = {Kind.PROMPT: ("90", "#6b7280", "#9ca3af"), Kind.THINK: ("35", "#8b3fd1", "#c99bf5"),
          Kind.TOOL_CALL: ("36", "#0b7285", "#5cc8dc"), Kind.TOOL_RESPONSE: ("33", "#a65a00",
          "#e9a94f"), Kind.ANSWER: ("32", "#2b7a0b", "#86c96a"), Kind.END: ("31", "#c02647",
          "#f58a9c")}


def _runs(example: Example) -> Iterator[tuple[int, int, Kind, bool]]:
    """Stretches of one kind that carry loss or do not: (start, end, kind, trained)."""
    marks = [*zip(example.kinds.tolist(), (example.labels != IGNORED).tolist(), strict=True), None]
    start = 0
    for at in range(1, len(marks)):
        if marks[at] != marks[start]:
            yield start, at, Kind(marks[start][0]), marks[start][1]
            start = at


def _characters(ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[tuple[int, int, str]]:
    """(start, end, text) of each token, or of those neighbours that share a character."""
    start = 0
    for end in range(1, len(ids) + 1):
        token = list(ids[start:end])
        text = tokenizer.decode(token)
        # An unfinished character is decoded to U+FFFD, and so is U+FFFD itself.
        if end == len(ids) or text[-1:] != "\ufffd" or tokenizer.encode(text) == token:
            yield start, end, text
            start = end


def heading(example: Example) -> str:
    """Where an example is from, and how much of it there is."""
    part = f", part {example.part + 1}" if example.part else ""
    cut = f"; {example.cut} trained tokens did not fit" if example.cut else ""
    return f"{example.source}{part}: {len(example)} tokens{cut}"


# --- in a terminal --------------------------------------------------------------------------------

def color_tokens(example: Example, tokenizer: Tokenizer, color: bool = True) -> str:
    """A conversation as its tokens: coloured by kind, and underlined where they carry loss.

    Without colour, what carries loss stands between ⟦ and ⟧.
    """
    text = []
    for start, end, kind, trained in _runs(example):
        span = visible(tokenizer.decode(example.ids[start:end].tolist()))
        if color:
            code = COLORS[kind][0] + (";4" if trained else "")
            # A newline ends a line's colours in many pagers, so each line gets its own.
            span = "\n".join(f"\033[{code}m{line}\033[0m" if line else ""
                             for line in span.split("\n"))
        elif trained:
            span = f"⟦{span}⟧"
        text.append(span)
    return "".join(text)


def color_legend(color: bool = True) -> str:
    """What the colours of `color_tokens` mean."""
    if not color:
        return "⟦ ⟧ carries loss"
    names = (f"\033[{code}m{kind.name.lower()}\033[0m" for kind, (code, *_) in COLORS.items())
    return " · ".join(names) + " · \033[4munderlined\033[0m carries loss"


def list_tokens(example: Example, tokenizer: Tokenizer) -> str:
    """One token a line: its place from 0, id, kind, * where it carries loss, and text in quotes.

    A token that is part of a character stands with a piece of it, which no text shows: as �.
    """
    lines = ["   at      id  kind           *  text"]
    for start, end, kind, trained in _runs(example):
        for at in range(start, end):
            id, mark = int(example.ids[at]), "*" if trained else " "
            text = visible(dump_json(tokenizer.decode([id])))
            lines.append(f"{at:5} {id:7}  {kind.name.lower():13}  {mark}  {text}")
    return "\n".join(lines)


# --- in a browser ---------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --page: #fdfdfb; --card: #fff; --ink: #1f2328; --line: #dfe1e5; }
@media (prefers-color-scheme: dark) {
  :root { --page: #131417; --card: #1a1c20; --ink: #e4e6ea; --line: #33363d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.5rem 5rem; max-width: 70rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.4rem; }
h2 { margin: 0; font-size: 1rem; overflow-wrap: anywhere; }
p { margin: .2rem 0; opacity: .75; }
form { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: .4rem; padding: .8rem 0;
  margin-bottom: .6rem; background: var(--page); border-bottom: 1px solid var(--line); }
label { padding: .2rem .6rem; border: 1px solid var(--line); border-radius: 1rem; cursor: pointer;
  font-size: .85rem; color: var(--color); }
label:has(input:not(:checked)) { opacity: .5; }
label small { color: var(--ink); opacity: .7; margin-left: .3rem; }
input { margin: 0 .4rem 0 0; vertical-align: -1px; accent-color: var(--color); }
section { margin: 1rem 0; padding: .8rem 1rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .5rem; }
section p { font-size: .85rem; }
pre { margin: .6rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  font: 13px/1.9 ui-monospace, Menlo, Consolas, monospace; }
pre span { color: var(--color); padding: .15em 0; }
pre i { font-style: normal; padding: .15em 0;
  background: color-mix(in srgb, var(--color) 6%, transparent); }
pre i:nth-child(even) { background: color-mix(in srgb, var(--color) 13%, transparent); }
pre .trained i { background: color-mix(in srgb, var(--color) 12%, transparent); }
pre .trained i:nth-child(even) { background: color-mix(in srgb, var(--color) 24%, transparent); }
.trained { text-decoration: underline 2px; text-underline-offset: 4px; }
pre u { opacity: .4; text-decoration: none; user-select: none; }
pre i:hover { outline: 2px solid var(--color); border-radius: 2px; }
pre i:hover::after { content: attr(data-token); position: fixed; inset: auto 0 0 0; z-index: 1;
  padding: .6rem 1.5rem; background: var(--ink); color: var(--page); white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 30vh; overflow: hidden; }
"""

PAGE = """<!DOCTYPE html>
<html lang="en" dir="ltr">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>%title%</title>
<style>%style%</style>
</head>
<body>
<h1>%title%</h1>
<p>%about%</p>
<form>%boxes%</form>
%rows%
</body>
</html>
"""


def html_page(examples: Sequence[Example], tokenizer: Tokenizer, title: str, about: str) -> str:
    """A page with each example's tokens, and a bar of boxes that show and hide kinds.

    A token is shaded apart from its neighbours; the pointer on it brings up its place, id, text,
    kind and whether it carries loss.
    """
    values = {"style": _style(), "title": _escape(title), "about": _escape(about),
              "boxes": _boxes(*column(examples, "counts").sum(0).tolist()),
              "rows": "\n".join(_section(example, tokenizer) for example in examples)}
    parts = PAGE.split("%")  # every second one is a name; what is filled in is not read again
    return "".join(values[part] if at % 2 else part for at, part in enumerate(parts))


def _escape(text: str) -> str:
    return html.escape(visible(text))


def _share(tokens: int, trained: int) -> str:
    return f"{trained:,} trained" if trained == tokens else (
        f"{tokens:,}" + (f", {trained:,} trained" if trained else ""))


def _style() -> str:
    """The style sheet, with a colour for each kind and a rule for each box."""
    rules, boxes = [STYLE], {"trained": ".trained", "read": "span:not(.trained)"}
    for kind, (_, light, dark) in COLORS.items():
        name = kind.name.lower()
        boxes[name] = f".{name}"
        rules.append(f".{name} {{ --color: light-dark({light}, {dark}); }}")
    for box, spans in boxes.items():
        hidden = f":root:has(#show-{box}:not(:checked)) pre {spans}"
        rules.append(f'{hidden} i {{ display: none; }}\n{hidden}::after {{ content: "⋯\\a"; }}')
    return "\n".join(rules)


def _boxes(tokens: list[int], trained: list[int]) -> str:
    """A box for each kind, and two for what carries loss and what does not."""
    boxes = []
    for kind in COLORS:
        name = kind.name.lower()
        share = _share(tokens[kind], trained[kind]) if tokens[kind] else 0
        boxes.append((name, name, f"<b>{name}</b> <small>{share}</small>"))
    loss, read = sum(trained), sum(tokens) - sum(trained)
    boxes += [("trained", "", f'<b class="trained">carries loss</b> <small>{loss:,}</small>'),
              ("read", "", f"<b>only read</b> <small>{read:,}</small>")]
    return "\n".join(f'<label class="{css}"><input type="checkbox" id="show-{name}" checked>{text}'
                     "</label>" for name, css, text in boxes)


def _section(example: Example, tokenizer: Tokenizer) -> str:
    tokens, trained = example.counts.tolist()
    shares = [f"{kind.name.lower()} {_share(tokens[kind], trained[kind])}"
              for kind in COLORS if tokens[kind]]
    spans = []
    for start, end, kind, loss in _runs(example):
        name, ids, marked = kind.name.lower(), example.ids[start:end].tolist(), []
        for first, after, text in _characters(ids, tokenizer):
            places = f"{start + first}" + (f" to {start + after - 1}" if after - first > 1 else "")
            told = " · ".join([f"token {places}", "id " + " ".join(map(str, ids[first:after])),
                               dump_json(text), name, "carries loss" if loss else "only read"])
            shown = _escape(text).replace("\n", "<u>↵</u>\n")
            marked.append(f'<i data-token="{_escape(told)}">{shown}</i>')
        css = f"{name} trained" if loss else name
        spans.append(f'<span class="{css}">{"".join(marked)}</span>')
    return (f"<section><h2>{_escape(heading(example))}</h2>\n<p>{' · '.join(shares)}</p>\n"
            f"<pre>{''.join(spans)}</pre></section>")
