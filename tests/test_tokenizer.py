"""Tokenizer: text comes back and is never a control token; new tokens keep their ids."""

import functools
import itertools
import json
import re
import shutil

import huggingface_hub
import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import SPECIALS, TURNS, make_tokenizer_model

from minilora.config import UserError
from minilora.tokenizer import FILES, NEW_TOKENS, Tokenizer

TOOLS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]"]
BOUNDED = settings(max_examples=200, deadline=None, derandomize=True)

# Strings that could be mistaken for something else, pieces of them, and any text between.
TAGS = ["<pad>", "<eos>", "<bos>", "<unk>", *SPECIALS, *TURNS, *TOOLS, "[toxicity=0]", "<unused99>"]
ODD = ["▁", " ", "  ", "\n", "\n\n\n", "\t", "\0", "<", ">", "<0x41>", "<b>", "</table>", "é",
       "e\u0301", "ﬁ", "①", "\u200b", "\ufeff", "\r\n", "𝕏", "👩\u200d👧", "\U0010ffff", "[PAD512]",
       "<end_of", "<start_of", "_turn>", "<<end_of_turn>>", "end_of_turn", "<tool", "_call>", "</",
       "[TOOL", "_CALLS]", "<un", "used0>", "<h1>", '{"name": "get_weather"}', "1234", "\ufffd"]
TEXTS = st.lists(st.one_of(st.sampled_from(TAGS), st.sampled_from(ODD), st.text(max_size=6)),
                 max_size=8).map("".join)


def refusal(call, *args, **kwargs):
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pieces_of(tokens, text):
    """`text` cut into (string, whether it is one of `tokens`), the longest token first."""
    longest = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    return [(part, n % 2 == 1) for n, part in enumerate(re.split(f"({longest})", text))]


def matched(tokenizer, text, tokens=None):
    """The ids of a reader that does match control and new tokens (or `tokens`) in a text."""
    parts = pieces_of(tokenizer._ids if tokens is None else tokens, text)
    return [i for part, token in parts
            for i in ([tokenizer.token_id(part)] if token else tokenizer.encode(part))]


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory):
    return make_tokenizer_model(tmp_path_factory.mktemp("tiny")).parent


@pytest.fixture(scope="module", params=["tiny", "gemma2"])
def base_dir(request, tiny_dir):
    """A folder with a tokenizer.model: the tiny one, and the real one where it is at hand."""
    if request.param == "tiny":
        return tiny_dir
    return request.getfixturevalue("gemma2_tokenizer_model").parent


@pytest.fixture(scope="module")
def base(base_dir):
    return Tokenizer.load(base_dir)


@pytest.fixture(scope="module")
def plain(base_dir):
    """SentencePiece itself, reading the same file."""
    return sentencepiece.SentencePieceProcessor(model_file=str(base_dir / "tokenizer.model"))


WAYS = ["tiny append", "tiny gap", "tiny reserved", "gemma2 append"]


@pytest.fixture(scope="module", params=WAYS)
def way(request):
    """Which vocabulary gets new tokens, and where they go."""
    return request.param.split()


@pytest.fixture(scope="module")
def old_dir(request, way):
    """The folder of the vocabulary as it was."""
    if way[0] == "tiny":
        return request.getfixturevalue("tiny_dir")
    return request.getfixturevalue("gemma2_tokenizer_model").parent


@pytest.fixture(scope="module")
def grown(way, old_dir):
    """The tokenizer with the tool tags added."""
    tokenizer = Tokenizer.load(old_dir)
    first = tokenizer.vocab_size + 5 if way[1] == "gap" else None
    tokenizer.add_tokens(TOOLS, "reserved" if way[1] == "reserved" else "append", first)
    return tokenizer


@pytest.fixture(scope="module")
def old(old_dir):
    return Tokenizer.load(old_dir)


@pytest.fixture(scope="module")
def saved(grown, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    grown.save(folder, chat_template="{{ bos_token }}")
    return folder


@pytest.fixture(scope="module")
def reloaded(saved):
    return Tokenizer.load(saved)


def named_ids(tokenizer):
    """The ids that text must never give: every control token and new token."""
    tags = {tokenizer.token_id(tag) for tag in TAGS if tag in tokenizer._ids}
    return tags | set(tokenizer.new_tokens.values()) | set(range(108))


# --- text -----------------------------------------------------------------------------------------

@BOUNDED
@given(text=TEXTS)
def test_text_comes_back_and_is_never_a_control_token(base, text):
    ids = base.encode(text)
    assert base.decode(ids) == text
    assert base.decode(ids, skip_control=True) == text
    assert not named_ids(base).intersection(ids)
    assert all(0 <= i < base.vocab_size for i in ids)


@BOUNDED
@given(text=TEXTS)
def test_nor_a_new_token_and_ids_do_not_depend_on_new_tokens(old, grown, reloaded, text):
    ids = grown.encode(text)
    assert ids == old.encode(text) == reloaded.encode(text)
    assert grown.decode(ids) == reloaded.decode(ids) == text
    assert not named_ids(grown).intersection(ids)
    assert not named_ids(reloaded).intersection(ids)


def check_plain(base, plain, text):
    """The laws of a text that spells no control token: it comes back, with SentencePiece's ids."""
    ids = base.encode(text)
    assert base.decode(ids) == text
    assert not named_ids(base).intersection(ids)
    assert ids == [i for n, part in enumerate(text.split("▁"))
                   for i in [*(block(plain) if n else []), *plain.encode(part)]]


def block(plain):
    """The bytes of U+2581, which SentencePiece would take for a space."""
    return [plain.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]


@BOUNDED
@given(text=TEXTS)
def test_other_text_is_what_sentencepiece_makes_of_it(base, plain, text):
    assume(not any(tag in text for tag in base._ids))
    check_plain(base, plain, text)


@BOUNDED
@given(data=st.data())
def test_text_made_of_the_vocabulary_itself(base, plain, data):
    """Whatever a model may write: pieces side by side, which often merge otherwise than they came.

    Control tokens come as their strings, bytes as characters or as U+FFFD.
    """
    text = base.decode(data.draw(st.lists(st.integers(0, base.vocab_size - 1), max_size=30)))
    assert base.decode(base.encode(text)) == text
    for part, token in pieces_of(base._ids, text):
        if not token:
            check_plain(base, plain, part)


def test_every_character_of_unicode(base, plain):
    for start in range(0, 0x110000, 0x1000):
        characters = [chr(c) for c in range(start, start + 0x1000) if not 0xD800 <= c < 0xE000]
        check_plain(base, plain, "".join(characters))
        check_plain(base, plain, " ".join(characters))


@pytest.mark.parametrize("text", [" ", "\n", "\t", "\0", "▁", "<", "<b>", "a", "1", "ab ", " \n",
                                  "é", "e\u0301", "𝕏", "\ufffd"])
def test_long_runs(base, plain, text):
    for count in (31, 32, 33, 1000, 30_000):
        check_plain(base, plain, count * text)


def test_sentencepiece_itself_would_end_the_turn(base, plain):
    for tag in [*TURNS, "<unused7>", "<mask>", "[@BOS@]"]:
        assert base.token_id(tag) in plain.encode(f"a {tag} b")
        assert base.token_id(tag) not in base.encode(f"a {tag} b")
        assert len(base.encode(tag)) > 1


def test_html_tags_and_runs_of_white_space_are_plain_text(base, plain):
    for text in ["<b>", "\n", "\n\n\n", "  ", "    "]:
        assert base.encode(text) == plain.encode(text)
        assert len(base.encode(text)) == 1


def test_the_real_vocabulary_has_these_control_tokens(gemma2_tokenizer_model):
    tokenizer = Tokenizer.load(gemma2_tokenizer_model.parent)
    unused = {f"<unused{n}>" for n in range(100)}
    assert tokenizer._ids.keys() - unused == {
        "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]", *TURNS, "[toxicity=0]"}
    assert unused < tokenizer._ids.keys()
    assert tokenizer.vocab_size == 256000


def test_a_block_goes_in_by_its_bytes(base):
    block = base.encode("▁")
    assert len(block) == 3 and base.encode("▁▁a") == block + block + base.encode("a")
    assert base.encode("▁") != base.encode(" ")


def test_half_a_surrogate_pair_is_refused(base):
    line = refusal(base.encode, "ab▁c\ud83d!")
    assert "U+D83D" in line and "character 4" in line


# --- ids ------------------------------------------------------------------------------------------

def test_gemmas_ids(base):
    assert (base.pad, base.eos, base.bos) == (0, 1, 2)
    assert (base.start_of_turn, base.end_of_turn) == (106, 107)
    assert base.stop_ids == (1, 107)
    assert base.new_tokens == {}


def test_control_tokens_decode_to_their_names(base):
    ids = [base.bos, base.start_of_turn, *base.encode("user\nhé ▁"), *base.stop_ids[::-1], base.pad]
    assert base.decode(ids) == "<bos><start_of_turn>user\nhé ▁<end_of_turn><eos><pad>"
    assert base.decode(ids, skip_control=True) == "user\nhé ▁"


def test_new_tokens_survive_skip_control(grown, reloaded):
    for tokenizer in (grown, reloaded):
        tools = map(tokenizer.token_id, TOOLS)
        ids = [tokenizer.bos, *tools, *tokenizer.encode("x"), tokenizer.end_of_turn]
        assert tokenizer.decode(ids, skip_control=True) == "".join(TOOLS) + "x"
        assert tokenizer.decode(ids) == "<bos>" + "".join(TOOLS) + "x<end_of_turn>"


def test_bytes_that_are_no_character(base):
    half = base.encode("▁")[:2]
    assert base.decode(half) == "\ufffd"
    assert base.decode([*half, *base.encode("a")]) == "\ufffda"
    assert base.decode([*half, base.end_of_turn]) == "\ufffd<end_of_turn>"


def test_ids_that_are_none(base):
    for i in (-1, -100, base.vocab_size):
        assert str(i) in refusal(base.decode, [base.bos, i])
    assert base.decode([]) == ""


def test_token_id_knows_control_and_new_tokens_only(old, grown):
    assert grown.token_id("<end_of_turn>") == 107
    for token in ("<tool_call>", "the", "<b>", "\n", "<0x41>", ""):
        assert repr(token) in refusal(old.token_id, token)
    assert grown.token_id("<tool_call>") == grown.new_tokens["<tool_call>"]


# --- new tokens -----------------------------------------------------------------------------------

def test_appended_ids_follow_the_table(tiny_dir):
    tokenizer = Tokenizer.load(tiny_dir)
    assert tokenizer.add_tokens(TOOLS[:2]) == [512, 513]
    assert tokenizer.vocab_size == 514
    tokenizer = Tokenizer.load(tiny_dir)
    assert tokenizer.add_tokens(TOOLS[:2], first=520) == [520, 521]
    assert tokenizer.vocab_size == 522
    assert tokenizer.decode([519, 520]) == "[PAD519]<tool_call>"
    assert tokenizer.decode([519, 520], skip_control=True) == "<tool_call>"
    assert list(tokenizer.new_tokens) == TOOLS[:2]


def test_reserved_ids_take_over_slots(tiny_dir):
    tokenizer = Tokenizer.load(tiny_dir)
    assert tokenizer.add_tokens(TOOLS[:2], "reserved") == [7, 8]
    assert tokenizer.add_tokens(TOOLS, "reserved") == [7, 8, 9]
    assert tokenizer.vocab_size == 512
    assert tokenizer.decode([7, 9, 10]) == "<tool_call>[TOOL_CALLS]<unused3>"
    assert "<unused0>" in refusal(tokenizer.token_id, "<unused0>")
    assert tokenizer.new_tokens == dict(zip(TOOLS, [7, 8, 9], strict=True))


@pytest.mark.parametrize("mode", ["append", "reserved"])
def test_a_known_token_keeps_its_id(tiny_dir, mode):
    tokenizer = Tokenizer.load(tiny_dir)
    ids = tokenizer.add_tokens([*TOOLS, "<end_of_turn>", TOOLS[0]], mode)
    start, size = (512, 515) if mode == "append" else (7, 512)
    assert ids == [start, start + 1, start + 2, 107, start]
    assert tokenizer.vocab_size == size
    assert tokenizer.add_tokens(TOOLS, mode, first=512) == ids[:3]
    assert tokenizer.vocab_size == size and list(tokenizer.new_tokens) == TOOLS


@pytest.mark.parametrize("tokens, mode, first, expected", [
    (["<b>"], "append", None, ["'<b>'", "plain text"]),
    (["weather"[1:]], "append", None, ["'eather'", "plain text"]),
    (["<0x41>"], "reserved", None, ["'<0x41>'"]),
    ([""], "append", None, ["''"]),
    (["two words"], "append", None, ["'two words'", "without spaces"]),
    (["a▁b"], "append", None, ["'a▁b'"]),
    (["\ud83d"], "append", None, ["\\ud83d"]),
    (["<a>"], "append", 511, ["511 rows", "id 511", "same model"]),
    (["<a>"], "sideways", None, ["'sideways'"]),
    ([f"<t{n}>" for n in range(97)], "reserved", None, ["100 new tokens", "99 <unusedN>"]),
])
def test_what_cannot_be_a_token_changes_nothing(tiny_dir, tokens, mode, first, expected):
    tokenizer = Tokenizer.load(tiny_dir)
    line = refusal(tokenizer.add_tokens, [*TOOLS, *tokens], mode, first)
    for word in expected:
        assert word in line
    assert tokenizer.new_tokens == {} and tokenizer.vocab_size == 512
    assert tokenizer.token_id("<unused0>") == 7


@pytest.mark.parametrize("token", ["CALL::", "CALL::" * 60])
def test_a_new_token_need_not_look_like_a_tag(tiny_dir, tmp_path, token):
    tokenizer = Tokenizer.load(tiny_dir)
    [new] = tokenizer.add_tokens([token])
    tokenizer.save(tmp_path)
    again, text = Tokenizer.load(tmp_path), f"a {token} b"
    assert new not in again.encode(text) == tokenizer.encode(text)
    assert again.token_id(token) == new and again.decode(again.encode(text)) == text


def gemma3_like(tiny_dir, folder):
    """One token more than pieces, as Gemma 3 has, and config keys that name it."""
    folder.mkdir(exist_ok=True)
    shutil.copy(tiny_dir / "tokenizer.model", folder)
    image = {"content": "<image_soft_token>", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "added_tokens_decoder": {"512": image}, "image_token": "<image_soft_token>",
        "extra_special_tokens": {"image_token": "<image_soft_token>", "boi_token": "<unused9>"}}))
    return folder


def test_a_token_after_the_pieces_is_known(tiny_dir, tmp_path):
    tokenizer = Tokenizer.load(gemma3_like(tiny_dir, tmp_path / "base"))
    assert tokenizer.vocab_size == 513 and tokenizer.token_id("<image_soft_token>") == 512
    assert tokenizer.decode([512]) == "<image_soft_token>"
    assert 512 not in tokenizer.encode("<image_soft_token>")
    assert tokenizer.add_tokens(TOOLS[:1], first=520) == [520]  # a table with room for it
    tokenizer.save(tmp_path / "out")
    again = Tokenizer.load(tmp_path / "out")
    assert again.token_id("<image_soft_token>") == 512 and again.token_id("<tool_call>") == 520
    assert 512 not in again.encode("<image_soft_token>")


def test_ids_between_the_pieces_and_an_added_token_are_placeholders(tiny_dir, tmp_path):
    shutil.copy(tiny_dir / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"514": {"content": "<late>", "special": false}}}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode([512, 513, 514]) == "[PAD512][PAD513]<late>"
    assert tokenizer.decode([512, 513, 514], skip_control=True) == "<late>"


def test_a_token_that_the_table_has_no_row_for_gives_way(tiny_dir, tmp_path):
    base = gemma3_like(tiny_dir, tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["pan_token"] = {"__type": "AddedToken", "content": "<image_soft_token>"}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(base)
    assert tokenizer.add_tokens(TOOLS[:2], first=512) == [512, 513]  # the text-only Gemma 3
    assert tokenizer.decode([512]) == "<tool_call>"
    assert "image" in refusal(tokenizer.token_id, "<image_soft_token>")
    tokenizer.save(tmp_path / "out")
    text = (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert "<image_soft_token>" not in text and '"boi_token": "<unused9>"' in text
    assert "pan_token" not in text
    assert Tokenizer.load(tmp_path / "out").new_tokens == {"<tool_call>": 512, "</tool_call>": 513}


# --- files ----------------------------------------------------------------------------------------

def test_a_save_reads_back(grown, saved, reloaded):
    assert reloaded.new_tokens == grown.new_tokens
    assert list(reloaded.new_tokens) == TOOLS
    assert reloaded.vocab_size == grown.vocab_size
    for i, skip in itertools.product(range(grown.vocab_size), (False, True)):
        assert reloaded.decode([i], skip) == grown.decode([i], skip)
    assert reloaded.add_tokens(TOOLS) == list(grown.new_tokens.values())
    assert {path.name for path in saved.iterdir()} == {"tokenizer.model", "tokenizer_config.json"}


def test_a_second_save_writes_the_same(saved, reloaded, tmp_path):
    reloaded.save(tmp_path)
    assert_same_files(tmp_path, saved)


def assert_same_files(folder, other):
    assert {path.name for path in folder.iterdir()} == {path.name for path in other.iterdir()}
    for path in other.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_nothing_added_leaves_the_model_as_it_was(base, base_dir, tmp_path):
    base.save(tmp_path)
    name = "tokenizer.model"
    assert (tmp_path / name).read_bytes() == (base_dir / name).read_bytes()


def test_a_save_over_its_own_base(tiny_dir, tmp_path):
    shutil.copy(tiny_dir / "tokenizer.model", tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    tokenizer.add_tokens(TOOLS)
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).new_tokens == tokenizer.new_tokens


def test_sentencepiece_reads_the_saved_model(old_dir, grown, saved):
    plain = sentencepiece.SentencePieceProcessor(model_file=str(old_dir / "tokenizer.model"))
    model = sentencepiece.SentencePieceProcessor(model_file=str(saved / "tokenizer.model"))
    assert len(model) == grown.vocab_size
    for token, i in grown.new_tokens.items():
        assert model.id_to_piece(i) == token and model.encode(f"a{token}").count(i) == 1
    for i in range(len(plain), len(model)):
        assert model.is_unused(i) == (i not in grown.new_tokens.values())
    for i in set(range(len(plain))) - set(grown.new_tokens.values()):
        assert model.id_to_piece(i) == plain.id_to_piece(i)
        assert model.get_score(i) == plain.get_score(i)


@BOUNDED
@given(text=TEXTS)
def test_sentencepiece_matches_new_tokens_in_a_text_and_changes_nothing_else(grown, saved, text):
    """A user-defined piece is found in any text; that only `encode` does otherwise is its point."""
    model = saved_processor(saved)
    text = text.replace("▁", "")
    tokens = [token for token, i in grown._ids.items()
              if not model.is_control(i) and not model.is_unknown(i)]
    assert model.encode(text) == matched(grown, text, tokens)


@functools.cache
def saved_processor(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_the_saved_model_is_a_whole_message(grown, saved):
    pytest.importorskip("google.protobuf")
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((saved / "tokenizer.model").read_bytes())
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    for token, i in grown.new_tokens.items():
        assert (proto.pieces[i].piece, proto.pieces[i].type) == (token, kinds.USER_DEFINED)


def test_the_saved_config(grown, saved):
    config = json.loads((saved / "tokenizer_config.json").read_text())
    added = config["added_tokens_decoder"]
    for token, i in grown.new_tokens.items():
        assert added[str(i)]["content"] == token and added[str(i)]["special"] is False
    for tag, i in {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<end_of_turn>": 107}.items():
        assert added[str(i)]["content"] == tag and added[str(i)]["special"] is True
    assert config["chat_template"] == "{{ bos_token }}"
    assert config[NEW_TOKENS] == grown.new_tokens


def test_what_the_base_says_is_kept(tiny_dir, tmp_path):
    shutil.copy(tiny_dir / "tokenizer.model", tmp_path)
    config = {"tokenizer_class": "GemmaTokenizerFast", "chat_template": "old", "extra": [1],
              "added_tokens_decoder": {"106": {"content": "<start_of_turn>", "special": False}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("old jinja")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode([106], skip_control=True) == ""
    tokenizer.save(tmp_path / "kept")
    kept = json.loads((tmp_path / "kept" / "tokenizer_config.json").read_text())
    assert kept["chat_template"] == "old" and kept["extra"] == [1]
    assert kept["tokenizer_class"] == "GemmaTokenizerFast"
    assert (tmp_path / "kept" / "chat_template.jinja").read_text() == "old jinja"
    tokenizer.save(tmp_path / "new", chat_template="new")
    new = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert new["chat_template"] == "new"
    assert not (tmp_path / "new" / "chat_template.jinja").exists()  # it would win over the config


@pytest.mark.parametrize("config, expected", [
    ({"added_tokens_decoder": {"107": {"content": "<a>"}}}, ["107", "'<a>'", "'<end_of_turn>'"]),
    ({"added_tokens_decoder": {"7": {"content": "<a>"}}}, ["7", "'<a>'", "'<unused0>'"]),
    ({"added_tokens_decoder": {"7": {"content": "a b"}}}, ["7", "'a b'", "'<unused0>'"]),
    ({"added_tokens_decoder": {"-1": {"content": "|"}}}, ["-1"]),
    ({"added_tokens_decoder": {"-999": {"content": "<t>"}}}, ["-999"]),
    ({"added_tokens_decoder": {"x": {"content": "<eot>"}}}, ["added tokens"]),
    ({"added_tokens_decoder": {"7": "<unused0>"}}, ["added tokens"]),
    ({"added_tokens_decoder": {"7": {}}}, ["added tokens"]),
    ({"added_tokens_decoder": {"7": {"content": 7}}}, ["added tokens"]),
    ({"added_tokens_decoder": {"999999": {"content": "<t>"}}}, ["999999", "'<t>'", "511"]),
    ({"added_tokens_decoder": {"512": {"content": "<pad>"}}}, ["512", "'<pad>'", "another token"]),
    ({"added_tokens_decoder": {"7": {"content": "<pad>"}}}, ["7", "'<pad>'", "another token"]),
    ({"added_tokens_decoder": ["<a>"]}, ["added tokens"]),
    ({NEW_TOKENS: {"<tool_call>": 512}}, ["512", "'<tool_call>'", "512 tokens"]),
    ({NEW_TOKENS: {"<tool_call>": 7}}, ["7", "'<tool_call>'", "'<unused0>'"]),
    ({NEW_TOKENS: {"<tool_call>": "7"}}, ["'<tool_call>'"]),
    ({NEW_TOKENS: ["<tool_call>"]}, [NEW_TOKENS]),
    ({NEW_TOKENS: {"book": 386}}, [NEW_TOKENS, "'book'", "is no new token"]),
    ({NEW_TOKENS: {"<pad>": 0}}, [NEW_TOKENS, "'<pad>'", "is no new token"]),
    ([], ["JSON object"]),
])
def test_a_config_that_disagrees_is_refused(tiny_dir, tmp_path, config, expected):
    shutil.copy(tiny_dir / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    line = refusal(Tokenizer.load, tmp_path)
    for word in [str(tmp_path / "tokenizer_config.json"), *expected]:
        assert word in line


def test_a_saved_config_beside_the_old_model_is_refused(saved, old_dir, tmp_path):
    shutil.copy(old_dir / "tokenizer.model", tmp_path)
    shutil.copy(saved / "tokenizer_config.json", tmp_path)
    assert "'<tool_call>'" in refusal(Tokenizer.load, tmp_path)


@pytest.mark.parametrize("overrides, expected", [
    ({"byte_fallback": False}, ["lacks byte pieces", "byte_fallback"]),
    ({"add_dummy_prefix": True}, ["dummy prefix"]),
    ({"remove_extra_whitespaces": True}, ["as it was"]),
    ({"normalization_rule_name": "nmt_nfkc"}, ["as it was"]),
    ({"user_defined_symbols": SPECIALS}, ["<start_of_turn>"]),
    ({"pad_id": -1}, ["<pad>"]),
], ids=lambda value: next(iter(value), ""))
def test_a_vocabulary_that_loses_text_or_turns_is_refused(tmp_path, overrides, expected):
    make_tokenizer_model(tmp_path, **overrides)
    line = refusal(Tokenizer.load, tmp_path)
    for word in [str(tmp_path / "tokenizer.model"), *expected]:
        assert word in line


@pytest.mark.parametrize("raw, expected", [
    ({"added_tokens": ["<a>"]}, ["added tokens"]),
    ({"added_tokens": 7}, ["added tokens"]),
    ({"added_tokens": [{"id": "x", "content": "<a>"}]}, ["added tokens"]),
    ({"added_tokens": [{"id": 107, "content": "<a>"}]}, ["107", "'<a>'", "'<end_of_turn>'"]),
    ([], ["JSON object"]),
])
def test_added_tokens_of_a_tokenizer_json_alone_are_checked(tiny_dir, tmp_path, raw, expected):
    shutil.copy(tiny_dir / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    line = refusal(Tokenizer.load, tmp_path)
    for word in [str(tmp_path / "tokenizer.json"), *expected]:
        assert word in line


def test_no_tokenizer_model(tmp_path):
    assert "tokenizer.model" in refusal(Tokenizer.load, tmp_path)


@pytest.mark.parametrize("old, new", [
    (b"", b""), (b"\n", b"\x08"), (b"<0x41>", b"<0x\x801>"), (b"London", b"Londo\x80")])
def test_some_damage(tiny_dir, tmp_path, old, new):
    """No bytes at all, a field of another kind, text that is not UTF-8."""
    content = (tiny_dir / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content.replace(old, new, 1) if old else b"")
    line = refusal(Tokenizer.load, tmp_path)
    assert str(tmp_path) in line and "not a whole SentencePiece model" in line


@BOUNDED
@given(data=st.data())
def test_a_damaged_model_is_refused_or_whole(tiny_dir, tmp_path_factory, data):
    content = (tiny_dir / "tokenizer.model").read_bytes()
    damaged = bytearray(content[:data.draw(st.integers(0, len(content) - 1))])
    if data.draw(st.booleans()):
        damaged = bytearray(content)
        for _ in range(data.draw(st.integers(1, 4))):
            damaged[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "tokenizer.model").write_bytes(damaged)
    try:
        tokenizer = Tokenizer.load(folder)
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
        return
    assert tokenizer.decode(tokenizer.encode("weather ▁ é")) == "weather ▁ é"


# --- transformers ---------------------------------------------------------------------------------

PROMPTS = ["what is the weather", " in  Paris\n\n\n  <b> é\t\0 ", '{"name": "get_weather"}', "1234"]


def test_transformers_reads_what_was_saved(grown, saved):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    assert len(theirs) == grown.vocab_size
    for text in PROMPTS:
        assert theirs.encode(text, add_special_tokens=False) == grown.encode(text)
        assert theirs.encode(text) == [grown.bos, *grown.encode(text)]
    a, b = map(grown.encode, ("call", "done"))
    start, end = (grown.token_id(tag) for tag in TOOLS[:2])
    ids = [grown.start_of_turn, start, *a, end, *b, grown.end_of_turn]
    text = "<start_of_turn><tool_call>call</tool_call>done<end_of_turn>"
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.decode(ids) == grown.decode(ids) == text
    kept = "<tool_call>call</tool_call>done"
    assert theirs.decode(ids, skip_special_tokens=True) == kept
    assert grown.decode(ids, skip_control=True) == kept
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id) == (0, 1, 2)
    assert theirs.apply_chat_template([{"role": "user"}], tokenize=False) == "<bos>"


def test_transformers_makes_up_no_token_that_a_vocabulary_lacks(tmp_path):
    """It would: its Gemma tokenizer adds a <mask>, whose id would be past the table."""
    transformers = pytest.importorskip("transformers")
    tags = [tag for tag in SPECIALS if tag != "<mask>"]
    make_tokenizer_model(tmp_path, user_defined_symbols=[*tags, *TURNS])
    tokenizer = Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size == 512
    assert theirs.convert_tokens_to_ids("<end_of_turn>") == tokenizer.end_of_turn == 106


def write_base(model, layout, folder):
    """A base with the tokenizer.model at `model`, and the other files of a layout.

    bare: none. five: as transformers 5 saves it, added tokens in tokenizer.json alone. alone: that,
    less the tokenizer_config.json. hub: as the Gemmas on the hub have it, with the older files
    beside. sparse: as the hub, but the only added tokens are the control pieces and the turn tags,
    and these are not special.
    """
    transformers = pytest.importorskip("transformers")
    folder.mkdir()
    shutil.copy(model, folder)
    if layout == "bare":
        return folder
    Tokenizer.load(folder).save(folder / "first")
    transformers.AutoTokenizer.from_pretrained(folder / "first").save_pretrained(folder)
    shutil.rmtree(folder / "first")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert "added_tokens_decoder" not in config
    if layout in ("five", "alone"):
        if layout == "alone":
            (folder / "tokenizer_config.json").unlink()
        return folder
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    raw["model"]["merges"] = list(map(" ".join, raw["model"]["merges"]))
    if layout == "sparse":
        raw["added_tokens"] = [{**token, "special": token["id"] < 4}
                               for token in raw["added_tokens"]
                               if token["id"] < 4 or token["content"] in TURNS]
    config = {key: config[key] for key in config if key.endswith("_token")} | {
        "tokenizer_class": "GemmaTokenizer", "additional_special_tokens": TURNS,
        "added_tokens_decoder": {token["id"]: {key: token[key] for key in token if key != "id"}
                                 for token in raw["added_tokens"]}}
    (folder / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({
        "additional_special_tokens": TURNS, "bos_token": {"content": "<bos>", "lstrip": False}}))
    (folder / "added_tokens.json").write_text("{}")
    return folder


EXPORTS = ["tiny bare append", "tiny bare gap", "tiny bare reserved",
           "tiny five append", "tiny five gap", "tiny five reserved",
           "tiny alone append", "tiny hub append", "tiny hub gap", "tiny hub reserved",
           "tiny sparse append", "tiny sparse reserved", "gemma2 five append"]


@pytest.fixture(scope="module", params=EXPORTS)
def export(request, tmp_path_factory):
    """An export: its tokenizer, its folder, and how often a space may be repeated in a text.

    Longer runs of spaces than the longest piece are cut otherwise by transformers' tokenizers.
    """
    which, layout, way = request.param.split()
    model = (request.getfixturevalue("tiny_dir") / "tokenizer.model" if which == "tiny"
             else request.getfixturevalue("gemma2_tokenizer_model"))
    folder = tmp_path_factory.mktemp("export")
    tokenizer = Tokenizer.load(write_base(model, layout, folder / "base"))
    tokenizer.add_tokens(TOOLS, "reserved" if way == "reserved" else "append",
                         tokenizer.vocab_size + 5 if way == "gap" else None)
    tokenizer.save(folder / "out")
    return tokenizer, folder / "out", 4 if which == "tiny" else 31


@pytest.fixture(scope="module")
def theirs(export):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(export[1])


@pytest.fixture(scope="module")
def readers(export, theirs):
    """What reads the export: AutoTokenizer, and the tokenizers package where it has a file."""
    _, folder, _ = export
    readers = [(lambda text: theirs.encode(text, add_special_tokens=False), theirs.decode)]
    if (folder / "tokenizer.json").exists():
        raw = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
        readers.append((lambda text: raw.encode(text, add_special_tokens=False).ids, raw.decode))
    return readers


@BOUNDED
@given(text=TEXTS)
def test_all_readers_of_an_export_agree(export, readers, text):
    """They match control and new tokens in a text, and read a U+2581 as a space."""
    tokenizer, _, spaces = export
    text = re.sub(f" {{{spaces},}}", spaces * " ", text.replace("▁", ""))
    ids = matched(tokenizer, text)
    for encode, decode in readers:
        assert encode(text) == ids
        assert decode(ids, skip_special_tokens=False) == text
        assert decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_control=True)


def test_the_files_of_an_export_agree(export, theirs):
    tokenizer, folder, _ = export
    model = saved_processor(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = {int(i): token for i, token in config["added_tokens_decoder"].items()}
    for token, i in tokenizer.new_tokens.items():
        assert model.id_to_piece(i) == added[i]["content"] == token
        assert added[i]["special"] is added[i]["normalized"] is False
    assert all(model.id_to_piece(i) == token["content"] for i, token in added.items())
    assert len(theirs) == tokenizer.vocab_size
    names = {path.name for path in folder.iterdir()}
    assert names - {"tokenizer.json"} == {"tokenizer.model", "tokenizer_config.json"}
    if "tokenizer.json" in names:
        raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        assert {token.pop("id"): token for token in raw["added_tokens"]} == added
        assert sorted(raw["model"]["vocab"].values()) == list(range(tokenizer.vocab_size))


@pytest.mark.parametrize("export", [each for each in EXPORTS if each[:4] == "tiny"], indirect=True)
def test_an_export_is_a_base_that_is_exported_as_it_is(export, tmp_path):
    _, folder, _ = export
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.add_tokens(TOOLS) == list(tokenizer.new_tokens.values())
    tokenizer.save(tmp_path)
    assert_same_files(tmp_path, folder)


@pytest.mark.parametrize("image_in_vocabulary", [True, False])
def test_a_tokenizer_json_forgets_what_gives_way(tiny_dir, tmp_path, image_in_vocabulary):
    """Two tokens after the table, of which one gets a successor."""
    tokenizers = pytest.importorskip("tokenizers")
    base = write_base(tiny_dir / "tokenizer.model", "five", tmp_path / "base")
    raw = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    late = {"<image_soft_token>": 512, "<late>": 513}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    raw["added_tokens"] += [{"id": i, "content": token, "special": True, **flags}
                            for token, i in late.items()]
    if image_in_vocabulary:
        raw["model"]["vocab"] |= late
    (base / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    tokenizer = Tokenizer.load(base)
    assert tokenizer.vocab_size == 514
    assert tokenizer.add_tokens(TOOLS[:1], first=512) == [512]
    tokenizer.save(tmp_path / "out")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert theirs.get_vocab_size() == 513 and theirs.id_to_token(512) == TOOLS[0]
    assert [theirs.token_to_id(token) for token in late] == [None, None]


@pytest.mark.parametrize("raw, expected", [
    ({"model": {"vocab": {}}, "added_tokens": [{"id": 107, "content": "<a>"}]}, ["107", "'<a>'"]),
    ({"model": {"vocab": {}}, "added_tokens": [{"id": 600, "content": "<a>"}]}, ["600", "'<a>'"]),
    ({"model": {"vocab": {}}, "added_tokens": ["<a>"]}, ["Gemma"]),
    ({"model": {}, "added_tokens": []}, ["Gemma"]),
    ({"model": {"vocab": [["a", 0.0]]}, "added_tokens": []}, ["Gemma"]),
    ([], ["JSON object"]),
])
def test_a_tokenizer_json_that_disagrees_is_refused(tiny_dir, tmp_path, raw, expected):
    shutil.copy(tiny_dir / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {}}')
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    line = refusal(Tokenizer.load(tmp_path).save, tmp_path / "out")
    for word in [str(tmp_path / "tokenizer.json"), *expected]:
        assert word in line
    assert not (tmp_path / "out").exists()


def test_only_tokenizer_files_are_asked_of_the_hub(tiny_dir, monkeypatch):
    asked = {}

    def snapshot_download(name, *, allow_patterns):
        asked[name] = allow_patterns
        return tiny_dir

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert Tokenizer.load("google/gemma-2-2b-it").vocab_size == 512
    assert asked == {"google/gemma-2-2b-it": list(FILES)}
