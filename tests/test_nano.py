"""The built-in base: what it was taught and what not; and that testing LoRA on it is fair."""

import itertools
import json
import random
import re

import pytest
import sentencepiece
from conftest import NANO, load_tokenizer

from minilora.chat import Conversation, Message, render
from minilora.config import GenerateConfig, LoraConfig, TrainConfig
from minilora.data import make_examples
from minilora.dialects import DIALECTS
from minilora.generate import generate
from minilora.nano import learning, make, world
from minilora.readers import read_conversations
from minilora.tokenizer import Tokenizer
from minilora.weights import load_model


def chats(name: str) -> list[dict]:
    return [json.loads(line) for line in (NANO / name).read_text(encoding="utf-8").splitlines()]


def calls(chat: dict) -> list[dict]:
    return [call["function"] for message in chat["messages"]
            for call in message.get("tool_calls", [])]


def test_the_lessons_hold_no_call_in_disguise():
    """No JSON object, no tag of any dialect, no tool list in 20,000 chats of the two rounds."""
    rng = random.Random(1)
    tags = [token for dialect in DIALECTS.values() for token in dialect.tokens]
    for text in itertools.chain.from_iterable(itertools.chain.from_iterable(
            world.lesson(rng, i % len(world.ROUNDS)) for i in range(20_000))):
        assert '{"' not in text and "tool_call" not in text
        assert not any(tag in text for tag in tags)
        assert not re.search(r'"(name|type|function|parameters|arguments)"\s*:', text)
        for inside in re.findall(r"\{[^{}]*\}", text):
            with pytest.raises(json.JSONDecodeError):
                json.loads(inside if inside.strip("{} ") else "not an object")


def test_what_is_held_out_was_never_trained_on():
    """Tool names, parameter names and argument values: no string of one file is in the other."""
    seen: list[set[str]] = []
    for name in ("train.jsonl", "held_out.jsonl"):
        functions = [tool["function"] for chat in chats(name) for tool in chat["tools"]]
        made = [call for chat in chats(name) for call in calls(chat)]
        seen.append({f"tool {function['name']}" for function in functions}
                    | {f"parameter {parameter}" for function in functions
                       for parameter in function["parameters"]["properties"]}
                    | {f"value {value}" for call in made for value in call["arguments"].values()})
    train, held_out = seen
    assert len(train) > 10_000 and len(held_out) > 500
    assert not train & held_out


def test_every_second_held_out_question_has_a_phrasing_of_its_own():
    """The templates of the two sides are different; the file alternates between them."""
    for pair in (world.NO_SLOT, world.ONE_SLOT, world.MANY_SLOTS, world.FACT_ASKS,
                 world.OPPOSITE_ASKS, world.SUM_ASKS, world.ECHO_ASKS):
        assert not set(pair[0]) & set(pair[1])
    rng = random.Random(f"{make.SEED} held out")
    again = [world.conversation(rng, True, i % 2 == 1) for i in range(len(chats("held_out.jsonl")))]
    assert again == chats("held_out.jsonl")


def test_the_data_is_what_the_script_writes(tmp_path):
    make.write_data(tmp_path, make.SEED, len(chats("train.jsonl")), len(chats("held_out.jsonl")))
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (NANO / name).read_bytes()


def test_held_out_questions_are_of_every_kind():
    held_out = chats("held_out.jsonl")
    with_call = [chat for chat in held_out if calls(chat)]
    assert 0.5 < len(with_call) / len(held_out) < 0.8
    near = [chat for chat in held_out
            if chat["messages"][1]["content"].startswith("Sorry, I have no tool")]
    assert len(near) >= 20 and len(held_out) - len(with_call) - len(near) >= 20
    assert {len(call["arguments"]) for chat in with_call for call in calls(chat)} == {0, 1, 2, 3}
    kinds = {type(value) for chat in with_call for call in calls(chat)
             for value in call["arguments"].values()}
    assert kinds == {str, int, float}


def test_every_conversation_fits_a_row_of_the_recipe():
    tokenizer = Tokenizer.load("nano")
    tokenizer.add_tokens(DIALECTS["hermes"].tokens)
    length = json.loads((NANO / "recipe.json").read_text())["length"]
    for name in ("nano/train.jsonl", "nano/held_out.jsonl"):
        conversations = read_conversations(name)
        examples = make_examples(conversations, tokenizer, length=length)
        assert len(examples) == len(conversations) and not any(each.cut for each in examples)


def test_the_base_is_small():
    files = [NANO / name for name in ("model.safetensors", "tokenizer.model", "config.json",
                                      "generation_config.json")]
    assert sum(path.stat().st_size for path in files) <= 8_000_000


def test_a_word_has_the_same_pieces_wherever_it_stands():
    """Which is what makes copying a name the copying of its ids."""
    tokenizer = Tokenizer.load("nano")
    rng = random.Random(3)
    for _ in range(200):
        word = world.made_up(rng)
        alone = tokenizer.encode(word)
        for before, after in itertools.product((" ", '"', "_", "\n", ": ", "("),
                                               (" ", '"', "_", ",", ".", ": ", ")")):
            ids = tokenizer.encode(f"x{before}{word}{after}y")
            assert any(ids[i:i + len(alone)] == alone for i in range(len(ids))), (before, after)


def test_pretraining_rows_train_what_the_model_says():
    pieces = sentencepiece.SentencePieceProcessor(str(NANO / "tokenizer.model"))
    drawn = (make.rows(pieces, random.Random(5), number, 600)
             for number in range(len(world.ROUNDS)))
    for ids, targets in itertools.chain(*(itertools.islice(rows, 5) for rows in drawn)):
        assert ids.shape == targets.shape == (600,)
        trained = targets != -100
        assert (targets[:-1][trained[:-1]] == ids[1:][trained[:-1]]).all()
        said = pieces.decode(targets[trained].tolist())
        assert "user\n" not in said and "model\n" not in said and "<end_of_turn>" in said


def test_the_base_chats():
    """Small talk, an opposite and an echo are right, to the letter."""
    model, tokenizer = load_model("nano"), Tokenizer.load("nano")
    asks = {"What is the opposite of hot?": "Cold.", "Thank you.": "You are welcome.",
            "Say Zorbak": "Zorbak"}
    prompts = [render(Conversation((Message("user", ask),)), tokenizer, generate=True).ids
               for ask in asks]
    replies = generate(model, prompts, GenerateConfig(max_new=12), tokenizer.stop_ids)
    assert [tokenizer.decode(reply) for reply in replies] == list(asks.values())


# --- the benchmark of learning --------------------------------------------------------------------

def test_learning_looks_on_its_way(tmp_path):
    """The compared runs differ from the recipe in one thing each; a run answers as it learns."""
    recipe = LoraConfig(rank=8, alpha=16.0), TrainConfig(data=str(tmp_path / "held_out.jsonl"),
                                                         steps=learning.LOOKS, batch=1, length=800)
    compared = learning.runs(*recipe)
    assert next(iter(compared.values())) == recipe
    for lora, config in [*compared.values()][1:]:
        assert lora.alpha / lora.rank == 2 and (lora, config) != recipe
    make.write_data(tmp_path, 5, 0, 4)
    points = learning.learn(*recipe, str(tmp_path / "held_out.jsonl"))
    assert [point["step"] for point in points] == list(range(1, learning.LOOKS + 1))
    assert all(point["calls"][1] + point["no_tool"][1] == 4 for point in points)


@pytest.mark.parametrize("name", learning.runs(LoraConfig(), TrainConfig()))
def test_every_compared_run_has_data(name, tmp_path):
    """Whatever its mask leaves: half of the chats have no call in them."""
    make.write_data(tmp_path, 5, 12, 0)
    config = TrainConfig(data=str(tmp_path / "train.jsonl"), length=800, steps=1)
    examples = learning.training_data(learning.runs(LoraConfig(), config)[name][1],
                                      load_tokenizer(NANO / "tokenizer.model"))
    assert 0 < len(examples) <= 12


def test_learning_is_shown_as_a_table_and_a_picture(tmp_path):
    points = [{"step": step, "calls": [step, 10], "no_tool": [3, 4]} for step in (4, 8)]
    curves = {"this": points, "that": points[::-1]}
    table = learning.markdown(curves).splitlines()
    assert table[0] == "| the recipe with | step 4 | step 8 | no tool needed |"
    assert table[2:] == ["| this | 0.40 | 0.80 | 0.75 |", "| that | 0.80 | 0.40 | 0.75 |"]
    assert learning.draw(curves, tmp_path / "learning.png")
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")
