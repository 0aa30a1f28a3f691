"""Tool-call accuracy: a model answers questions for real, and its calls are compared.

`evaluate` decodes greedily and in batches and judges each reply by `check_calls` (compare.py). A
`Report` counts by category, with confidence intervals, and by what is wrong. `changes` compares two
reports on the same questions, before and after a run, as the pairs that they are.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from minilora.bfcl import Question
from minilora.chat import (
    MalformedCall,
    ToolCall,
    decode_reply,
    parse_tool_calls,
    render,
    stop_ids,
)
from minilora.compare import Problem, find_problem
from minilora.compare import check_calls as check_calls  # it is asked for here
from minilora.config import GenerateConfig
from minilora.constrain import Constraint, Vocabulary
from minilora.generate import generate
from minilora.model import Gemma
from minilora.readers import warn
from minilora.tokenizer import Tokenizer

BATCH_TOKENS = 32768  # of all rows of a batch: 3.5 GB of cache with gemma-2-2b in bfloat16


# --- counting -------------------------------------------------------------------------------------

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


def mean_interval(shares: Sequence[Share]) -> tuple[float, float]:
    """95 % for the mean of shares of different questions; of none, (0, 1).

    How far Wilson's limits are from the shares, added as independent errors are: Zou, Huang and
    Zhang 2009, doi:10.1016/j.csda.2008.09.033. What it tells is how another draw of questions from
    these categories might come out, not how another category might. Of one share it is Wilson's.
    """
    if not shares:
        return 0.0, 1.0
    mean = sum(share.value for share in shares) / len(shares)
    low, high = (math.hypot(*(share.value - share.interval[end] for share in shares)) / len(shares)
                 for end in (0, 1))
    return max(0.0, mean - low), min(1.0, mean + high)


@dataclass(frozen=True)
class Case:
    """One question: what the model wrote, and whether that is right."""

    question: Question
    text: str                     # all that the model wrote
    calls: tuple[ToolCall, ...]   # the calls in it
    problem: Problem | None       # what is wrong

    @property
    def ok(self) -> bool:
        return self.problem is None

    def row(self) -> dict:
        """As JSON: what was asked, expected and got."""
        asked = [turn.content for turn in self.question.conversation.messages
                 if turn.role == "user"]
        accepted = self.question.accepted
        return {"id": self.question.id, "source": self.question.conversation.source,
                "category": self.question.category, "question": asked[-1] if asked else "",
                "expected": "any call" if accepted is None else [
                    {"name": answer.name, "arguments": answer.arguments}
                    if isinstance(answer, ToolCall) else answer for answer in accepted],
                "got": self.text,
                "calls": [{"name": call.name, "arguments": call.arguments} for call in self.calls],
                "ok": self.ok, "problem": self.problem.kind if self.problem else "",
                "reason": self.problem.reason if self.problem else ""}


@dataclass(frozen=True)
class Report:
    """Every case in the order of the questions, and the shares that sum them up."""

    cases: tuple[Case, ...]

    @property
    def total(self) -> Share:
        return self._share(self.cases)

    @property
    def calls(self) -> Share:
        """Of the questions that want calls: those answered with just these (name, arguments)."""
        return self._share(case for case in self.cases if case.question.accepted != ())

    @property
    def no_tool(self) -> Share:
        """Of the questions that want no call: those answered without one."""
        return self._share(case for case in self.cases if case.question.accepted == ())

    @property
    def categories(self) -> dict[str, Share]:
        return {name: self._share(case for case in self.cases if case.question.category == name)
                for name in dict.fromkeys(case.question.category for case in self.cases)}

    @property
    def mean(self) -> float | None:
        """Of the categories' shares, each with the same weight, as the leaderboard sums up most."""
        shares = [share.value for share in self.categories.values()]
        return sum(shares) / len(shares) if shares else None

    @property
    def mean_interval(self) -> tuple[float, float]:
        return mean_interval(list(self.categories.values()))

    @property
    def problems(self) -> dict[str, int]:
        """How often each kind of problem occurs, the most frequent first."""
        return dict(Counter(case.problem.kind for case in self.cases
                            if case.problem).most_common())

    @staticmethod
    def _share(cases: Iterable[Case]) -> Share:
        right = [case.ok for case in cases]
        return Share(sum(right), len(right))

    def summary(self) -> dict:
        """As JSON, without the cases."""
        def share(name: str, share: Share) -> dict:
            return {name: share.value, f"{name}_95": share.interval}

        return {**share("calls", self.calls), **share("no_tool", self.no_tool),
                **share("right", self.total), "cases": len(self.cases),
                "mean_of_categories": self.mean, "mean_of_categories_95": self.mean_interval,
                "categories": {name: {**asdict(each), **share("share", each)}
                               for name, each in self.categories.items()},
                "problems": self.problems}


# --- before and after -----------------------------------------------------------------------------

@dataclass(frozen=True)
class Change:
    """Of `total` questions answered twice: right only the second time, and only the first time."""

    better: int
    worse: int
    total: int

    @property
    def p(self) -> float:
        """McNemar's test in its exact form (1947, doi:10.1007/BF02295996), two-sided.

        How likely a split of the changed answers at least as uneven is if a change for the better
        and one for the worse are equally likely.
        """
        changed, fewer = self.better + self.worse, min(self.better, self.worse)
        tail = sum(math.comb(changed, number) for number in range(fewer + 1))
        return min(1.0, 2 * tail / 2 ** changed)

    def __str__(self) -> str:
        return (f"{(self.better - self.worse) / self.total:+.3f}: {self.better} better, "
                f"{self.worse} worse, p = {self.p:.2g}")


def changes(before: Report, after: Report) -> dict[str, Change]:
    """What changed from one report to another on the same questions, by category and in "all"."""
    pairs = list(zip(before.cases, after.cases, strict=True))

    def change(category: str | None) -> Change:
        chosen = [(first.ok, second.ok) for first, second in pairs
                  if category in (None, first.question.category)]
        return Change(chosen.count((False, True)), chosen.count((True, False)), len(chosen))

    return {**{name: change(name) for name in before.categories}, "all": change(None)}


# --- letting a model answer -----------------------------------------------------------------------

def evaluate(model: Gemma, tokenizer: Tokenizer, questions: Sequence[Question],
             dialect: str = "hermes", config: GenerateConfig | None = None, batch: int = 32,
             batch_tokens: int = BATCH_TOKENS,
             progress: Callable[[int, int], None] | None = None) -> Report:
    """Lets the model answer every question and checks its calls.

    Decoding is greedy whatever `config` says (its `max_new` counts). A batch has prompts of like
    length, the longest first, so that what does not fit into memory shows at once: at most `batch`
    of them, and of `batch_tokens` tokens, replies included. A prompt that leaves the model no room
    to answer counts as not right, and a note tells of it; another of what `config.constrained` does
    not keep to in the tools' schemas. `progress` is told (done, of how many) after each batch.
    """
    config = replace(config or GenerateConfig(), temperature=0.0)
    limit, stops = model.config.max_position_embeddings, stop_ids(tokenizer, dialect)
    words = Vocabulary(tokenizer) if config.constrained else None
    loose: dict[str, set[str]] = {}
    for question in questions if words else ():  # what is wrong with a schema shows at once
        loose |= Constraint(words, question.conversation.tools, dialect).loose
    if loose:
        name, some = next(iter(loose.items()))
        warn(f"calls are held to the tools' schemas, but not to {', '.join(sorted(some))} of {name}"
             + (f" and the like in {len(loose) - 1} more" if len(loose) > 1 else ""))
    prompts = [render(question.conversation, tokenizer, dialect, generate=True).ids
               for question in questions]
    cases: list[Case | None] = [None] * len(prompts)
    for index, prompt in enumerate(prompts):
        if len(prompt) >= limit:
            cases[index] = Case(questions[index], "", (), Problem(
                "too long", f"the prompt has {len(prompt)} tokens, the model's context {limit}"))
    long = [case for case in cases if case]
    if long:
        warn(f"{len(long)} of {len(cases)} questions do not fit into the model's context and count "
             f"as not right, {long[0].question.id} for one: {long[0].problem.reason}")
    left = sorted((index for index, case in enumerate(cases) if not case),
                  key=lambda index: -len(prompts[index]))
    while left:
        rows = batch_tokens // (len(prompts[left[0]]) + config.max_new)
        rows = max(1, min(batch, rows))
        chosen, left = left[:rows], left[rows:]
        constraints = [Constraint(words, questions[i].conversation.tools, dialect)
                       for i in chosen if words]
        replies = generate(model, [prompts[i] for i in chosen], config, stops, constraints)
        for index, reply in zip(chosen, replies, strict=True):
            case = check_reply(decode_reply(reply, tokenizer, dialect), questions[index], dialect)
            if case.problem and len(reply) == min(config.max_new, limit - len(prompts[index])):
                end = "closed" if words and case.calls else "cut"
                case = replace(case, problem=case.problem._replace(
                    reason=f"{case.problem.reason} ({end} at {len(reply)} tokens)"))
            cases[index] = case
        if progress:
            progress(len(cases) - len(left), len(cases))
    return Report(tuple(cases))


def check_reply(text: str, question: Question, dialect: str) -> Case:
    """The verdict on one generated turn.

    A call that cannot be read is wrong in any case. (The leaderboard takes it for no call, which is
    right where none is.)
    """
    try:
        calls = tuple(parse_tool_calls(text, dialect))
    except MalformedCall as error:
        return Case(question, text, (), Problem("malformed", f"malformed: {error}"))
    return Case(question, text, calls, find_problem(calls, question.tools, question.accepted))
