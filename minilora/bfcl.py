"""Files to questions with what is right: one's own conversations and the leaderboard's files.

A conversation is asked up to its first assistant turn (or up to each of them, with the true turns
before); right are exactly the calls of that turn. A file of the Berkeley Function-Calling
Leaderboard (ShishirPatil/gorilla, berkeley-function-call-leaderboard/bfcl_eval/data) holds

    {"id": "multiple_3", "question": [[{"role": "user", "content": …}]], "function": [{…}]}

and the accepted answers are in another, multiple.answers.jsonl or possible_answer/multiple.jsonl
where the questions are in multiple.jsonl:

    {"id": "multiple_3", "ground_truth": [{"get_weather": {"city": ["Paris"], "unit": ["C", ""]}}]}

The id says the category. Two have no answers: irrelevance, where no call is right, and relevance,
where any call is (as in its eval_runner.py). Tools are shown to the model in JSON Schema's words
and checked in the leaderboard's. The hint about Python's syntax, which the leaderboard adds to each
description, is not added: calls are JSON here.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minilora.chat import Conversation, Message
from minilora.compare import Answer, check_answer, functions_of
from minilora.config import UserError
from minilora.formats import standard_tool
from minilora.readers import read_conversations
from minilora.sources import DataFile, find_files, read_rows


@dataclass(frozen=True)
class Question:
    """What a model is asked, and what is right."""

    conversation: Conversation           # all before the turn that the model is to write
    accepted: tuple[Answer, ...] | None  # as `check_calls` takes it: (): no call, None: any
    category: str                        # under which it is counted
    id: str
    tools: tuple[dict, ...]              # as `check_calls` takes them


def read_questions(data: str | Sequence[str], answers: str = "", every_turn: bool = False,
                   ) -> list[Question]:
    """The questions of all files that `data` names, of either form, in order.

    `answers` names the files with the leaderboard's answers, where they are not beside the
    questions. The category of an own conversation is how many calls are right, and its file where
    there are several. Raises UserError that names file, row and key.
    """
    files = [(file, _first_row(file)) for file in find_files(data)]
    files = [(file, row) for file, row in files if "ground_truth" not in row]
    own = [file for file, row in files if not _is_leaderboards(row)]
    given = _read_answers(find_files(answers)) if answers else None
    questions = []
    for file, row in files:
        if _is_leaderboards(row):
            questions += _leaderboard_questions(file, given)
        else:
            named = f"{file.name}: " if len(own) > 1 else ""
            questions += [replace(question, category=named + question.category) for question in
                          ask(read_conversations(file), every_turn)]
    if not questions:
        raise UserError(f"{data}: no question in it; expected conversations, or the leaderboard's "
                        "rows with question and function")
    return questions


def _first_row(file: DataFile) -> dict:
    row = next(read_rows(file), None)
    return row.value if row and isinstance(row.value, dict) else {}


def _rows(file: DataFile) -> Iterator[tuple[str, object]]:
    for where, value, problem in read_rows(file):
        if problem:
            raise UserError(f"{where}: {problem}")
        yield where, value


def _is_leaderboards(row: dict) -> bool:
    return "question" in row and "function" in row


# --- own conversations ----------------------------------------------------------------------------

def ask(conversations: Sequence[Conversation], every_turn: bool = False) -> list[Question]:
    """A question for the first assistant turn of each conversation, or for every one.

    Raises UserError for a conversation that has none.
    """
    questions = []
    for conversation in conversations:
        turns = [index for index, message in enumerate(conversation.messages)
                 if message.role == "assistant"]
        if not turns:
            raise UserError(f"{conversation.source}: no assistant turn to compare with")
        for number, index in enumerate(turns if every_turn else turns[:1], 1):
            calls = conversation.messages[index].tool_calls
            questions.append(Question(
                replace(conversation, messages=conversation.messages[:index]), calls,
                ("no call", "one call", "several calls")[min(len(calls), 2)],
                conversation.source + (f" turn {number}" if every_turn else ""),
                conversation.tools))
    return questions


# --- the leaderboard's files ----------------------------------------------------------------------

def _leaderboard_questions(file: DataFile, given: dict[str, list] | None) -> list[Question]:
    if given is None:
        name = file.path.name
        beside = [file.path.with_name(re.sub(r"(?=\.json)", ".answers", name, count=1)),
                  file.path.parent / "possible_answer" / name]
        found = [path for path in beside if path.is_file()]
        given = _read_answers([DataFile(path, str(path)) for path in found[:1]])
        missing = (f"is not in {found[0]}" if found else
                   f"is missing; expected it in {beside[0].name} or possible_answer/{name} beside "
                   "the questions, or in --answers FILE")
    else:
        missing = "is not in the files of --answers"
    questions = []
    for where, row in _rows(file):
        try:
            questions.append(_question(row, where, Path(file.name).name, given, missing))
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
    return questions


def _question(row: object, where: str, name: str, answers: dict[str, list], missing: str,
              ) -> Question:
    """A row of the leaderboard. Raises ValueError that names the key."""
    for key, kind in (("id", str), ("question", list), ("function", list)):
        if (not isinstance(row, dict) or not isinstance(row.get(key), kind)
                or not row[key] and key != "function"):  # there may be no tool, and so no call
            raise ValueError(f"{key} is missing or not a {'text' if kind is str else 'list'}")
    numbered = re.fullmatch(r"(.*[a-z])_[\d-]+", row["id"])
    category = numbered[1] if numbered else name.partition(".json")[0]
    several_turns = category.startswith(("multi_turn", "memory", "web_search"))
    if several_turns or len(row["question"]) > 1:
        raise ValueError(f"question {row['id']} is scored over several turns by running its tools, "
                         "which minilora does not; leave this file out")
    if category.endswith(("java", "javascript")):
        raise ValueError(f"question {row['id']} is answered in another language than Python, which "
                         "minilora does not check; leave this file out")
    messages = _messages(row["question"][0])
    for index, tool in enumerate(row["function"]):
        if not (isinstance(tool, dict) and isinstance(tool.get("name"), str)
                and isinstance(tool.get("parameters"), dict)
                and isinstance(tool["parameters"].get("properties"), dict)):
            raise ValueError(f"function[{index}] is not an object with name and parameters")
    if category.endswith("irrelevance"):
        accepted = ()
    elif category.endswith("relevance"):
        accepted = None
    elif row["id"] in answers:
        accepted = tuple(answers[row["id"]])
        for answer in accepted:
            check_answer(answer, functions_of(row["function"]))
    else:
        raise ValueError(f"the answer to {row['id']} {missing}")
    tools = tuple({"type": "function", "function": standard_tool(tool)}
                  for tool in row["function"])
    return Question(Conversation(messages, tools, where), accepted, category,
                    row["id"], tuple(row["function"]))


def _messages(turn: object) -> tuple[Message, ...]:
    if not isinstance(turn, list) or not turn or not all(
            isinstance(message, dict) and message.get("role") in ("system", "user", "assistant")
            and isinstance(message.get("content"), str) for message in turn):
        raise ValueError("question is not a list of one list of messages with role and content")
    return tuple(Message(message["role"], message["content"]) for message in turn)


def _read_answers(files: Sequence[DataFile]) -> dict[str, list]:
    """Accepted answers by id."""
    answers: dict[str, list] = {}
    for file in files:
        for where, row in _rows(file):
            id, truth = (row.get("id"), row.get("ground_truth")) if isinstance(row, dict) else (
                None, None)
            if not isinstance(id, str) or not isinstance(truth, list):
                raise UserError(f"{where}: expected an object with id and ground_truth, a list of "
                                "calls")
            if id in answers:
                raise UserError(f"{where}: a second answer to {id}; expected one")
            answers[id] = truth
    return answers
