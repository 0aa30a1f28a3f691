"""Tool-call accuracy by comparing calls, not strings.

`check_calls` says whether calls are right; `evaluate` lets a model answer conversations for real,
greedily and in batches, and counts. What is right is told in one of two ways:

    ToolCall("get_weather", {"city": "Paris"})                  exactly this call
    {"get_weather": {"city": ["Paris", "Paris, FR"], "unit": ["C", ""]}}
                            one of these values for each parameter; "" among them: may be left out

The second is the answer format of the Berkeley Function-Calling Leaderboard and is compared by the
rules of its `ast_checker.py` for Python (ShishirPatil/gorilla, bfcl_eval/eval_checker/ast_eval).
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from minilora.chat import Conversation, MalformedCall, ToolCall, dump_json, parse_tool_calls, render
from minilora.config import GenerateConfig, UserError
from minilora.generate import generate
from minilora.model import Gemma
from minilora.tokenizer import Tokenizer

# --- are these calls right? -----------------------------------------------------------------------


def check_calls(calls: Sequence[ToolCall], tools: Sequence[dict],
                accepted: Sequence[ToolCall | dict]) -> tuple[bool, str]:
    """Whether each call is one of those accepted and each of those is made, in any order.

    `tools` are the tools offered, bare or inside {"type": "function", "function": …}; the types of
    their schemas count where `accepted` lists values. No call is right where `accepted` is empty.
    Returns (ok, reason), the reason empty if ok. Raises UserError for an accepted answer that has
    neither form or calls a tool that is not offered.
    """
    if len(calls) != len(accepted):
        return False, f"expected {_count(len(accepted))}, got {_count(len(calls))}"
    functions = {tool["name"]: tool for tool in (tool.get("function", tool) for tool in tools)}
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
            reason = problems[call][free[0]]
            return False, reason or f"{calls[call].name}: called too often with such arguments"
    return True, ""


def _count(number: int) -> str:
    return f"{number or 'no'} call" + ("" if number == 1 else "s")


def _name(answer: ToolCall | dict) -> str:
    if isinstance(answer, ToolCall):
        return answer.name
    if not isinstance(answer, dict) or len(answer) != 1:
        raise UserError(f"accepted answer {answer!r}: expected a ToolCall or {{name: {{parameter: "
                        "[accepted values]}}")
    return next(iter(answer))


def _problem(call: ToolCall, answer: ToolCall | dict, functions: dict[str, dict]) -> str:
    """What keeps `call` from being `answer`; empty if nothing does."""
    name = _name(answer)
    if call.name != name:
        return f"called {call.name}, expected {name}"
    if isinstance(answer, ToolCall):
        return _exact_problem(call.arguments, answer.arguments, name)
    if name not in functions:
        raise UserError(f"accepted answer calls {name!r}, which is not among the tools: "
                        f"{', '.join(functions) or 'none'}")
    return _listed_problem(call.arguments, answer[name], functions[name], name)


def _exact_problem(given: dict, expected: dict, where: str) -> str:
    for key in {**expected, **given}:
        if key not in given:
            return f"{where}: {key} is missing"
        if key not in expected:
            return f"{where}: {key} is not expected"
        if not _same(given[key], expected[key]):
            return f"{where}: {key} is {dump_json(given[key])}, expected {dump_json(expected[key])}"
    return ""


def _same(a: object, b: object) -> bool:
    """Equal as JSON values: 1 is 1.0, but true is not 1 (in Python it is) and "1" is not 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


# --- the leaderboard's rules ----------------------------------------------------------------------

# JSON Schema's words stand beside the leaderboard's own; "any" is a string there.
KINDS = {"string": str, "any": str, "integer": int, "float": float, "number": float,
         "boolean": bool, "array": list, "tuple": list, "dict": dict, "object": dict}


def _listed_problem(given: dict, accepted: dict[str, list], function: dict, where: str) -> str:
    """Every required parameter, no unknown one, and of each an accepted value."""
    parameters = function.get("parameters", {})
    known = parameters.get("properties", {})
    for key in parameters.get("required", []):
        if key not in given:
            return f"{where}: {key} is missing and required"
    for key, value in given.items():
        if key not in known or key not in accepted:
            return f"{where}: {key} is not expected"
        if not _accepts(value, accepted[key], known[key]):
            return (f"{where}: {key} is {dump_json(value)}, "
                    f"expected one of {dump_json(accepted[key])}")
    for key, values in accepted.items():
        if key not in given and "" not in values:
            return f"{where}: {key} is missing, expected one of {dump_json(values)}"
    return ""


def _accepts(value: object, accepted: list, schema: dict) -> bool:
    """Whether one argument has the parameter's type and is one of the accepted values.

    An integer serves as a float, but not inside a list, and a float is no integer. Where the
    answers have another type than the schema, theirs counts and they are compared as they are.
    """
    wanted = _kind_of(accepted)
    kind = _declared(schema) or wanted
    inner = _declared(schema.get("items", {})) if kind is list else None
    if kind is float and type(value) is int:
        value = float(value)
    listed = [answer for answer in accepted if isinstance(answer, list)]
    if type(value) is not kind:
        return type(value) is wanted and value in accepted
    if inner and listed and not any(all(type(item) in (inner, _kind_of(answer)) for item in value)
                                    for answer in listed):
        return False
    if wanted not in (kind, None):
        return value in accepted
    if kind is dict:
        return any(_dict_fits(value, answer) for answer in accepted if answer != "")
    if kind is list and inner is dict:
        return any(len(value) == len(answer) and all(map(_dict_fits, value, answer))
                   for answer in accepted)
    if kind is list:
        return list(map(_plain, value)) in [list(map(_plain, answer)) for answer in accepted]
    return _plain(value) in map(_plain, accepted)


def _declared(schema: dict) -> type | None:
    """The type of a schema that names one; None for a union, and where there is no type."""
    kind = schema.get("type")
    return KINDS.get(kind) if isinstance(kind, str) else None


def _kind_of(accepted: list) -> type | None:
    """The type of the first accepted value; "" only says that the parameter may be left out."""
    return next((type(answer) for answer in accepted if answer != ""), None)


def _dict_fits(value: dict, answer: dict[str, list]) -> bool:
    """A dict whose accepted answer is itself a list of accepted values for each key."""
    return (all(key in answer and _plain(item) in map(_plain, answer[key])
                for key, item in value.items())
            and all(key in value or "" in answer[key] for key in answer))


def _plain(value: object) -> object:
    """A string without case, spaces and the punctuation , . / - _ * ^ in which answers differ."""
    if not isinstance(value, str):
        return value
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"')


# --- letting a model answer -----------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """`right` of `total`."""

    right: int
    total: int

    @property
    def value(self) -> float | None:
        return self.right / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval (1927, doi:10.1080/01621459.1927.10502953); of nothing, (0, 1)."""
        if not self.total:
            return 0.0, 1.0
        z, n, p = 1.959964, self.total, self.right / self.total
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        # p itself is in the interval; rounding must not say otherwise.
        return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))

    def __str__(self) -> str:
        if not self.total:
            return "none"
        low, high = self.interval
        return f"{self.value:.3f} ({self.right}/{self.total}, 95 % {low:.3f} to {high:.3f})"


@dataclass(frozen=True)
class Case:
    """One conversation: what was expected, what the model wrote, and whether that is right."""

    source: str                            # file.jsonl:12
    expected: tuple[ToolCall | dict, ...]  # as `check_calls` takes them; empty: no call
    text: str                              # all that the model wrote
    calls: tuple[ToolCall, ...]            # the calls in it
    ok: bool
    reason: str                            # what is wrong; empty if ok


@dataclass(frozen=True)
class Report:
    """Every case in the order of the conversations, and the two shares that sum them up."""

    cases: tuple[Case, ...]

    @property
    def calls(self) -> Share:
        """Of the conversations that expect calls: those with just these (name, all arguments)."""
        return self._share([case for case in self.cases if case.expected])

    @property
    def no_tool(self) -> Share:
        """Of the conversations that expect no call: those answered without one."""
        return self._share([case for case in self.cases if not case.expected])

    @staticmethod
    def _share(cases: list[Case]) -> Share:
        return Share(sum(case.ok for case in cases), len(cases))


def evaluate(model: Gemma, tokenizer: Tokenizer, conversations: Sequence[Conversation],
             dialect: str = "hermes", config: GenerateConfig | None = None, batch: int = 32,
             progress: Callable[[int, int], None] | None = None) -> Report:
    """Lets the model write the first assistant turn of every conversation and checks its calls.

    The prompt is all before that turn. Decoding is greedy whatever `config` says (its `max_new`
    counts), in batches of like length. `progress` is told (done, of how many) after each batch.
    Raises UserError for a conversation with no assistant turn, and one too long for the model.
    """
    config = replace(config or GenerateConfig(), temperature=0.0)
    prompts, expected = [], []
    for conversation in conversations:
        turns = [turn.role for turn in conversation.messages]
        if "assistant" not in turns:
            raise UserError(f"{conversation.source}: no assistant turn to compare with")
        first = turns.index("assistant")
        asked = replace(conversation, messages=conversation.messages[:first])
        prompts.append(render(asked, tokenizer, dialect, generate=True).ids)
        expected.append(conversation.messages[first].tool_calls)
        if len(prompts[-1]) >= model.config.max_position_embeddings:
            raise UserError(f"{conversation.source}: the prompt has {len(prompts[-1])} tokens, the "
                            f"model's context {model.config.max_position_embeddings}")
    cases: list[Case | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch):
        chosen = order[start:start + batch]
        replies = generate(model, [prompts[i] for i in chosen], config, tokenizer.stop_ids)
        for index, reply in zip(chosen, replies, strict=True):
            text = tokenizer.decode(reply)
            cases[index] = check_reply(text, conversations[index], expected[index], dialect)
        if progress:
            progress(start + len(chosen), len(order))
    return Report(tuple(cases))


def check_reply(text: str, conversation: Conversation, expected: Sequence[ToolCall | dict],
                dialect: str) -> Case:
    """The verdict on one generated turn. A call that cannot be read is wrong in any case."""
    try:
        calls = tuple(parse_tool_calls(text, dialect))
    except MalformedCall as error:
        return Case(conversation.source, tuple(expected), text, (), False, f"malformed: {error}")
    ok, reason = check_calls(calls, conversation.tools, expected)
    return Case(conversation.source, tuple(expected), text, calls, ok, reason)
