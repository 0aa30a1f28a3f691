"""What single words of a JSON schema mean: to the grammar that keeps calls to it, and to the check.

JSON Schema, draft 2020-12, with what data sets write instead of it.
"""

# JSON Schema's types, and the Python values that are of them. True is no integer though.
TYPES = {"string": str, "integer": int, "number": int | float, "boolean": bool, "null": type(None),
         "array": list, "object": dict}

# What data sets say beside JSON Schema's words; a word that nobody knows, `any` too, is any type.
ALIASES = {"dict": "object", "float": "number", "tuple": "array"}


def type_words(schema: dict) -> list[str]:
    """The types that a schema names, as it names them; none where it says nothing of them."""
    words = schema.get("type") or []
    return [words] if isinstance(words, str) else words


def kinds(schema: dict) -> set[str]:
    """The same in JSON Schema's words, all of them for any type; with `number` goes `integer`."""
    words = {ALIASES.get(word, word) for word in type_words(schema)}
    if not words or words - TYPES.keys():
        return {*TYPES}
    return words | {"integer"} if "number" in words else words


def is_of(value: object, kinds: set[str]) -> bool:
    """Whether a JSON value is of one of these types."""
    return any(isinstance(value, TYPES[kind]) for kind in kinds
               if not isinstance(value, bool) or kind == "boolean")


def choices(schema: dict) -> list | None:
    """The values that `enum` and `const` leave; None: they say nothing."""
    if "const" not in schema:
        return schema.get("enum")
    found = [schema["const"]]
    return [value for value in found if is_in(value, schema["enum"])] if "enum" in schema else found


def is_in(value: object, choices: list) -> bool:
    """Whether a JSON value is among others. Python has True == 1, JSON has not."""
    return any(value == choice and isinstance(value, bool) == isinstance(choice, bool)
               for choice in choices)


def names(schema: dict) -> dict[str, object]:
    """The keys that a schema names of an object, by `properties` or `required`, in order."""
    required = schema.get("required")
    return dict.fromkeys([*(schema.get("properties") or ()),
                          *(required if isinstance(required, list) else ())])


def others(schema: dict) -> object:
    """What it lets a key be that `properties` does not name; False: there is none but those that
    another word names. So it is, other than in JSON Schema, where `additionalProperties` is absent
    and there are properties: they are a function's parameters, and it has no more."""
    return schema.get("additionalProperties",
                      "properties" not in schema or "patternProperties" in schema)


def target(path: object, root: dict) -> object:
    """What a `$ref` leads to: a part of the `root` schema by a JSON pointer (RFC 6901) after `#`.

    None where it leads out of the schema or nowhere.
    """
    first, *parts = str(path).split("/")
    found: object = root if first == "#" else None
    for part in parts:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and part.isdecimal():
            found = found[int(part)] if int(part) < len(found) else None
        else:
            found = found.get(part) if isinstance(found, dict) else None
    return found
