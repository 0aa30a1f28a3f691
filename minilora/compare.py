"""Are these calls right? Calls are compared, never strings.

What is right is told in one of two ways:

    ToolCall("get_weather", {"city": "Paris"})                  exactly this call
    {"get_weather": {"city": ["Paris", "Paris, FR"], "unit": ["C", ""]}}
                            one of these values for each parameter; "" among them: may be left out

The second is the answer format of the Berkeley Function-Calling Leaderboard and is compared by the
rules of its `ast_checker.py` for Python (ShishirPatil/gorilla, bfcl_eval/eval_checker/ast_eval):

    name         that of the answer
    parameters   the schema's required ones, those whose answers have no "", and none that the
                 schema or the answer does not know
    type         the schema's: an integer serves as a float, but not inside a list; or that of the
                 answers, which are then compared as they are
    text         without case, spaces and , . / - _ * ^; a single quote is a double one
    list         item by item, in order
    object       an answer is an object of accepted values for each key, "" as above
    calls        as many as answers, in any order, each answer for one call

One thing differs. The leaderboard gives each answer, in the order of its file, the first call that
fits; here a call may pass its answer on, so that calls are right if any pairing makes them so.
"""

import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

from minilora.chat import ToolCall
from minilora.config import UserError
from minilora.jsontext import dump_json

Answer = ToolCall | dict
REASON = 1000  # characters


class Problem(NamedTuple):
    """What is wrong with calls: its kind, under which it is counted, and the particulars."""

    kind: str
    reason: str


def check_calls(calls: Sequence[ToolCall], tools: Sequence[dict],
                accepted: Sequence[Answer] | None) -> tuple[bool, str]:
    """Whether each call is one of those accepted and each of those is made, in any order.

    `tools` are the tools offered, bare or inside {"type": "function", "function": …}; the types of
    their schemas count where `accepted` lists values. No call is right where `accepted` is empty;
    any call is where it is None. Returns (ok, reason), the reason empty if ok. Raises UserError for
    an accepted answer that has neither form or calls a tool that is not offered.
    """
    problem = find_problem(calls, tools, accepted)
    return problem is None, problem.reason if problem else ""


def find_problem(calls: Sequence[ToolCall], tools: Sequence[dict],
                 accepted: Sequence[Answer] | None) -> Problem | None:
    """What keeps `calls` from being right, None if nothing does. Arguments as for `check_calls`.

    The reason is cut to `REASON` characters: what a model writes may be of any length.
    """
    problem = _find(calls, tools, accepted)
    if problem and len(problem.reason) > REASON:
        problem = problem._replace(reason=f"{problem.reason[:REASON]} …")
    return problem


def _find(calls: Sequence[ToolCall], tools: Sequence[dict],
          accepted: Sequence[Answer] | None) -> Problem | None:
    functions = functions_of(tools)
    for answer in accepted or ():
        check_answer(answer, functions)
    if accepted is None:
        return None if calls else Problem("no call", "expected a call, got none")
    if len(calls) != len(accepted):
        kind = ("number of calls" if calls and accepted else
                "unneeded call" if calls else "no call")
        return Problem(kind, f"expected {_count(len(accepted))}, got {_count(len(calls))}")
    problems = [[_problem(call, answer, functions) for answer in accepted] for call in calls]
    # Calls are matched to answers as a bipartite graph is: a call may take the answer of another
    # if that one finds a second (Kuhn's algorithm), so the verdict depends on no order.
    taken: dict[int, int] = {}  # answer → call

    def place(call: int, tried: set[int]) -> bool:
        for answer, problem in enumerate(problems[call]):
            if problem or answer in tried:
                continue
            tried.add(answer)
            if answer not in taken or place(taken[answer], tried):
                taken[answer] = call
                return True
        return False

    for call in range(len(calls)):
        if not place(call, set()):
            free = [answer for answer in range(len(accepted)) if answer not in taken]
            # The best explanation is against an answer of the same name.
            free.sort(key=lambda answer: _name(accepted[answer]) != calls[call].name)
            return problems[call][free[0]] or Problem(
                "wrong value", f"{calls[call].name}: called too often with such arguments")
    return None


def functions_of(tools: Sequence[dict]) -> dict[str, dict]:
    """Each tool's function by its name; of two with one name the first, as the leaderboard does."""
    bare = [tool.get("function", tool) for tool in tools]
    return {function["name"]: function for function in reversed(bare)}


def check_answer(answer: object, functions: dict[str, dict]) -> None:
    """Raises UserError for what is no accepted answer, or one of a tool that is not offered."""
    if isinstance(answer, ToolCall):
        return
    if not isinstance(answer, dict) or len(answer) != 1:
        raise UserError(f"accepted answer {answer!r}: expected a ToolCall or {{name: {{parameter: "
                        "[accepted values]}}")
    (name, parameters), = answer.items()
    if name not in functions:
        raise UserError(f"accepted answer calls {name!r}, which is not among the tools: "
                        f"{', '.join(functions) or 'none'}")
    inside = []  # objects among the accepted values, whose keys have lists of their own
    for key, accepted in _lists(parameters, name):
        for answer in accepted:
            inside += [(f"{name}.{key}", item)
                       for item in (answer if isinstance(answer, list) else [answer])
                       if isinstance(item, dict)]
    for where, item in inside:
        _lists(item, where)


def _lists(values: object, where: str) -> list[tuple[str, list]]:
    if not isinstance(values, dict):
        raise UserError(f"accepted answer of {where}: {values!r} is not an object")
    for key, accepted in values.items():
        if not isinstance(accepted, list):
            raise UserError(f"accepted answer of {where}: {key} is {accepted!r}; expected a list "
                            "of accepted values")
    return list(values.items())


def _count(number: int) -> str:
    return f"{number or 'no'} call" + ("" if number == 1 else "s")


def _name(answer: Answer) -> str:
    return answer.name if isinstance(answer, ToolCall) else next(iter(answer))


def _problem(call: ToolCall, answer: Answer, functions: dict[str, dict]) -> Problem | None:
    """What keeps `call` from being `answer`."""
    name = _name(answer)
    if call.name != name:
        return Problem("wrong name", f"called {call.name}, expected {name}")
    if isinstance(answer, ToolCall):
        return _exact_problem(call.arguments, answer.arguments, name)
    return _listed_problem(call.arguments, answer[name], functions[name], name)


# --- exactly this call ----------------------------------------------------------------------------

def _exact_problem(given: dict, expected: dict, where: str) -> Problem | None:
    for key in {**expected, **given}:
        if key not in given:
            return Problem("missing parameter", f"{where}: {key} is missing")
        if key not in expected:
            return Problem("unknown parameter", f"{where}: {key} is not expected")
        if not _same(given[key], expected[key]):
            alike = _json_type(given[key]) is _json_type(expected[key])
            return Problem("wrong value" if alike else "wrong type",
                           f"{where}: {key} is {dump_json(given[key])}, expected "
                           f"{dump_json(expected[key])}")
    return None


def _same(a: object, b: object) -> bool:
    """Equal as JSON values: 1 is 1.0, but true is not 1 (in Python it is) and "1" is not 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return _json_type(a) is _json_type(b) and a == b


def _json_type(value: object) -> type:
    """JSON has one type of number."""
    return float if type(value) is int else type(value)


# --- the leaderboard's rules ----------------------------------------------------------------------

# JSON Schema's words stand beside the leaderboard's own; "any" is a string there.
KINDS = {"string": str, "any": str, "integer": int, "float": float, "number": float,
         "boolean": bool, "array": list, "tuple": list, "dict": dict, "object": dict}


def _listed_problem(given: dict, accepted: dict[str, list], function: dict, where: str,
                    ) -> Problem | None:
    """Every required parameter, no unknown one, and of each an accepted value."""
    parameters = function.get("parameters") or {}
    known = parameters.get("properties") or {}
    for key in parameters.get("required") or ():
        if key not in given:
            return Problem("missing parameter", f"{where}: {key} is missing and required")
    for key, value in given.items():
        if key not in known or key not in accepted:
            return Problem("unknown parameter", f"{where}: {key} is not expected")
        schema = known[key] if isinstance(known[key], dict) else {}  # true: anything goes
        kind = _value_problem(value, accepted[key], schema)
        if kind:
            return Problem(kind, f"{where}: {key} is {dump_json(value)}, expected one of "
                                 f"{dump_json(accepted[key])}")
    for key, values in accepted.items():
        if key not in given and "" not in values:
            return Problem("missing parameter", f"{where}: {key} is missing, expected one of "
                                                f"{dump_json(values)}")
    return None


def _value_problem(value: object, accepted: list, schema: dict) -> str:
    """The kind of what is wrong with one argument; empty if it is right."""
    wanted = _kind_of(accepted)
    kind = _declared(schema) or wanted
    inner = _declared(schema.get("items")) if kind is list else None
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        value = float(value)
    if type(value) is not kind:
        if type(value) is not wanted:
            return "wrong type"
        return "" if value in accepted else "wrong value"
    # Items have the schema's type or, for some answer, that of its first item. An answer that is
    # no list, such as the "" of what may be left out, asks for none.
    if inner and not any(not isinstance(answer, list)
                         or all(type(item) in (inner, _kind_of(answer)) for item in value)
                         for answer in accepted):
        return "wrong type"
    return "" if _is_accepted(value, accepted, kind if wanted in (kind, None) else None,
                              inner) else "wrong value"


def _is_accepted(value: object, accepted: list, kind: type | None, inner: type | None) -> bool:
    """Whether a value of `kind`, a list's items of `inner`, is accepted; None: as it is."""
    if kind is None:
        return value in accepted
    if kind is dict:
        return any(_dict_fits(value, answer) for answer in accepted)
    if kind is list:
        lists = [[] if answer == "" else answer for answer in accepted if answer == ""
                 or isinstance(answer, list)]
        if inner is dict:
            return any(len(value) == len(answer) and all(map(_dict_fits, value, answer))
                       for answer in lists)
        return list(map(_plain, value)) in [list(map(_plain, answer)) for answer in lists]
    return _plain(value) in map(_plain, accepted)


def _declared(schema: object) -> type | None:
    """The type of a schema that names one; None for a union, and where there is no type."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    return KINDS.get(kind) if isinstance(kind, str) else None


def _kind_of(accepted: list) -> type | None:
    """The type of the first accepted value; "" only says that the parameter may be left out."""
    return next((type(answer) for answer in accepted if answer != ""), None)


def _dict_fits(value: object, answer: object) -> bool:
    """An object whose accepted answer is itself a list of accepted values for each key."""
    return (isinstance(value, dict) and isinstance(answer, dict)
            and all(key in answer and _plain(item) in map(_plain, answer[key])
                    for key, item in value.items())
            and all(key in value or "" in answer[key] for key in answer))


def _plain(value: object) -> object:
    """A string without case, spaces and the punctuation , . / - _ * ^ in which answers differ."""
    if not isinstance(value, str):
        return value
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"')
