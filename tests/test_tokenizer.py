"""Tokenizer: text comes back and is never a control token; new tokens keep their ids."""

import itertools
import json
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
       "<end_of", "_turn>", "<<end_of_turn>>", "end_of_turn", '{"name": "get_weather"}', "1234"]
TEXTS = st.lists(st.one_of(st.sampled_from(TAGS), st.sampled_from(ODD), st.text(max_size=6)),
                 max_size=8).map("".join)


def refusal(call, *args, **kwargs):
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


@BOUNDED
@given(text=TEXTS)
def test_other_text_is_what_sentencepiece_makes_of_it(base, plain, text):
    text = text.replace("▁", "")
    assume(not any(tag in text for tag in base._ids))
    assert base.encode(text) == plain.encode(text)


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


def test_every_character_of_one_byte_and_every_byte_piece(base):
    text = "".join(map(chr, range(0x250)))
    assert base.decode(base.encode(text)) == text
    assert "".join(base.decode(base.encode(c)) for c in text) == text


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
    tokenizer = Tokenizer.load(gemma3_like(tiny_dir, tmp_path / "base"))
    assert tokenizer.add_tokens(TOOLS[:2], first=512) == [512, 513]  # the text-only Gemma 3
    assert tokenizer.decode([512]) == "<tool_call>"
    assert "image" in refusal(tokenizer.token_id, "<image_soft_token>")
    tokenizer.save(tmp_path / "out")
    text = (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert "<image_soft_token>" not in text and '"boi_token": "<unused9>"' in text
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
    for path in saved.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


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
    ({"added_tokens_decoder": {"-1": {"content": "|"}}}, ["-1"]),
    ({"added_tokens_decoder": {"x": {"content": "<eot>"}}}, ["added tokens"]),
    ({"added_tokens_decoder": {"7": "<unused0>"}}, ["added tokens"]),
    ({"added_tokens_decoder": {"7": {}}}, ["added tokens"]),
    ({"added_tokens_decoder": {"7": {"content": 7}}}, ["7", "'<unused0>'"]),
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


@pytest.mark.parametrize("mode, first", [("append", None), ("append", 520), ("reserved", None)])
@pytest.mark.parametrize("with_config", [True, False])
def test_a_tokenizer_json_grows_too(tiny_dir, tmp_path, mode, first, with_config):
    transformers = pytest.importorskip("transformers")
    Tokenizer.load(tiny_dir).save(tmp_path / "plain")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    theirs.save_pretrained(tmp_path / "base")
    shutil.copy(tiny_dir / "tokenizer.model", tmp_path / "base")
    if not with_config:  # transformers 5 leaves the added tokens to tokenizer.json
        config = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
        assert "added_tokens_decoder" not in config
        (tmp_path / "base" / "tokenizer_config.json").unlink()
    assert (tmp_path / "base" / "tokenizer.json").exists()
    tokenizer = Tokenizer.load(tmp_path / "base")
    ids = tokenizer.add_tokens(TOOLS, mode, first)
    for source, folder in itertools.pairwise(["base", "out", "again"]):
        if source == "out":
            tokenizer = Tokenizer.load(tmp_path / source)
        tokenizer.save(tmp_path / folder)
        assert (tmp_path / folder / "tokenizer.json").exists()
        tokenizers = pytest.importorskip("tokenizers")
        raw = tokenizers.Tokenizer.from_file(str(tmp_path / folder / "tokenizer.json"))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert len(theirs) == raw.get_vocab_size() == tokenizer.vocab_size
        for token, i in zip(TOOLS, ids, strict=True):
            assert theirs.convert_tokens_to_ids(token) == raw.token_to_id(token) == i
            mixed = [*tokenizer.encode("a"), i, tokenizer.end_of_turn]
            text = f"a{token}<end_of_turn>"
            assert raw.encode(text, add_special_tokens=False).ids == mixed
            assert theirs.encode(text, add_special_tokens=False) == mixed
            assert theirs.decode(mixed, skip_special_tokens=True) == f"a{token}"
        for text in PROMPTS:
            assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)


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
