"""Tokens by kind: in a terminal, one a line, and as a page that a hostile text cannot break."""

import json
import re
from html.parser import HTMLParser

import pytest
from conftest import LAW, TOOL, make_example
from hypothesis import given
from hypothesis import strategies as st

from minilora import __main__ as program
from minilora.chat import Conversation, Kind, Message, ToolCall
from minilora.config import UserError
from minilora.data import IGNORED, Example
from minilora.jsontext import dump_json
from minilora.report import visible
from minilora.view import color_legend, color_tokens, html_page, list_tokens


def an_example(tokenizer, user: str = "find Paris", answer: str = "42.") -> Example:
    call = ToolCall("find_book", {"title": "Paris"})
    return make_example(Conversation((
        Message("user", user), Message("assistant", thinking="a book", tool_calls=(call,)),
        Message("tool", "42"), Message("assistant", answer)), (TOOL,), "calls.jsonl:1 (row 1)"),
        tokenizer)


# --- in a terminal --------------------------------------------------------------------------------

def test_tokens_by_kind(tokenizer):
    example = an_example(tokenizer)
    plain = color_tokens(example, tokenizer, color=False)
    assert plain.replace("⟦", "").replace("⟧", "") == tokenizer.decode(example.ids.tolist())
    assert '⟦<tool_call>\n{"name": "find_book", "arguments": {"title": "Paris"}}\n' in plain
    assert "⟦42.⟧⟦<end_of_turn>⟧" in plain and "⟦<tool_response>" not in plain
    colored = color_tokens(example, tokenizer)
    assert "\033[36;4m<tool_call>\033[0m" in colored and "\033[33m42\033[0m" in colored
    for kind in Kind:
        assert kind.name.lower() in color_legend()


def test_a_text_cannot_act_on_the_terminal(tokenizer):
    example = an_example(tokenizer, "\x1b[2J\r\u202e\x7f.", "\x9b1m\x07.")
    for text in (color_tokens(example, tokenizer, color=False), list_tokens(example, tokenizer)):
        assert all(char.isprintable() or char == "\n" for char in text)
    assert "\\x1b[2J\\r\\u202e" in color_tokens(example, tokenizer)


def test_one_token_a_line(tokenizer):
    example = an_example(tokenizer, "π\n")
    lines = list_tokens(example, tokenizer).splitlines()[1:]
    assert len(lines) == len(example)
    for at, (line, i, kind, label) in enumerate(zip(
            lines, example.ids.tolist(), example.kinds.tolist(), example.labels.tolist(),
            strict=True)):
        found = re.fullmatch(r" *(\d+) +(\d+)  (\w+) +(\*?) +(\".*\")", line)
        assert [int(found[1]), int(found[2])] == [at, i]
        assert found[3] == Kind(kind).name.lower() and bool(found[4]) == (label != IGNORED)
        assert found[5] == visible(dump_json(tokenizer.decode([i])))


# --- in a browser ---------------------------------------------------------------------------------

class Page(HTMLParser):
    """What a browser makes of a page: its elements, their attributes, the text in each <pre>."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.tokens, self.rows, self.spans, self.inside = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside.append(tag)
        assert len(dict(attributes)) == len(attributes)
        values = dict(attributes)
        assert not [name for name in values if name.startswith("on") or name in ("src", "href")]
        if tag == "pre":
            self.rows.append("")
        if tag == "span":
            self.spans.append(values["class"].split())
        if tag == "i":
            self.tokens.append((values["data-token"], self.spans[-1]))
        if tag in ("meta", "input"):
            self.inside.pop()

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag

    def handle_data(self, text):
        if "pre" in self.inside and "u" not in self.inside:
            self.rows[-1] += text


KNOWN = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "form", "label",
         "input", "b", "small", "section", "pre", "span", "i", "u"}
HOSTILE = ["<script>alert(1)</script>", "</pre></section><img src=x onerror=alert(1)>",
           "\" onmouseover=\"alert(1)", "</style><!-- ", "%rows%%style%", "&amp;&#x3c;b&gt;",
           "\" ' & < > ]]>",
           "\u202e\x1b[31m\x00", "javascript:alert(1)"]


def check_page(text: str, examples: list[Example], tokenizer) -> None:
    page = Page(text)
    assert set(page.tags) <= KNOWN and not page.inside
    assert page.rows == [visible(tokenizer.decode(example.ids.tolist())) for example in examples]
    told = iter(page.tokens)
    for example in examples:
        at = 0
        while at < len(example):  # neighbours that share a character share an element
            title, classes = next(told)
            place, ids, *_ = title.split(" · ")
            ids = [int(word) for word in ids.removeprefix("id ").split()]
            assert place == f"token {at}" + (f" to {at + len(ids) - 1}" if len(ids) > 1 else "")
            assert example.ids[at:at + len(ids)].tolist() == ids
            kind, trained = Kind(int(example.kinds[at])).name.lower(), example.labels[at] != IGNORED
            assert title.endswith(f" · {kind} · " + ("carries loss" if trained else "only read"))
            assert visible(dump_json(tokenizer.decode(ids))) in title
            assert classes == [kind, "trained"] if trained else classes == [kind]
            at += len(ids)
    assert next(told, None) is None


def test_a_page_holds_every_token_with_what_is_known_of_it(tokenizer):
    examples = [an_example(tokenizer), an_example(tokenizer, "π 𐀀\n\tb", "Ja, Ω.")]
    text = html_page(examples, tokenizer, "calls.jsonl", "two rows")
    check_page(text, examples, tokenizer)
    assert text.startswith("<!DOCTYPE html>")
    assert text.count(f"calls.jsonl:1 (row 1): {len(examples[0])} tokens") == 1
    for kind in Kind:
        total = sum(int((example.kinds == kind).sum()) for example in examples)
        trained = sum(int((example.labels != IGNORED)[example.kinds == kind].sum())
                      for example in examples)
        said = f"{trained} trained" if trained else f"{total}"
        name = kind.name.lower()
        assert f'id="show-{name}" checked><b>{name}</b> <small>{said}</small>' in text
        assert f".{name} {{ --color:" in text and f":root:has(#show-{name}:not(:checked))" in text


def test_a_page_loads_nothing_and_runs_nothing(tokenizer):
    text = html_page([an_example(tokenizer)], tokenizer, "t", "a")
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    assert not re.search(r"https?:|url\(|@import|<script|<link|<img|<iframe", text)


@pytest.mark.parametrize("evil", HOSTILE)
def test_a_hostile_text_is_shown_and_nothing_else(tokenizer, evil):
    call = ToolCall(evil, {evil: evil})
    example = make_example(Conversation((
        Message("system", evil), Message("user", evil),
        Message("assistant", evil, evil, (call,)), Message("tool", evil),
        Message("assistant", evil)), ({"type": "function", "function": {"name": evil}},),
        f"{evil}.jsonl:1"), tokenizer)
    text = html_page([example], tokenizer, evil, evil)
    check_page(text, [example], tokenizer)
    assert visible(text) == text


@LAW
@given(text=st.text(max_size=30) | st.lists(st.sampled_from(HOSTILE), max_size=3).map("".join))
def test_any_text_is_shown_as_it_is(tokenizer, text):
    example = an_example(tokenizer, f"x{text}", f"y{text}")
    check_page(html_page([example], tokenizer, "t", "a"), [example], tokenizer)


# --- the command ----------------------------------------------------------------------------------

@pytest.fixture
def show(tmp_path, monkeypatch, capsys):
    """`python -m minilora show` on five rows, the third of which is bad: (stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": [{"role": "user", "content": f"Hello {number}"},
                          {"role": "assistant", "content": f"Hi {number}"}]}
            for number in range(1, 6)]
    rows[2]["messages"][0]["role"] = "nobody"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*flags: str) -> tuple[str, str]:
        program.main(["show", "rows.jsonl", *flags])
        return capsys.readouterr()

    return run


def test_rows_are_chosen_by_number(show):
    def greeted(*flags):
        return re.findall(r"Hello (\d)", show(*flags)[0])

    assert greeted() == ["1"] and greeted("--row", "4") == ["4"]  # a bad row before it is no matter
    assert greeted("--row", "2-4") == ["2", "4"] and greeted("--row", "all") == list("1245")
    assert greeted("--row", "4-99") == ["4", "5"]
    assert "note: rows.jsonl:3 (row 3)" in show("--row", "2-4")[1]
    for row, told in [("3", r"rows.jsonl:3 \(row 3\): .*nobody"), ("6", "fewer rows"),
                      ("0", "--row is 0"), ("3-2", "give one row"), ("x", "give one row"),
                      ("2-", "give one row"), ("-2", "give one row"), ("²", "give one row")]:
        with pytest.raises(UserError, match=told):
            show(f"--row={row}")


def test_show_in_every_form(show, tmp_path):
    lines = [json.loads(line) for line in show("--row", "1-2", "--json")[0].splitlines()]
    assert [line["source"] for line in lines] == ["rows.jsonl:1 (row 1)", "rows.jsonl:2 (row 2)"]
    out, _ = show("--row", "2", "--tokens")
    assert f"rows.jsonl:2 (row 2): {len(lines[1]['ids'])} tokens" in out
    assert len(out.strip().splitlines()) == 2 + len(lines[1]["ids"])
    _, error = show("--html", "out/page.html")
    page = Page((tmp_path / "out/page.html").read_text())
    assert len(page.rows) == 4 and "out/page.html" in error and "note: rows.jsonl:3" in error
    with pytest.raises(UserError, match="ends in .html"):
        show("--html", "rows.jsonl")  # whose data it would have replaced


def test_a_page_is_not_too_much_for_a_browser(show, tmp_path, monkeypatch):
    size = len(json.loads(show("--json")[0])["ids"])
    for most, rows in ((2 * size, 2), (1, 1)):
        monkeypatch.setattr(program, "MOST", most)
        _, error = show("--html", "page.html", "--row", "all")
        assert len(Page((tmp_path / "page.html").read_text()).rows) == rows
        assert f"it ends before rows.jsonl:{(0, 2, 4)[rows]}" in error and "--row" in error
