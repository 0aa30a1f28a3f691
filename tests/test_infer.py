"""A chat at the screen, with a model that says what the test has written for it."""

import importlib.util
import io
import json
import re
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from conftest import load_tokenizer, tiny_model
from tiny_tokenizer import make_tokenizer_model

from minilora.chat import Message, ToolCall, render, stop_ids
from minilora.config import GenerateConfig, UserError
from minilora.dialects import DIALECTS
from minilora.generate import Held, stream
from minilora.model import Gemma
from minilora.readers import openai_row, read_conversations
from minilora.tokenizer import Tokenizer
from minilora.tools import load_tools, tool_schema

ROOT = Path(__file__).parents[1]
TOOLS = '''
def weather(city: str) -> str:
    """The weather of a city."""
    print("looking")
    return "rain in " + city


def fail() -> str:
    raise LookupError("no \\x1b[31m")
'''
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ur"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(make_tokenizer_model(tmp_path_factory.mktemp("tokenizer")), *DIALECTS)


def load_infer():
    spec = importlib.util.spec_from_file_location("infer", ROOT / "infer.py")
    infer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(infer)
    return infer


@pytest.fixture
def chat(tokenizer, tmp_path, monkeypatch, capsys):
    """Runs infer.py with lines of a person and replies of a model: (stdout, stderr, prompts)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_tools.py").write_text(TOOLS)

    def run(questions: list[str] | None, replies: list[str], *flags: str, context: int = 4000,
            dialect: str = "hermes"):
        infer = load_infer()
        said, prompts = iter(replies), []
        tags = "|".join(map(re.escape, DIALECTS[dialect].tokens))

        def stream(model, prompt, config, stops, barred=(), *_, **__):
            assert set(stops) == set(stop_ids(tokenizer, dialect))
            run.barred = [tokenizer.decode([i]) for i in barred]
            if len(prompt) >= context:
                raise UserError("too long")
            prompts.append(tokenizer.decode(prompt))
            text = next(said)
            if text == "!":
                raise UserError("broken")
            parts = re.split(f"({tags})", text.removesuffix("^C"))
            ids = [i for part in parts for i in (
                [tokenizer.token_id(part)] if re.fullmatch(tags, part) else tokenizer.encode(part))]
            yield from ids[:min(config.max_new, context - len(prompt))]
            if text.endswith("^C"):
                raise KeyboardInterrupt

        model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=context),
                                embed_tokens=SimpleNamespace(num_embeddings=tokenizer.vocab_size))
        def load(flags):
            run.folder = Path.cwd()
            return model, tokenizer, dialect

        monkeypatch.setattr(infer, "load", load)
        monkeypatch.setattr(infer, "stream", stream)
        if questions is not None:  # else they are read
            monkeypatch.setattr(infer, "lines", lambda *_: iter(questions))
        infer.main(["--tools", "my_tools.py", "--max-new", "100", *flags])
        return *capsys.readouterr(), prompts

    return run


def test_a_question_on_the_screen(chat):
    out, error, _ = chat(["Rain?"], ["<think>\nHm.\n</think>\nI look.\n" + CALL, "It rains."])
    assert out == ('Hm.\nI look.\n→ weather(city="Ur")\n← rain in Ur\nIt rains.\n')
    assert "looking" in error  # what a tool prints is not mixed with what the model says


def test_hidden_thinking_is_told_but_not_shown_and_stays_in_the_history(chat):
    replies = ["<think>\nsecret\n</think>\nYes.", "No."]
    out, _, prompts = chat(["One?", "Two?"], replies, "--think", "hidden")
    assert out == "(thinking, not shown)\nYes.\nNo.\n"
    assert "<think>\nsecret\n</think>\nYes." in prompts[1]  # as training renders it
    out, _, _ = chat(["One?"], replies, "--think", "hidden", "--json")
    assert "thinking" not in [json.loads(line)["event"] for line in out.splitlines()]


def test_a_model_that_must_not_think_cannot(chat):
    for think, barred in (("on", []), ("hidden", []), ("off", ["<think>"])):
        chat(["One?"], ["Yes."], "--think", think)
        assert chat.barred == barred


def test_barred_ids_are_never_drawn():
    """And the rest is drawn as it would be: greedily, the likeliest of what is left."""
    model, prompt = tiny_model(), [5, 300, 7]
    for config in (GenerateConfig(max_new=20), GenerateConfig(max_new=20, temperature=2.0)):
        free = list(stream(model, prompt, config, ()))
        barred = set(free)
        assert list(stream(model, prompt, config, (), ())) == free
        new = list(stream(model, prompt, config, (), barred))
        assert len(new) == 20 and not barred & set(new)
        if not config.temperature:
            logits = model(torch.tensor([prompt + new]))[0, len(prompt) - 1:-1]
            logits[:, list(barred)] = -torch.inf
            assert logits.argmax(-1).tolist() == new


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text"])
def test_a_chat_goes_on_from_what_has_been_read(kind, monkeypatch):
    """The replies are those of a model that reads all anew, past its window, too, whatever changes
    in what was said; and where nothing does, only what is new is read."""
    model, rng, held, fed = tiny_model(kind), Random(0), Held(), []
    read = Gemma.hidden_states
    monkeypatch.setattr(Gemma, "hidden_states", lambda self, ids, *rest: (
        fed.append(ids.shape[1]), read(self, ids, *rest))[1])
    config, prompt, rooms, sizes = GenerateConfig(max_new=9, temperature=0.8), [], set(), 0
    for turn in range(12):
        new = [rng.randrange(8, 500) for _ in range(rng.choice([1, 3, 30]))]
        kept = len(prompt)
        if turn == 9:  # it goes on from its latest turns
            kept, prompt = 0, prompt[-20:]
        elif turn % 4 == 2:  # the end was written otherwise
            kept = len(prompt) - 12
            prompt = prompt[:kept]
        prompt = prompt + new
        alone = list(stream(model, prompt, config, ()))
        if turn == 7:  # another question, interrupted in its answer and left out
            next(stream(model, prompt[:20] + new, config, (), held=held))
        fed.clear()
        written = list(stream(model, prompt, config, (), held=held))
        assert written == alone
        assert held.cache.length == len(held.ids) == len(prompt) + len(written) - 1
        rooms.add(held.cache.capacity)
        if len(rooms) == sizes and turn != 7 and (kind == "gemma" or turn % 4 != 2):
            assert fed[0] <= len(prompt) - kept + 1 or turn == 9
        sizes = len(rooms)
        prompt = prompt + written
    assert len(rooms) <= 4


def test_thinking_that_no_token_marks_cannot_be_hidden(chat):
    for think in ("hidden", "off"):
        with pytest.raises(UserError, match=f"--think {think}: the mistral dialect has no token"):
            chat([], [], "--think", think, dialect="mistral")


@pytest.mark.parametrize("evil", ["\x1b[2J", "\x9b31m", "a\rb", "\u202eabc", "\x07\x00\x7f\u2028"])
def test_nothing_that_a_terminal_would_obey_is_printed(chat, evil):
    replies = [f"<think>\n{evil}.\n</think>\n{evil}.\n" + CALL.replace(
        "Ur", json.dumps(evil)[1:-1]), CALL.replace("weather", "fail").replace(
        '"city": "Ur"', ""), f"Hm{evil}.\n"]
    out, error, _ = chat(["Rain?"], replies)
    raw, _, _ = chat(["Rain?"], replies, "--json")
    for shown in (out, error):
        assert all(char.isprintable() or char == "\n" for char in shown)
    last = json.loads(raw.rstrip("\n").split("\n")[-1])
    assert last["messages"][1]["content"] == f"{evil}."  # exact for programs
    assert last["messages"][2]["content"] == f"rain in {evil}"


def test_a_transcript_is_data(chat, tmp_path):
    """What is written reads as the conversation that was held, is rendered the same, and is data
    that can be written again."""
    replies = ["<think>\nHm. “ü”\n</think>\nI look.\n" + CALL + "\n" + CALL.replace("Ur", "Oz\\n{"),
               "It rains.", "<tool_call>\n{oops", CALL.replace("weather", "fail"), "",
               "Bye."]
    out, _, _ = chat(["Rain? 𐀀", "And now?", "Bye"], replies, "--transcript", "new/chat.jsonl",
                     "--system", "Be brief.", "--json")
    conversation, = read_conversations("new/chat.jsonl")
    functions = load_tools(tmp_path / "my_tools.py").values()
    call, other = ToolCall("weather", {"city": "Ur"}), ToolCall("weather", {"city": "Oz\n{"})
    assert conversation.tools == tuple(map(tool_schema, functions))
    roles = [message.role for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "tool", "tool", "assistant", "user",
                     "assistant", "tool", "assistant", "user", "assistant"]
    assert conversation.messages[2] == Message("assistant", "I look.", "Hm. “ü”", (call, other))
    assert conversation.messages[4] == Message("tool", "rain in Oz\n{", name="weather")
    assert conversation.messages[9] == Message("assistant", "[no answer]")
    row = json.loads((tmp_path / "new/chat.jsonl").read_text())
    assert row == openai_row(conversation)
    last = json.loads(out.splitlines()[-1])
    assert last == {"event": "end", **row}


def test_a_transcript_renders_as_the_last_prompt_did(chat, tokenizer):
    replies = ["<think>\nHm.\n</think>\n" + CALL, "It rains.", "Bye."]
    _, _, prompts = chat(["Rain?", "Bye"], replies, "--transcript", "chat.jsonl")
    conversation, = read_conversations("chat.jsonl")
    whole = tokenizer.decode(render(conversation, tokenizer).ids)
    assert whole == prompts[-1] + "Bye.<end_of_turn>\n"


def test_a_transcript_is_written_after_every_answer_and_over_nothing(chat, tmp_path):
    path = tmp_path / "chat.jsonl"
    seen = []
    questions = (seen.append(path.exists() and len(read_conversations(path)[0].messages)) or text
                 for text in ("One?", "Two?"))
    chat(questions, ["Yes.", "No."], "--transcript", "chat.jsonl")
    assert seen == [False, 2] and len(read_conversations(path)[0].messages) == 4
    with pytest.raises(UserError, match="chat.jsonl: is there already"):
        chat([], [], "--transcript", "chat.jsonl")


def test_a_chat_that_outgrows_the_context_keeps_tools_and_its_latest_turns(chat):
    questions = [f"Question number {number}?" for number in range(12)]
    flags = ("--system", "Be brief.", "--transcript", "chat.jsonl", "--max-new", "20")
    out, error, prompts = chat(questions, [f"Yes, {number}." for number in range(12)], *flags,
                               context=400)
    assert out.count("outgrown the model's 400 tokens") == 1 and not error  # though cut often
    assert "the system prompt and the tools are kept" in out
    assert all("Be brief." in prompt and '"name": "weather"' in prompt for prompt in prompts)
    assert "Question number 0?" not in prompts[-1] and "Yes, 10." in prompts[-1]
    assert prompts[-1].endswith("Question number 11?<end_of_turn>\n<start_of_turn>model\n")
    assert len(read_conversations("chat.jsonl")[0].messages) == 1 + 2 * 12  # all of it


def test_a_long_chat_is_not_read_anew_at_each_turn(tokenizer, monkeypatch, capsys):
    """By ids that go through the model: also once it has outgrown its context, and is cut."""
    infer, fed, caches, turns = load_infer(), [], [], 60
    model = tiny_model("gemma", vocab_size=tokenizer.vocab_size)
    read = Gemma.hidden_states

    def counted(self, ids, positions, documents, cache):
        fed.append(ids.shape[1])
        caches.append(cache.capacity)
        return read(self, ids, positions, documents, cache)

    monkeypatch.setattr(Gemma, "hidden_states", counted)
    monkeypatch.setattr(infer, "load", lambda flags: (model, tokenizer, "hermes"))
    monkeypatch.setattr(infer, "lines", lambda *_: (f"Question {n}?" for n in range(turns)))
    infer.main(["--max-new", "5", "--system", "Be brief."])
    read_anew = [size for size in fed if size > 150]
    assert capsys.readouterr().out.count("outgrown") == 1
    assert len(fed) > turns and sum(fed) < 120 * turns  # of 512 tokens in the context
    assert 2 <= len(read_anew) <= turns / 4 and max(caches) <= 512 and len(set(caches)) < 6


MISCHIEF = '''
import os, sys, threading

def weather(city: str) -> str:
    """The weather of a city."""
    os.chdir("/")
    print("\\x1b[2Jx" * 1_000_000)
    sys.stdout.writelines(["\\x1b[2Jy"] * 9)
    sys.stdout.close()
    sys.stderr.close()
    def later():
        begun.wait(20)
        print("late", "\\x1b[2J")
    thread = threading.Thread(target=later, daemon=True)
    thread.start()
    threads.append(thread)
    return "rain"

def fail() -> str:
    begun.set()
    for thread in threads:
        thread.join(20)
    sys.stdout = sys.stderr = None
    raise KeyboardInterrupt

begun, threads = threading.Event(), []
'''


def test_a_tool_that_makes_a_mess_of_the_process(chat, tmp_path):
    """Whatever it prints, closes, exchanges or leaves behind, what the model says is shown alone,
    and the transcript is where it was to be."""
    (tmp_path / "my_tools.py").write_text(MISCHIEF)
    replies = [CALL, "It rains.", CALL.replace("weather", "fail").replace('"city": "Ur"', ""),
               "Hm.", "!", "Bye."]
    out, error, prompts = chat(["Rain?", "And?", "Now?", "Bye"], replies, "--transcript", "t.jsonl",
                               "--json")
    assert [json.loads(line)["event"] for line in out.splitlines()] == [
        "call", "result", "answer", "call", "result", "answer", "answer", "end"]
    assert "rain" in prompts[1] and "KeyboardInterrupt" in prompts[3]
    assert len(error) < 6 * 10_500 and "tools print more" in error and "late" in error
    assert "error: broken" in error and "\x1b" not in error
    assert len(read_conversations(tmp_path / "t.jsonl")[0].messages) == 10


IMPORTED = '''
import os, sys
kept = sys.stderr  # as handlers of logging keep it
print("at import", len(sys.stdin.read()), "\\x1b" + "x" * 20_000)
sys.stdin.close()
sys.stdout.close()
sys.stdin = sys.stdout = sys.stderr = None
os.chdir("/")
''' + TOOLS.replace("print(", "print(os.getcwd(), file=kept); print(")


def test_a_file_of_tools_that_makes_a_mess_when_it_is_imported(chat, tmp_path, monkeypatch):
    """What the flags name is still where it was, for the file as for its tools."""
    monkeypatch.setattr("sys.stdin", stdin := io.StringIO("Rain?\nBye\n"))
    (tmp_path / "my_tools.py").write_text(IMPORTED)
    out, error, prompts = chat(None, [CALL, "It rains.", "Bye."], "--transcript", "new/t.jsonl",
                               "--json")
    assert [json.loads(line)["event"] for line in out.splitlines()] == [
        "call", "result", "answer", "answer", "end"]
    assert error.startswith("at import 0 \\x1bxx") and len(error) < 10_500
    assert error.endswith(")\n/\nlooking\n")  # it stays where the file has gone
    assert chat.folder == tmp_path and sys.stdin is stdin
    assert len(read_conversations(tmp_path / "new/t.jsonl")[0].messages) == 6


READER = '''
import sys

def weather(city: str) -> str:
    left = sys.stdin.read() + sys.stdin.buffer.read().decode()
    sys.stdin.close()
    sys.stdin = None
    return repr(left)
'''


def test_a_tool_that_reads_or_closes_the_input_takes_nothing_of_the_chat(
        chat, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", stdin := io.StringIO("Rain?\n\nAnd?\nBye"))
    (tmp_path / "my_tools.py").write_text(READER)
    out, _, prompts = chat(None, [CALL, "It rains.", CALL, "It does.", "Bye."])
    assert out.count("← ''") == 1 and out.count("←") == 2 and out.endswith("Bye.\n")
    assert [question for question in ("Rain?", "And?", "Bye<") if question in prompts[-1]] == [
        "Rain?", "And?", "Bye<"]
    assert sys.stdin is stdin and not stdin.closed


def test_a_question_that_is_too_long_is_told_and_left_out(chat):
    """It costs the chat nothing of its memory."""
    out, error, prompts = chat(["One?", "x" * 3000, "Two?"], ["Yes.", "No."], context=900)
    assert "error: too long (the question is left out)" in error
    assert "One?" in prompts[-1] and "xxx" not in prompts[-1] and out.endswith("Yes.\nNo.\n")
    with pytest.raises(UserError, match="too long"):
        chat(["x" * 3000], [], "x" * 3000, context=900)


def test_a_question_that_fails_on_its_way_costs_no_memory_either(chat):
    """Though it had pushed all else out of the context."""
    replies = ["Yes, 1.", CALL, "!", "Yes, 2."]
    out, error, prompts = chat(["One?", "x" * 150, "Two?"], replies, context=530)
    assert "outgrown" in out and "error: broken" in error
    assert "One?" not in prompts[1] and "Yes, 1." in prompts[-1]


def test_a_long_answer_to_one_question_leaves_its_earlier_rounds_out(chat):
    replies = [CALL.replace("Ur", str(number) + "z" * 60) for number in range(6)] + ["Rain."]
    out, _, prompts = chat(["Rain?"], replies, context=600)
    assert out.endswith("Rain.\n") and "outgrown" in out
    assert "Rain?" in prompts[-1] and "5zz" in prompts[-1] and "0zz" not in prompts[-1]


def test_a_reply_that_may_have_been_cut_says_so(chat):
    out, _, _ = chat(["One?"], ["word " * 40], "--max-new", "20")
    assert "(the reply has reached 20 tokens and may be cut; --max-new allows more)\n" in out
    assert "cut" not in chat(["One?"], ["word"], "--max-new", "20")[0]
    out, _, _ = chat(["One?"], ["word " * 400], "--max-new", "400", context=400)
    assert re.search(r"\d+ tokens and may be cut; the model's context of 400 has no room", out)


@pytest.mark.parametrize("flags", [(), ("--constrained",)])
def test_a_call_that_ends_with_the_last_token_is_not_cut(chat, tokenizer, flags):
    """A constraint has it end there, so it may be shorter than was meant."""
    size = len(tokenizer.encode(CALL.split(">")[1].split("</")[0])) + 2
    out, _, _ = chat(["Rain?"], [CALL, "Yes."], "--max-new", str(size), *flags)
    assert 'weather(city="Ur")' in out and "may be cut" not in out
    assert (f"(the reply has reached {size} tokens and had to end its call there, which may hold "
            "less than was meant; --max-new allows more)\n" in out) is bool(flags)
    out, _, _ = chat(["Rain?"], [CALL, "Yes."], "--max-new", str(size - 1))
    assert f"the reply has reached {size - 1} tokens and may be cut" in out


# --- interrupted ----------------------------------------------------------------------------------

def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_chat(chat, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)

    def questions():
        yield from ("One?", "Two?", "Three?", "Four?")
        raise KeyboardInterrupt

    replies = ["Yes, 1.", CALL, "It ra^C", "<think>\nHm^C", "Yes, 4."]
    out, error, prompts = chat(questions(), replies, "--transcript", "chat.jsonl")
    stopped = "(stopped; the question and what came of it are left out)\n"
    assert out == ('Yes, 1.\n→ weather(city="Ur")\n← rain in Ur\nIt ra\n' + stopped
                   + "Hm\n" + stopped + "Yes, 4.\n")
    assert "One?" in prompts[-1] and "Two?" not in prompts[-1] and "Three?" not in prompts[-1]
    assert [message.content for message in read_conversations("chat.jsonl")[0].messages] == [
        "One?", "Yes, 1.", "Four?", "Yes, 4."]
    out, _, _ = chat(["One?", "Two?"], ["Ye^C", "No."], "--json")
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["stopped", "answer", "end"]


@pytest.mark.parametrize("key", ["Ctrl-D", "Ctrl-C"])
def test_the_lines_of_a_chat_end_with_either_key(key):
    said = iter(["One?\n", " \n", "Two?\n"])

    def readline():
        text = next(said, "")
        if not text and key == "Ctrl-C":
            raise KeyboardInterrupt
        return text

    stdin, shown = SimpleNamespace(isatty=lambda: True, readline=readline), io.StringIO()
    assert list(load_infer().lines(stdin, shown)) == ["One?", "Two?"]
    assert shown.getvalue() == "> > > > \n"


def test_the_lines_of_a_pipe_are_asked_for_by_nothing():
    shown = io.StringIO()
    assert list(load_infer().lines(io.StringIO("One?\n\nTwo?"), shown)) == ["One?", "Two?"]
    assert not shown.getvalue()


def test_ctrl_c_ends_all_where_nobody_is_at_the_prompt(chat, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    out, _, prompts = chat(["One?", "Two?"], ["Ye^C", "No."])
    assert out == "Ye\n" and len(prompts) == 1
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with pytest.raises(KeyboardInterrupt):
        chat([], ["Ye^C"], "One?")
