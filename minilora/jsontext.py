"""JSON as text: read strictly, written in one way.

What a model or a data set holds is taken as it stands or refused with a reason. What is written is
`json.dumps(value, ensure_ascii=False)`: so does the `tojson` filter of chat templates, and a
template can render the very same text.
"""

import itertools
import json
import math
import re

MAX_DEPTH = 64  # levels of objects and lists in one JSON value
MAX_DIGITS = 4300  # of an integer, its sign included: what Python reads where nobody says else
TOO_DEEP = "JSON nested deeper than {} levels"


def _unique(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        raise ValueError(twice(next(key for key, _ in pairs if key in seen or seen.add(key))))
    return value


def twice(key: str) -> str:
    """What is wrong with an object that has this key twice."""
    return f"key {key[:40]!r} occurs twice in one object"


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is not a JSON number that can be held")
    return number


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits; at most {MAX_DIGITS} can be held")
    return int(text)


STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_int=_whole,
                          parse_constant=_finite)
_SPACE = re.compile(r"[ \t\r\n]*")


def skip_space(text: str, at: int) -> int:
    """Where the white space at `at` ends."""
    return _SPACE.match(text, at).end()


def check_value(value: object, most: int = MAX_DEPTH) -> None:
    """Refuses what decodes but cannot be written again: bottomless nesting, lone surrogates.

    Raises ValueError, for nesting where it goes deeper than `most` levels.
    """
    level, depth = [value], 0
    while level:
        for text in level:
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise ValueError("half a surrogate pair (\\ud800 …), or bytes that are not "
                                     "UTF-8, in a string") from None
        inner = [[*item.keys(), *item.values()] if isinstance(item, dict) else item
                 for item in level if isinstance(item, dict | list)]
        if inner and depth == most:
            raise ValueError(TOO_DEEP.format(most))
        level, depth = list(itertools.chain.from_iterable(inner)), depth + 1


def decode_json(text: str, start: int = 0) -> tuple[object, int]:
    """The JSON value that begins at `start` (white space skipped) and where it ends.

    Stricter than `json`: duplicate keys, NaN and Infinity, numbers that overflow, half surrogate
    pairs and nesting past `MAX_DEPTH` raise ValueError, whose message says what is wrong.
    """
    try:
        value, end = STRICT.raw_decode(text, skip_space(text, start))
    except json.JSONDecodeError as error:
        near = text[error.pos:error.pos + 20]
        raise ValueError(f"not JSON: {error.msg} at {near!r}" if near else
                         f"not JSON: {error.msg} at the end of the text") from None
    except RecursionError:
        raise ValueError(TOO_DEEP.format(MAX_DEPTH)) from None
    check_value(value)
    return value, end


def load_json(text: str) -> object:
    """The one JSON value that `text` is; ValueError as `decode_json`, or for text that follows."""
    value, end = decode_json(text)
    if text[end:].strip():
        raise ValueError(f"text after the JSON value: {text[end:].strip()[:20]!r}")
    return value


def dump_json(value: object) -> str:
    """JSON as every dialect and every chat template here writes it."""
    return json.dumps(value, ensure_ascii=False)
