"""SentencePiece plus new tokens; text is never mistaken for control tokens.

    "<end_of_turn>" typed by somebody  ──encode──►  < end _ of _ turn >     ordinary pieces
    the end of a turn                  ──token_id─►  107                     the control token

Both decode to the same string, only one of them ends a turn. SentencePiece itself would give 107
for both, because Gemma's vocabulary declares its turn tags "user defined", which are matched as a
whole wherever they stand in a text. The encoder here reads the same vocabulary with those pieces
declared "control" instead: such pieces are never matched in text, and all else is as it was.

A tokenizer.model is a protobuf message (`sentencepiece_model.proto` of google/sentencepiece): the
pieces are its repeated field 1, each with its text (field 1), score (2) and type (3). That little
is read and written here by hand, so the protobuf package is not needed.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from minilora.config import UserError, read_file
from minilora.files import read_object, write_file
from minilora.weights import locate

FILES = ("tokenizer.model", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja")
NEW_TOKENS = "minilora_new_tokens"  # key of tokenizer_config.json: the tokens that were added here

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)  # types of a piece; 6 is a byte

# A user-defined piece is a control token if it looks like a tag and is not an html tag. In Gemma 2
# these are <mask>, <2mass>, [@BOS@], <unused0> to <unused99>, the turn tags and [toxicity=0]; runs
# of spaces, tabs and newlines and the html tags are plain text.
_TAG = re.compile(r"<[^<>\s]*[A-Za-z][^<>\s]*>|\[[^\[\]\s]*[A-Za-z][^\[\]\s]*\]")
_HTML = re.compile(r"</?(a|b|i|p|q|s|u|h[1-6]|br|hr|em|strong|small|sub|sup|del|ins|mark|code|pre|"
                   r"kbd|div|span|blockquote|ul|ol|li|dl|dt|dd|img|table|caption|thead|tbody|tfoot|"
                   r"tr|th|td)/?>")

MOST_GAP = 10_000  # ids between the pieces and an added token, which get placeholders

# What a vocabulary must give back as it was: spaces at both ends and in runs, characters that NFKC
# changes, one that no vocabulary has.
_PROBE = "  a\t b \n\n ﬁ ① e\u0301 \U000fabcd  "


class Tokenizer:
    """Text to ids and back, with the control tokens and the new tokens by name.

    pad, eos, bos, start_of_turn, end_of_turn: ids. stop_ids: where generation stops. vocab_size:
    one past the largest id. new_tokens: the tokens added by `add_tokens` (in this process, or
    before a `save` that was loaded), with their ids, in the order in which they were added.
    """

    def __init__(self, folder: Path) -> None:
        """See `load`."""
        self._folder, self._source = folder, str(folder / "tokenizer.model")
        if not os.path.exists(self._source):
            raise UserError(f"{self._source}: no such file; minilora needs the SentencePiece file: "
                            "copy it from the base model")
        self._entries, self._rest = _read_model(read_file(self._source), self._source)
        self._config, self._forgotten = _read_object(folder / "tokenizer_config.json"), set()
        types = {i: kind for i, entry in enumerate(self._entries)
                 if (kind := _read_type(entry, self._source)) != NORMAL}
        reader = self._processor(self._entries)
        try:
            self._pieces: list[str] = reader.id_to_piece(list(range(len(self._entries))))
        except UnicodeDecodeError:
            raise _damaged(self._source) from None

        self.new_tokens = self._read_new_tokens(types)
        tags = {i for i, kind in types.items() if kind == USER_DEFINED and (
            _is_tag(self._pieces[i]) or i in self.new_tokens.values())}
        named = tags | {i for i, kind in types.items() if kind in (CONTROL, UNKNOWN)}
        self._added = {i: _added_token(self._pieces[i], special=i in named)
                       for i, kind in types.items() if i in named or kind == USER_DEFINED}
        named |= self._read_added_tokens()
        self._ids = {self._pieces[i]: i for i in sorted(named)}  # control and new tokens
        self._control = named | {i for i, kind in types.items() if kind == UNUSED}
        self._control |= set(range(len(self._entries), self.vocab_size))

        demoted = [_write_piece(self._pieces[i], CONTROL) if i in tags else entry
                   for i, entry in enumerate(self._entries)]
        self._encoder = self._processor(demoted)
        by_byte = [reader.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if not all(map(reader.is_byte, by_byte)):
            raise UserError(f"{self._source}: lacks byte pieces, without which some text has no "
                            "ids; train the vocabulary with byte_fallback")
        self._bytes = {i: byte for byte, i in enumerate(by_byte)}
        self._block = [by_byte[byte] for byte in "▁".encode()]
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise _lossy(self._source)

        self.pad, self.eos, self.bos = reader.pad_id(), reader.eos_id(), reader.bos_id()
        self.start_of_turn = self._ids.get("<start_of_turn>", -1)
        self.end_of_turn = self._ids.get("<end_of_turn>", -1)
        self.stop_ids: tuple[int, ...] = (self.eos, self.end_of_turn)
        for name in ("pad", "eos", "bos", "start_of_turn", "end_of_turn"):
            if (i := getattr(self, name)) < 0:
                raise UserError(f"{self._source}: has no <{name}> token; minilora reads the "
                                "vocabularies of Gemma 1, 2 and 3")
            self._added[i] = {**self._added[i], "special": True}

    @classmethod
    def load(cls, source: str | Path) -> "Tokenizer":
        """Reads `source`, a folder with a tokenizer.model or a hub id.

        Raises UserError where the file is missing or damaged, cannot hold every text, or disagrees
        with the tokenizer_config.json beside it.
        """
        return cls(locate(source, FILES))

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def fingerprint(self) -> str:
        """A hash that two tokenizers share only if they give the same ids to texts and tokens."""
        known = json.dumps(sorted(self._ids.items())).encode()
        return hashlib.sha256(self._encoder.serialized_model_proto() + known).hexdigest()

    def _processor(self, entries: list[bytes]) -> sentencepiece.SentencePieceProcessor:
        try:
            model = _write_model(entries, self._rest)
            return sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, UnicodeDecodeError):  # the latter from its own error message
            raise _damaged(self._source) from None

    def _check(self, path: Path, i: object, token: object) -> None:
        """Refuses the file `path`, which says that `i` is `token`, if the pieces say otherwise."""
        known = type(i) is int and 0 <= i < len(self._pieces)
        if not known or self._pieces[i] != token:
            got = repr(self._pieces[i]) if known else f"{len(self._pieces)} tokens"
            raise UserError(f"{path}: says that token {i} is {token!r}, but {self._source} has "
                            f"{got}; take both files from the same model")

    def _read_new_tokens(self, types: dict[int, int]) -> dict[str, int]:
        """The tokens that an earlier `save` recorded, checked against the pieces."""
        path, tokens = self._folder / "tokenizer_config.json", self._config.get(NEW_TOKENS, {})
        if not isinstance(tokens, dict):
            raise UserError(f"{path}: {NEW_TOKENS} must map tokens to ids")
        for token, i in tokens.items():
            self._check(path, i, token)
            if types.get(i) != USER_DEFINED:
                raise UserError(f"{path}: {NEW_TOKENS} has {token!r}, which is no new token in "
                                f"{self._source}; take both files from the same model")
        return dict(tokens)

    def _read_added_tokens(self) -> set[int]:
        """Added tokens must agree with the pieces; returns the ids of those that are none.

        Such as follow the pieces, as Gemma 3's <image_soft_token>, and tags that an <unusedN> has
        been put to use as, as FunctionGemma's. The list is in tokenizer_config.json, or, as
        transformers 5 writes it, in tokenizer.json alone.
        """
        path = self._folder / "tokenizer_config.json"
        added = self._config.get("added_tokens_decoder")
        if added is None:
            path = self._folder / "tokenizer.json"
            added = _read_object(path).get("added_tokens", [])
        try:
            items = added.items() if isinstance(added, dict) else ((t["id"], t) for t in added)
            added = {int(i): {key: value for key, value in token.items() if key != "id"}
                     for i, token in items}
            tokens = sorted((i, token["content"]) for i, token in added.items())
            if not all(isinstance(token, str) for _, token in tokens):
                raise TypeError
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{path}: its added tokens must have ids and texts") from None
        no_pieces, known = set(), set(self._pieces)
        for i, token in tokens:
            after = i >= len(self._pieces)
            if after or (i >= 0 and re.fullmatch(r"<unused\d+>", self._pieces[i])
                         and _is_tag(token) and token != self._pieces[i]):
                if not token or token in known:
                    raise UserError(f"{path}: says that token {i} is {token!r}, which is no text "
                                    "or another token; take both files from the same model")
                if i >= len(self._pieces) + MOST_GAP:
                    raise UserError(f"{path}: says that token {i} is {token!r}, but "
                                    f"{self._source} ends with {len(self._pieces) - 1}; take both "
                                    "files from the same model")
                if after:
                    self._extend(i, token)
                else:
                    self._pieces[i] = token
                known.add(token)
                no_pieces.add(i)
            self._check(path, i, token)
        self._added.update(added)
        return no_pieces

    def _extend(self, i: int, token: str) -> None:
        """Gives `token` the id `i`, after all others; ids between get placeholders."""
        # llama.cpp's converter, too, calls a row without a piece [PAD…].
        self._pieces += [f"[PAD{n}]" for n in range(len(self._pieces), i)] + [token]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: never <bos>, a control token or a new token, whatever the text holds.

        `decode` gives the text back. Raises UserError for half a surrogate pair, which is no text.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"text has half of a surrogate pair (U+{ord(text[error.start]):04X}) "
                            f"at character {error.start}; write the whole character") from None
        # SentencePiece writes spaces as ▁ (U+2581), so a ▁ in the text would come back as a space:
        # it goes in by its bytes.
        first, *others = text.split("▁")
        ids = self._encoder.encode(first)
        for part in others:
            ids += self._block + self._encoder.encode(part)
        return ids

    def decode(self, ids: Iterable[int], skip_control: bool = False) -> str:
        """The text of `ids`, control and new tokens by their strings.

        `skip_control` leaves out <bos>, <eos>, <pad>, the turn tags and their like, and keeps the
        new tokens, which are part of what the model says. Bytes that make no UTF-8 character become
        U+FFFD. Raises UserError for an id that the vocabulary does not have.
        """
        text, run, size = [], bytearray(), self.vocab_size
        for i in ids:
            if not 0 <= i < size:
                raise UserError(f"id {i} is not among the {size} of {self._source}")
            if i in self._bytes:
                run.append(self._bytes[i])
                continue
            if run:
                text.append(run.decode("utf-8", "replace"))
                run.clear()
            if i not in self._control:
                text.append(self._pieces[i].replace("▁", " "))
            elif not (skip_control and self._added.get(i, {}).get("special", True)):
                text.append(self._pieces[i])
        return "".join(text) + run.decode("utf-8", "replace")

    def texts(self) -> dict[int, bytes]:
        """What each id adds to a text, in UTF-8; control and new tokens are not among them."""
        texts = {i: piece.replace("▁", " ").encode() for i, piece in enumerate(self._pieces)
                 if i not in self._control}
        return texts | {i: bytes([byte]) for i, byte in self._bytes.items()}

    def knows(self, token: str) -> bool:
        """Whether this is a control token or a new token."""
        return token in self._ids

    def token_id(self, token: str) -> int:
        """The id of a control token or a new token. Raises UserError for any other string."""
        if token not in self._ids:
            raise UserError(f"{token!r} is not a control token or a new token of {self._source}; "
                            "add it with add_tokens")
        return self._ids[token]

    def add_tokens(self, tokens: Iterable[str], mode: str = "append",
                   first: int | None = None) -> list[int]:
        """Makes tokens of strings and returns their ids. One that is known already keeps its id.

        `append`: ids `first`, `first` + 1, … where `first` is the number of rows of the model's
        table (default: `vocab_size`; the two may differ). `reserved`: takes over <unusedN> slots.
        Raises UserError where a string cannot be a token, or there are no ids left for it.
        """
        tokens = list(tokens)
        fresh = [token for token in dict.fromkeys(tokens) if token not in self._ids]
        for token in fresh:
            if not re.fullmatch(r"[^\s▁\ud800-\udfff]+", token):
                raise UserError(f"new token {token!r}: must be text without spaces")
            if self._encoder.piece_to_id(token) != self._encoder.unk_id():
                raise UserError(f"new token {token!r}: is plain text in {self._source}; choose "
                                "another string, such as <tool_call>")
        if mode == "append":
            first = self.vocab_size if first is None else first
            slots = range(first, first + len(fresh))
            if fresh:
                self._shorten(first)
            for token, i in zip(fresh, slots, strict=True):
                self._extend(i, token)
            self._control.update(range(len(self._entries), self.vocab_size))
        elif mode == "reserved":
            slots = [i for token, i in self._ids.items()
                     if re.fullmatch(r"<unused\d+>", token) and i < len(self._entries)][:len(fresh)]
            if len(slots) < len(fresh):
                raise UserError(f"{len(fresh)} new tokens but {len(slots)} <unusedN> slots in "
                                f"{self._source}; append them instead")
            for token, i in zip(fresh, slots, strict=True):
                del self._ids[self._pieces[i]]
                self._forgotten.add(self._pieces[i])
                self._pieces[i] = token
        else:
            raise UserError(f"new tokens go to append or reserved, not to {mode!r}")
        for token, i in zip(fresh, slots, strict=True):
            self._ids[token] = self.new_tokens[token] = i
            self._added[i] = _added_token(token, special=False)
        return [self._ids[token] for token in tokens]

    def _shorten(self, rows: int) -> None:
        """Forgets tokens that come after the pieces and for which a table of `rows` has no row.

        That is <image_soft_token> on the text-only Gemma 3: its id is one past the table.
        """
        for i in range(rows, self.vocab_size):
            if i < len(self._entries) or self._pieces[i] in self.new_tokens:
                raise UserError(f"the model has {rows} rows, but {self._source} has a piece "
                                f"{self._pieces[i]!r} of id {i}; take both from the same model")
        for i, token in enumerate(self._pieces[rows:], rows):
            self._forgotten.add(token)
            self._ids.pop(token, None)
            self._added.pop(i, None)
        del self._pieces[rows:]

    def save(self, folder: str | Path, chat_template: str | None = None) -> None:
        """Writes the tokenizer files of the hub's layout into `folder`, new tokens in place.

        tokenizer.model with the new tokens appended or renamed (ids between the old pieces and the
        first new one get unused placeholders), tokenizer_config.json with them and `chat_template`
        (None keeps the base's), and tokenizer.json where the base has one. New tokens are not
        "special", so that they survive transformers' `decode(skip_special_tokens=True)`. Raises
        UserError where the base's tokenizer.json disagrees or a file cannot be written.
        """
        config = {  # what transformers 5 asks of a folder that has no tokenizer.json
            "tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False,
            "bos_token": self._pieces[self.bos], "eos_token": self._pieces[self.eos],
            "pad_token": self._pieces[self.pad], "unk_token": self._pieces[self._encoder.unk_id()],
            "mask_token": "<mask>" if "<mask>" in self._ids else None,
            "clean_up_tokenization_spaces": False, **_without(self._config, self._forgotten)}
        config["added_tokens_decoder"] = {str(i): self._added[i] for i in sorted(self._added)}
        config[NEW_TOKENS] = self.new_tokens
        files = {"tokenizer.model": self._model()}
        template = self._folder / "chat_template.jinja"  # transformers prefers it to the config's
        if chat_template is not None:
            config["chat_template"] = chat_template
        elif template.exists():
            files[template.name] = read_file(template)
        files["tokenizer_config.json"] = _json(config, indent=2)
        if raw := _read_object(self._folder / "tokenizer.json"):
            files["tokenizer.json"] = self._tokenizer_json(raw)
        for name, data in files.items():
            write_file(Path(folder) / name, data)

    def _model(self) -> bytes:
        """tokenizer.model with the new tokens."""
        entries = list(self._entries)
        end = max(self.new_tokens.values(), default=-1) + 1
        for i in range(len(entries), end):
            kind = USER_DEFINED if i in self._added else UNUSED
            entries.append(_write_piece(self._pieces[i], kind))
        for token, i in self.new_tokens.items():
            entries[i] = _write_piece(token, USER_DEFINED)
        return _write_model(entries, self._rest)

    def _tokenizer_json(self, raw: dict) -> bytes:
        """The base's tokenizer.json with the new tokens in its vocabulary.

        Its added tokens are those of the tokenizer_config.json, so that both match the same strings
        in a text, which are those that SentencePiece matches, and call the same ones special.
        """
        path, new = self._folder / "tokenizer.json", set(self.new_tokens.values())
        try:
            added = {token["id"]: token for token in raw["added_tokens"]
                     if token["content"] not in self._forgotten}
            for i in sorted(added.keys() - new):
                self._check(path, i, added[i]["content"])
            # Every id gets an entry in the vocabulary: the tokenizers package makes up its own ids
            # for added tokens that have none there.
            vocab = {token: i for token, i in raw["model"]["vocab"].items()
                     if i < len(self._entries) and i not in new}
            vocab |= {self._pieces[i]: i
                      for i in sorted(new | set(range(len(self._entries), self.vocab_size)))}
            model = {**raw["model"], "vocab": vocab}
        except (AttributeError, KeyError, TypeError):
            raise UserError(f"{path}: not the tokenizer.json of a Gemma; delete it, or take it "
                            "from the base model") from None
        added |= {i: {"id": i, **token} for i, token in self._added.items()}
        return _json({**raw, "added_tokens": [added[i] for i in sorted(added)], "model": model})


def _is_tag(piece: str) -> bool:
    return bool(_TAG.fullmatch(piece)) and not _HTML.fullmatch(piece)


def _read_object(path: Path) -> dict:
    """The JSON object in a file; an empty one where there is no file."""
    return read_object(path) if path.exists() else {}


def _added_token(token: str, special: bool) -> dict:
    """How transformers writes down a token that is matched as a whole."""
    return {"content": token, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": special}


def _without(value: object, forgotten: set[str]) -> object:
    """A JSON value less the entries that name a forgotten token (keys such as image_token)."""
    def names_one(item: object) -> bool:
        token = item.get("content") if isinstance(item, dict) else item  # {…} is an added token
        return isinstance(token, str) and token in forgotten

    if isinstance(value, dict):
        return {key: _without(item, forgotten) for key, item in value.items()
                if not names_one(item)}
    if isinstance(value, list):
        return [_without(item, forgotten) for item in value if not names_one(item)]
    return value


def _json(value: object, indent: int | None = None) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode()


# --- tokenizer.model: protobuf by hand ------------------------------------------------------------

def _damaged(source: str) -> UserError:
    return UserError(f"{source}: not a whole SentencePiece model; download it again")


def _lossy(source: str) -> UserError:
    return UserError(f"{source}: does not give text back as it was; a Gemma vocabulary has byte "
                     "fallback, no dummy prefix, and keeps spaces and characters")


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, seven bits a byte, lowest first; and where it ends.

    Raises IndexError where it does not, within the data and the ten bytes of 64 bits.
    """
    number = shift = 0
    while shift < 70:
        number |= (data[at] & 0x7F) << shift
        if data[at] < 0x80:
            return number, at + 1
        at, shift = at + 1, shift + 7
    raise IndexError


def _write_varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _fields(data: bytes, source: str) -> Iterator[tuple[int, int | bytes, bytes]]:
    """Every field of a message: its number, its value, and all its bytes."""
    at = 0
    try:
        while at < len(data):
            start = at
            key, at = _read_varint(data, at)
            if key & 7 == 0:  # a varint
                value, at = _read_varint(data, at)
            else:  # eight bytes, a length and that many bytes, or four bytes
                size, at = {1: (8, at), 5: (4, at)}.get(key & 7) or _read_varint(data, at)
                value, at = data[at:at + size], at + size
            if at > len(data) or key & 7 in (3, 4, 6, 7) or not 8 <= key < 2**32:
                raise IndexError
            yield key >> 3, value, data[start:at]
    except IndexError:
        raise _damaged(source) from None


def _read_model(data: bytes, source: str) -> tuple[list[bytes], bytes]:
    """The messages of the pieces, and the bytes of all other fields.

    Refused here is what SentencePiece, up to 0.2.1 at least, trusts and can crash over: a table
    that changes characters (a trie of offsets that it follows unchecked), and models other than
    BPE. No Gemma has either.
    """
    entries, rest, kinds = [], [], []
    for number, value, field in _fields(data, source):
        if number == 1 and isinstance(value, bytes):
            entries.append(value)
            continue
        rest.append(field)
        if number in (2, 3, 5) and isinstance(value, bytes):  # trainer, normalizer, denormalizer
            inner = [(n, v) for n, v, _ in _fields(value, source)]
            if number != 2 and any(n == 2 and v != b"" for n, v in inner):  # the table
                raise _lossy(source)
            kinds += [v for n, v in inner if (number, n) == (2, 3)]
    if not entries:
        raise _damaged(source)
    if set(kinds) != {2}:
        raise UserError(f"{source}: is no BPE vocabulary, as those of Gemma 1, 2 and 3 are")
    return entries, b"".join(rest)


def _write_model(entries: list[bytes], rest: bytes) -> bytes:
    return b"".join(b"\x0a" + _write_varint(len(entry)) + entry for entry in entries) + rest


def _read_type(entry: bytes, source: str) -> int:
    """The type of a piece; its text is whole where that is not NORMAL."""
    # Nearly all of them: length and text, four bytes of a score, and last the type, NORMAL.
    if entry[:1] + entry[-7:-6] + entry[-2:] == b"\x0a\x15\x18\x01" and (
            entry[1] == len(entry) - 9 < 128):
        return NORMAL
    fields = [(number, value) for number, value, _ in _fields(entry, source)]
    texts, kinds = ([value for number, value in fields if number == n] for n in (1, 3))
    if len(texts) != 1 or len(kinds) > 1 or not {NORMAL, *kinds} <= {*range(1, 7)} or not (
            isinstance(texts[0], bytes) and texts[0] and b"\0" not in texts[0]):
        raise _damaged(source)
    return kinds[0] if kinds else NORMAL


def _write_piece(text: str, kind: int) -> bytes:
    """The message of a piece whose score does not matter, because text is never merged into it."""
    data = text.encode()
    return (b"\x0a" + _write_varint(len(data)) + data + b"\x15" + bytes(4)
            + b"\x18" + _write_varint(kind))
