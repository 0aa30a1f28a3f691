"""The small world of the nano base: what it is told in pre-training, and what LoRA then teaches.

Two kinds of text come from here, both drawn from a seed:

    lesson(rng, number)  a plain chat: echoes, records, boxes, forms, sums, small talk. The base is
                         pre-trained on these, in three rounds. No JSON object, no tag, no list of
                         tools is in them.
    conversation(rng, …) a chat with tools, calls and results in OpenAI's layout: LoRA's data.

The world is made to force copying rather than remembering: half of all names are made up from
syllables, and what LoRA is tested on (tool names, parameter names, argument values) is kept apart
from what it is trained on by a hash of the string itself, `held_out`.
"""

import json
import random
import zlib

WORDS = """
anchor animal apple art attic autumn award bag baker balance ball band bank barn basket battery
beach bell bird boat book bottle box brass bread bridge brush bus cabin cake camera camp canal
candle car card carpet castle cat chain chair cheese circle city class clock cloth cloud coast
coat coin color concert copper corn cotton country course cup curtain dance day deer desk dinner
distance doctor door dream drum engine event farm fence ferry field film fire fish flag flight
flower food forest fork fox fruit game garden gate gift glass goal goat gold grain grape guest
guitar hall hammer harbor hat height hill home honey horse hotel house iron island jacket journey
juice kettle key king kitchen knife lake lamp language leaf lemon lesson letter level library
light lion list map market meal meeting melon metal milk mill mirror money month moon mountain
movie museum music news night number oil order owner paint paper park party path pen person piano
picture pilot pipe place plan plant plate player poem point pool port post price prize queen rain
recipe report rice ring river road roof room rope rose route salt sand school score sea season
seat ship shirt shoe shop signal silver singer size snow soap song soup speed spoon sport spring
square stage star station stone store storm story street sugar summer sun table tax tea team
temple tent test ticket tide tiger time title tool tower town toy track trade train travel tree
trip truck valley value vase village voice wall watch water weather week weight wheel wind window
wine winter wolf wood word work world year zoo
""".split()
ADJECTIVES = """big blue brown calm clean cold cool dark deep dry early fast free fresh full green
grey hard heavy high hot kind large late long low loud main near new next old open pink poor quick
quiet red rich round short slow small soft south strong sweet tall thin warm west white wide wild
young yellow""".split()
VERBS = """add book buy change check count create draw fetch find get give list look make measure
open order play read save search send set show start stop take tell update write""".split()
SIGNS = '" : , { } [ ] _ . ; ( ) < > / - \' = |'.split() + """name names argument arguments function
functions type types string integer number boolean array object property properties parameter
parameters required description enum items default true false null error result""".split()
OPPOSITES = [("big", "small"), ("hot", "cold"), ("old", "new"), ("fast", "slow"), ("long", "short"),
             ("high", "low"), ("open", "shut"), ("dark", "light"), ("early", "late"),
             ("loud", "quiet"), ("wide", "narrow"), ("day", "night"), ("summer", "winter"),
             ("hard", "soft"), ("full", "empty"), ("wet", "dry"), ("heavy", "light")]
FACTS = [("the color of snow", "white"), ("the color of grass", "green"),
         ("the color of coal", "black"),
         ("the color of the sky", "blue"), ("the color of a lemon", "yellow"),
         ("the sound of a cat", "meow"), ("the sound of a dog", "woof"),
         ("the sound of a cow", "moo"),
         ("the home of a bird", "a nest"), ("the home of a bee", "a hive"),
         ("the number of days in a week", "7"), ("the number of months in a year", "12"),
         ("the first letter", "a"), ("the day after Monday", "Tuesday"),
         ("the day after Friday", "Saturday"), ("the month after May", "June")]

_ONSETS = "b d f g h j k l m n p r s t v w z br dr gr kl pl sh st th tr".split()
_VOWELS = "a e i o u a e i o u ai ea oo".split()
_CODAS = ["", "", "", "", "n", "r", "l", "s", "k", "m", "x", "nd", "rt"]


def held_out(text: str) -> bool:
    """Whether a name or value belongs to the held-out side: one in four, by its CRC-32."""
    return zlib.crc32(text.lower().encode()) % 4 == 0


def pick_side(rng: random.Random, draw, side: bool | None) -> object:
    """Draws until the string of what came out is on the asked side; None takes either."""
    while True:
        value = draw(rng)
        if side is None or held_out(str(value)) == side:
            return value


# --- names and values -----------------------------------------------------------------------------

def made_up(rng: random.Random) -> str:
    """A word of two or three syllables that no dictionary has."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
                   for _ in range(rng.choice((1, 2, 2, 2, 3))))


def noun(rng: random.Random) -> str:
    """A noun of the world, or, as often, one made up."""
    return rng.choice(WORDS) if rng.random() < 0.5 else made_up(rng)


def field_name(rng: random.Random) -> str:
    """A parameter or field: one word, or two joined by an underscore."""
    if rng.random() < 0.65:
        return noun(rng)
    return f"{rng.choice(ADJECTIVES) if rng.random() < 0.4 else noun(rng)}_{noun(rng)}"


def topic_name(rng: random.Random) -> str:
    """What a question is about: one or two words."""
    return noun(rng) if rng.random() < 0.7 else f"{noun(rng)} {noun(rng)}"


def text_value(rng: random.Random) -> str:
    """A string value: a name, a phrase, a date, a time or a code."""
    kind = rng.random()
    if kind < 0.40:
        return made_up(rng).capitalize()
    if kind < 0.52:
        return f"{made_up(rng).capitalize()} {made_up(rng).capitalize()}"
    if kind < 0.64:
        return rng.choice(WORDS)
    if kind < 0.74:
        return f"{rng.choice(ADJECTIVES)} {noun(rng)}"
    if kind < 0.84:
        return f"20{rng.randrange(10, 40)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}"
    if kind < 0.92:
        return f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    return f"{rng.choice('ABCDEFGHKLMNPRSTVWXZ')}{rng.choice('ABCDEFGHKLMNPRSTVWXZ')}" \
           f"-{rng.randrange(100, 1000)}"


def whole_value(rng: random.Random) -> int:
    """An integer of one to four digits."""
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3, 4)))


def decimal_value(rng: random.Random) -> float:
    """A number with a point: 3.5, 120.7, 0.25."""
    tenths = rng.randrange(1, 10 ** rng.choice((2, 3, 4)))
    return (tenths - tenths % 10 + rng.randrange(1, 10)) / rng.choice((10, 10, 100))


VALUES = {"string": text_value, "integer": whole_value, "number": decimal_value}


def slot(rng: random.Random, side: bool | None = None, taken: tuple = ()) -> tuple:
    """(field, type, value): one thing that a request states."""
    kind = rng.choices(("string", "integer", "number"), (62, 26, 12))[0]
    while (name := pick_side(rng, field_name, side)) in taken:
        pass
    return name, kind, pick_side(rng, VALUES[kind], side)


def slots(rng: random.Random, side: bool | None = None) -> list[tuple]:
    """One to three slots with different names."""
    chosen: list[tuple] = []
    for _ in range(rng.choices((1, 2, 3), (45, 35, 20))[0]):
        chosen.append(slot(rng, side, tuple(name for name, _, _ in chosen)))
    return chosen


# --- requests: the phrasings that forms and tools share -------------------------------------------

def spoken(name: str) -> str:
    """A field as people say it: its underscores are spaces."""
    return name.replace("_", " ")


def joined(parts: list[str], last: str = " and ") -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + last + parts[-1]


# {T} topic, {v} the only value, {pv} "p v, p v and p v", {is} "p is v and p is v", {V} verb.
# LoRA is trained on the first list only; half of the held-out questions use the second.
NO_SLOT = (
    ["What is the {T}?", "Please {V} the {T}.", "Tell me the {T}.", "{V} {T}", "I need the {T}."],
    ["Could you {V} the {T}?", "Show me the {T} please.", "I want to know the {T}."])
ONE_SLOT = (
    ["What is the {T} of {v}?", "What is the {T} for {v}?", "Please {V} the {T} of {v}.",
     "Tell me the {T} for {v}.", "I need the {T} of {v}.", "Can you {V} the {T} for {v}?",
     "{V} {T} {v}", "Give me the {T} in {v}.", "{V} the {T} for {v} please.",
     "Do you know the {T} of {v}?"],
    ["Could you {V} the {T} in {v}?", "What is the {T} in {v}?", "I want to know the {T} of {v}.",
     "How about the {T} for {v}?", "For {v}, {V} the {T}.", "I am looking for the {T} of {v}.",
     "Let me see the {T} for {v}.", "{v}: {V} the {T}"])
MANY_SLOTS = (
    ["What is the {T} with {pv}?", "Please {V} the {T} with {pv}.", "{V} the {T}: {pv}.",
     "I need the {T}. {is}.", "Can you {V} the {T} for {pv}?", "Tell me the {T} if {is}.",
     "{V} {T}, {is}", "My {is}. Please {V} the {T}.", "Give me the {T} for {pv}.",
     "I need you to {V} the {T}; {is}."],
    ["Could you {V} the {T}? The {is}.", "With {pv}, what is the {T}?", "If {is}, {V} the {T}.",
     "I want the {T} with {pv}.", "For {pv} {V} the {T} please.", "{is}: what is the {T}?",
     "I would like to {V} the {T} where {is}.", "Let us {V} the {T} using {pv}."])


def request(rng: random.Random, topic: str, verb: str, stated: list[tuple], fresh: bool) -> str:
    """A sentence that asks about `topic` and states every slot. `fresh`: a held-out phrasing."""
    one = len(stated) == 1 and rng.random() < 0.7
    text = rng.choice((ONE_SLOT if one else MANY_SLOTS if stated else NO_SLOT)[fresh])
    # A sentence starts with a capital, but a value keeps the case it has.
    text = text.replace("{V}", verb)
    text = text[0].upper() + text[1:] if rng.random() < 0.9 else text
    if not stated:
        return text.replace("{T}", topic)
    order = rng.sample(stated, len(stated))
    pairs = [(spoken(name), value) for name, _, value in order]
    quote = "{}" if rng.random() < 0.85 else '"{}"'
    pairs = [(name, quote.format(value) if isinstance(value, str) else value)
             for name, value in pairs]
    return (text.replace("{T}", topic).replace("{v}", str(pairs[0][1]))
            .replace("{pv}", joined([f"{name} {value}" for name, value in pairs]))
            .replace("{is}", joined([f"{name} is {value}" for name, value in pairs])))


SMALL_TALK = (
    [("Hello!", "Hello! How can I help?"), ("Hi there.", "Hello! How can I help?"),
     ("Good morning.", "Good morning! How can I help?"), ("Thank you.", "You are welcome."),
     ("Who are you?", "I am a small model."), ("How are you?", "I am well, thank you."),
     ("Goodbye.", "Goodbye!"), ("What can you do?", "I can answer and help."),
     ("That is all.", "Good. Goodbye!")],
    [("Hey!", "Hello! How can I help?"), ("Good evening.", "Good evening! How can I help?"),
     ("Thanks a lot!", "You are welcome."), ("What are you?", "I am a small model."),
     ("See you later.", "Goodbye!"), ("How do you do?", "I am well, thank you.")])
FACT_ASKS = (["What is {}?", "Tell me {}.", "Do you know {}?"],
             ["Can you name {}?", "I forgot {}."])
OPPOSITE_ASKS = (["What is the opposite of {}?", "Give me the opposite of {}."],
                 ["Which word is the opposite of {}?"])
SUM_ASKS = (["What is {} plus {}?", "Add {} and {}."], ["How much is {} plus {}?"])
ECHO_ASKS = (["Say {}.", "Repeat after me: {}", "Write {}"], ["Please repeat {}", "Copy this: {}"])


def plain_question(rng: random.Random, fresh: bool) -> tuple[str, str]:
    """A question that needs nothing but the model, with its answer."""
    kind = rng.randrange(10)
    if kind < 3:
        return rng.choice(SMALL_TALK[fresh])
    if kind < 6:
        thing, answer = rng.choice(FACTS)
        return rng.choice(FACT_ASKS[fresh]).format(thing), f"{answer[0].upper()}{answer[1:]}."
    if kind < 8:
        pair = rng.sample(rng.choice(OPPOSITES), 2)
        return rng.choice(OPPOSITE_ASKS[fresh]).format(pair[0]), f"{pair[1].capitalize()}."
    if kind < 9:
        a, b = rng.randrange(10), rng.randrange(10)
        return rng.choice(SUM_ASKS[fresh]).format(a, b), f"{a + b}."
    word = made_up(rng)
    return rng.choice(ECHO_ASKS[fresh]).format(word), word


# --- lessons: what the base is pre-trained on -----------------------------------------------------

Turns = list[tuple[str, str]]  # (what the user says, what the model answers)


def _echo(rng: random.Random) -> Turns:
    """Copying for its own sake: names, numbers, stray signs and words, in order."""
    def thing() -> str:
        return rng.choice((lambda: str(text_value(rng)), lambda: str(whole_value(rng)),
                           lambda: field_name(rng), lambda: str(decimal_value(rng)),
                           lambda: rng.choice(SIGNS)))()
    turns = []
    for _ in range(rng.randrange(1, 4)):
        text = rng.choice((" ", " ", "", ", ")).join(thing() for _ in range(rng.randrange(1, 9)))
        style = rng.random()
        if style < 0.6:
            ask, answer = rng.choice(ECHO_ASKS[rng.random() < 0.5]).format(text), text
        elif style < 0.75:
            ask, answer = f"Put quotes around this: {text}", f'"{text}"'
        elif style < 0.9:
            words = [noun(rng) for _ in range(rng.randrange(2, 4))]
            ask, answer = f"Join with underscores: {' '.join(words)}", "_".join(words)
        else:
            ask, answer = f"Say it twice: {text}", f"{text} {text}"
        turns.append((ask, answer))
    return turns


def _records(rng: random.Random) -> Turns:
    """Records with keys of their own in one of many layouts; questions about values and keys."""
    names = list(dict.fromkeys(made_up(rng).capitalize() if rng.random() < 0.6 else field_name(rng)
                               for _ in range(rng.choice((1, 2, 2, 3)))))
    rows = {name: {field_name(rng): VALUES[rng.choice(tuple(VALUES))](rng)
                   for _ in range(rng.randrange(1, 4))} for name in names}
    pair, between = rng.choice(((": ", "\n"), (" = ", ", "), (": ", "; "), (" is ", ", "),
                                (" - ", "\n"), (" ", " | "), ('="', '", ')))
    close = '"' if pair == '="' else ""
    text = "\n".join(f"{name}\n" + between.join(f"{k}{pair}{v}" for k, v in row.items()) + close
                     for name, row in rows.items())
    turns = []
    for i in range(rng.randrange(3, 8)):
        name, row = rng.choice(list(rows.items()))
        key, value = rng.choice(list(row.items()))
        ask, answer = rng.choice((
            (f"What is the {spoken(key)} of {name}?", f"The {spoken(key)} is {value}."),
            (f"{key} of {name}?", f"{value}"), (f"{name}, {key}", f'"{value}"'),
            (f"Which of {name} is {value}?", key),
            (f"Tell me all about {name}.",
             " ".join(f"The {spoken(k)} is {v}." for k, v in row.items())),
            (f"What is known of {name}?", f"{joined(list(row))}."),
            (f"What is known of {name}?", f"{joined(list(row))}."),
        ))
        turns.append((f"{text}\n{ask}" if i == 0 else ask, answer))
    return turns


def label(rng: random.Random, thing: str) -> str:
    """What is written on the box of a thing: the thing's words and perhaps one more."""
    word = thing.replace(" ", "_")
    style = rng.random()
    if style < 0.6:
        return f"{rng.choice(ADJECTIVES) if rng.random() < 0.6 else noun(rng)}_{word}"
    return word if style < 0.75 else f"{word}_{noun(rng)}"


def _shares_word(thing: str, others: list[str]) -> bool:
    return any(word in other for other in others for word in thing.split())


def _things(rng: random.Random, count: int, side: bool | None = None) -> list[str]:
    """Topics of which none has a word of an earlier one in it."""
    things: list[str] = []
    while len(things) < count:
        if not _shares_word(thing := pick_side(rng, topic_name, side), things):
            things.append(thing)
    return things


def _boxes(rng: random.Random) -> Turns:
    """Boxes with labels: which one is for what is asked for, or none. Other talk comes between."""
    things = _things(rng, rng.choice((1, 2, 2, 3, 3, 4)))
    missing = topic_name(rng)
    kind = rng.choice(("box", "room", "shop", "boat", "book", "card"))
    labels = {thing: label(rng, thing) for thing in things}
    layout = rng.choice(("{}", '"{}"', "{}: for the {}", '"{}" has the {}', f"{kind} {{}} ({{}})"))
    text = rng.choice((", ", "\n", "; ")).join(layout.format(labels[thing], thing)
                                               for thing in things)
    turns: Turns = []
    for _ in range(rng.randrange(4, 8)):
        thing = rng.choice(things)
        if rng.random() < 0.25 and not _shares_word(missing, things):
            thing = missing
        ask = rng.choice((f"Which {kind} is for the {thing}?", f"Where is the {thing}?",
                          f"{thing}?", f"Which {kind} for: "
                          + request(rng, thing, rng.choice(VERBS), slots(rng),
                                    rng.random() < 0.5)))
        turns.append((f"{text}\n{ask}" if not turns else ask, labels.get(thing, "None.")))
        if rng.random() < 0.2:
            turns += rng.choice((_form, _chat, _echo))(rng)
    return turns


def _fields(rng: random.Random) -> list[tuple]:
    """What a form asks for: mostly one to three slots, now and then none or four."""
    while True:
        stated = slots(rng) if (kind := rng.random()) < 0.86 else []
        if kind > 0.93:
            stated = slots(rng) + slots(rng)
        if len({name for name, _, _ in stated}) == len(stated) <= 4:
            return stated


def _layout(rng: random.Random) -> tuple[str, str, str]:
    """How a form writes a field: what joins name and value, the dress of its kind, what joins."""
    pair = rng.choice((": ", ": ", " = ", " ", " - "))
    shown = rng.choice((*["{name}{pair}{kind}"] * 3, "{name}{pair}({kind})", "{name}{pair}<{kind}>",
                        "{name}{pair}type {kind}", '"{name}"{pair}"{kind}"', "{kind} {name}",
                        "{name} ({kind})"))
    return pair if "{pair}" in shown else ": ", shown, rng.choice((", ", "\n", "; "))


def _filled(stated: list[tuple], pair: str, between: str) -> str:
    """A form as it comes back: a string stands in quotes, a number does not."""
    return between.join(f"{name}{pair}" + (f'"{value}"' if kind == "string" else str(value))
                        for name, kind, value in stated) or "Nothing."


def _form(rng: random.Random) -> Turns:
    """A request and a form: each field's kind is replaced by its value, a string's in quotes."""
    turns = []
    for _ in range(rng.randrange(1, 4)):
        stated = _fields(rng)
        text = request(rng, topic_name(rng), rng.choice(VERBS), stated, rng.random() < 0.5)
        pair, shown, between = _layout(rng)
        title = rng.choice(("Fill the form: ", "Form: ", "Fields: ", "Fill in: ", "Form:\n"))
        empty = title + (between.join(shown.format(name=name, pair=pair, kind=kind)
                                      for name, kind, _ in stated) or "nothing")
        turns.append((f"{text}\n{empty}" if rng.random() < 0.5 else f"{empty}\n{text}",
                      _filled(stated, pair, between)))
        if rng.random() < 0.25:
            turns.append((rng.choice(("Which fields are there?", "Name the fields.")),
                          f"{joined([name for name, _, _ in stated] or ['nothing'])}."))
    return turns


def _which(rng: random.Random, thing: str, stated: list[tuple]) -> str:
    """Asks for the form that is for a thing, plainly or by a request that it would serve."""
    ask = request(rng, thing, rng.choice(VERBS), stated, rng.random() < 0.5)
    return rng.choice((f"Which form is for the {thing}?", f"Which form for: {ask}"))


def _papers(rng: random.Random) -> Turns:
    """One to three titled forms on the table; then questions: which one, its fields, one field's
    kind, and the filling in of one that the question names.
    """
    things = _things(rng, rng.choice((1, 1, 2, 2, 3)))
    forms = {thing: (label(rng, thing), _fields(rng)) for thing in things}
    pair, shown, between = _layout(rng)
    head = rng.choice(("{label}: ", "{label}\n", "{label}, for the {thing}: ",
                       "{label} ({thing})\n", '"{label}", the {thing}; '))
    text = "\n".join(
        head.format(label=title, thing=thing)
        + (between.join(shown.format(name=name, pair=pair, kind=kind) for name, kind, _ in stated)
           or "nothing")
        for thing, (title, stated) in forms.items())
    absent = topic_name(rng)
    turns: Turns = []
    for _ in range(rng.randrange(4, 9)):
        thing = rng.choice(things)
        title, stated = forms[thing]
        # New values for the same fields, so that a form can be filled in again and again.
        stated = [(name, kind, VALUES[kind](rng)) for name, kind, _ in stated]
        style = rng.random()
        if style < 0.5:
            ask = request(rng, thing, rng.choice(VERBS), stated, rng.random() < 0.5)
            ask, answer = f"Fill {title}: {ask}", _filled(stated, pair, between)
        elif style < 0.65:
            fields = joined([name for name, _, _ in stated] or ["nothing"])
            ask, answer = rng.choice((
                (f"What does {title} ask for?", f"{title} asks for {fields}."),
                (f"Fields of {title}?", f"{fields}.")))
        elif style < 0.72 and stated:
            name, kind, _ = rng.choice(stated)
            ask, answer = f"Type of {name} in {title}?", kind
        else:
            if rng.random() < 0.2 and not _shares_word(absent, things):
                thing, title, stated = absent, "None.", slots(rng)
            ask, answer = _which(rng, thing, stated), title
        turns.append((f"{text}\n{ask}" if not turns else ask, answer))
    return turns


def _note(rng: random.Random) -> str:
    """A few words that stand in the way."""
    words = [rng.choice(ADJECTIVES) if rng.random() < 0.4 else noun(rng)
             for _ in range(rng.randrange(1, 6))]
    return " ".join(words)


def _binders(rng: random.Random) -> Turns:
    """Two to four titled forms, notes strewn among their fields: what each one asks for, found
    from its title or from what it is for; and the filling in of one that the question names.
    """
    things = _things(rng, rng.choice((2, 2, 2, 3, 3, 4)))
    forms = {thing: (label(rng, thing), _fields(rng)) for thing in things}
    head = rng.choice(("{label}, {note}: ", "Form {label} ({note}) is for the {thing}. Fields: ",
                       "{label}\n{note}\nThe {thing}.\n", "- {label}; {note}; the {thing}; ",
                       '"{label}", "{note}", "the {thing}": ', "{label} / {note} / {thing} / "))
    pair = rng.choice((": ", ": ", " = ", " "))
    shown = rng.choice(("{name}{pair}{kind}", "{name}{pair}{kind} ({note})", "{name}{pair}<{kind}>",
                        '"{name}"{pair}("{kind}")', "{name}{pair}kind {kind}, {note}",
                        '"{name}"{pair}"kind"{pair}"{kind}"'))
    between = rng.choice((", ", "; ", "\n"))
    tail = rng.choice(("", "", ". {note}.", ". Needed: {names}.", ". Needed: {names}. {note}."))
    text = "\n".join(
        head.format(label=title, thing=thing, note=_note(rng))
        + (between.join(shown.format(name=name, pair=pair, kind=kind, note=_note(rng))
                        for name, kind, _ in stated) or "nothing")
        + tail.format(note=_note(rng),
                      names=joined([name for name, _, _ in stated] or ["nothing"], ", "))
        for thing, (title, stated) in forms.items())
    return _asked(rng, text, forms, pair, between)


def _asked(rng: random.Random, text: str, forms: dict[str, tuple[str, list]], pair: str,
           between: str) -> Turns:
    """Questions on forms that stand in `text`: thing -> (title, fields)."""
    things, absent = list(forms), topic_name(rng)
    turns: Turns = []
    for _ in range(rng.randrange(4, 10)):
        thing = rng.choice(things)
        title, stated = forms[thing]
        stated = [(name, kind, VALUES[kind](rng)) for name, kind, _ in stated]
        style = rng.random()
        if style < 0.45:
            ask = rng.choice((f"What does {title} ask for?", f"Fields of {title}?",
                              f"What does the form for the {thing} ask for?",
                              f"{spoken(thing)}: which fields?"))
            answer = f"{title} asks for {joined([name for name, _, _ in stated] or ['nothing'])}."
        elif style < 0.75:
            ask = request(rng, thing, rng.choice(VERBS), stated, rng.random() < 0.5)
            ask, answer = f"Fill {title}: {ask}", _filled(stated, pair, between)
        elif style < 0.83 and stated:
            name, kind, _ = rng.choice(stated)
            ask, answer = f"Type of {name} in {title}?", kind
        else:
            if rng.random() < 0.2 and not _shares_word(absent, things):
                thing, title, stated = absent, "None.", slots(rng)
            ask, answer = _which(rng, thing, stated), title
        turns.append((f"{text}\n{ask}" if not turns else ask, answer))
    return turns


def _clutter(rng: random.Random, least: int, most: int) -> str:
    """Words and signs without a meaning, a sign at either end."""
    signs = '":,[]().;-=|<>/'
    between = rng.choice(("", " "))
    inside = [noun(rng) if rng.random() < 0.45 else rng.choice(signs)
              for _ in range(rng.randrange(least, most + 1))]
    return between.join([rng.choice(signs + " "), *inside, rng.choice(signs + " ")])


def _drafts(rng: random.Random) -> Turns:
    """One to three forms, a line each, in a layout that was made up for this chat: the same clutter
    before, between and after title, thing and fields, so that only their order tells whose is what.
    """
    things = _things(rng, rng.choice((1, 2, 2, 2, 2, 3)))
    forms = {thing: (label(rng, thing), _fields(rng)) for thing in things}
    before, middle, inner = (_clutter(rng, 0, most) for most in (12, 5, 16))
    kind_is, next_field, last, listed, end = (_clutter(rng, 0, most) for most in (5, 4, 6, 2, 3))
    repeated = rng.random() < 0.6  # the fields stand in a list once more
    lines = []
    for thing, (title, stated) in forms.items():
        fields = next_field.join(f"{name}{kind_is}{kind}" for name, kind, _ in stated)
        again = last + listed.join(name for name, _, _ in stated) if repeated else ""
        lines.append(f"{before}{title}{middle}The {thing}.{inner}{fields}{again}{end}")
    return _asked(rng, "\n".join(lines), forms, ": ", ", ")


def _chat(rng: random.Random) -> Turns:
    return [plain_question(rng, rng.random() < 0.5) for _ in range(rng.randrange(1, 5))]


def _retell(rng: random.Random) -> Turns:
    """A result as it might come from a clerk, told again in sentences."""
    turns = []
    for _ in range(rng.randrange(1, 4)):
        facts = [(noun(rng), VALUES[rng.choice(tuple(VALUES))](rng))
                 for _ in range(rng.randrange(1, 4))]
        told = joined([f"{key}: {value}" for key, value in facts], ", ")
        turns.append((rng.choice(("Result: ", "Found: ", "Tell me this: ")) + told,
                      " ".join(f"The {key} is {value}." for key, value in facts)))
    return turns


# The base hears three rounds of lessons: how likely each lesson is in either.
ROUNDS = (
    ((_papers, 34), (_form, 24), (_boxes, 16), (_records, 12), (_echo, 6), (_chat, 4),
     (_retell, 4)),
    ((_binders, 46), (_papers, 12), (_form, 16), (_boxes, 10), (_records, 6), (_echo, 6),
     (_chat, 2), (_retell, 2)),
    ((_drafts, 60), (_binders, 10), (_papers, 8), (_form, 8), (_boxes, 6), (_records, 3),
     (_echo, 3), (_chat, 1), (_retell, 1)))


def lesson(rng: random.Random, number: int = 0) -> Turns:
    """One pre-training chat of a round."""
    makers, weights = zip(*ROUNDS[number], strict=True)
    while True:
        turns = rng.choices(makers, weights)[0](rng)
        # Echoes mix signs freely, but nothing may look like the start of a JSON object.
        if turns and not any('{"' in text for turn in turns for text in turn):
            return turns


# --- conversations with tools: LoRA's data --------------------------------------------------------

def _tool(rng: random.Random, side: bool, topic: str, verb: str, stated: list[tuple]) -> dict:
    """A tool in OpenAI's layout whose name and description speak of `topic`."""
    word = topic.replace(" ", "_")

    def name(rng: random.Random) -> str:
        style = rng.random()
        if style < 0.7:
            return f"{verb if style < 0.4 else rng.choice(VERBS)}_{word}"
        return word if style < 0.85 else f"{word}_{noun(rng)}"

    properties = {}
    for field, kind, _ in stated:
        properties[field] = {"type": kind}
        if rng.random() < 0.15:
            properties[field]["description"] = f"The {spoken(field)}."
    of = f" of a {spoken(stated[0][0])}" if stated and rng.random() < 0.3 else ""
    text = rng.choice((f"{verb.capitalize()} the {topic}{of}.", f"The {topic}{of}.",
                       f"{verb.capitalize()} a {topic}."))
    return {"type": "function", "function": {
        "name": pick_side(rng, name, side), "description": text,
        "parameters": {"type": "object", "properties": properties, "required": list(properties)}}}


def conversation(rng: random.Random, side: bool, fresh: bool, questions: int = 1,
                 offered: tuple[int, int, int] = (50, 40, 10)) -> dict:
    """A chat with tools offered. `side`: held-out names and values; `fresh`: held-out phrasings.

    `offered`: how likely one, two and three tools are (before the longest chats are left out).

    Two questions in three ask for a tool and get it; the others need none, or one that is not
    offered. None is longer than `LONGEST` characters of JSON, and half as many for each further
    question, so that four hundred tokens hold the one and two hundred each of the others.
    """
    kinds = [rng.random() for _ in range(questions)]  # a chat too long is replaced by one like it
    while True:
        chat = _conversation(rng, side, fresh, kinds, offered)
        if len(json.dumps(chat)) <= LONGEST * (1 + questions) // 2:
            return chat


LONGEST = 860


def _conversation(rng: random.Random, side: bool, fresh: bool, kinds: list[float],
                  offered: tuple[int, int, int]) -> dict:
    topics = _things(rng, rng.choices((2, 3, 4), offered)[0], side)
    missing, *topics = topics
    wanted = [(topic, rng.choice(VERBS), slots(rng, side) if rng.random() < 0.9 else [])
              for topic in topics]
    tools = [_tool(rng, side, *want) for want in wanted]
    messages: list[dict] = []
    for number, need in enumerate(kinds, 1):
        index = rng.randrange(len(tools))
        topic, verb, stated = wanted[index]
        verb = verb if rng.random() < 0.6 else rng.choice(VERBS)
        # New values for its fields each time.
        stated = [(field, kind, pick_side(rng, VALUES[kind], side)) for field, kind, _ in stated]
        if need < 0.67:
            messages += _called(rng, tools[index]["function"]["name"], stated,
                                request(rng, topic, verb, stated, fresh),
                                number < len(kinds) or rng.random() < 0.6)
            continue
        if need < 0.83:  # a near miss: a request like any other, for what no tool is about
            question = request(rng, missing, rng.choice(VERBS), slots(rng, side), fresh)
            answer = f"Sorry, I have no tool for the {missing}."
        else:
            question, answer = plain_question(rng, fresh)
        messages += [{"role": "user", "content": question},
                     {"role": "assistant", "reasoning_content": "No tool fits.",
                      "content": answer}]
    return {"tools": tools, "messages": messages}


def _called(rng: random.Random, name: str, stated: list[tuple], question: str,
            answered: bool) -> list[dict]:
    """Question, thought and call; where it is answered also the result and what is said of it."""
    arguments = {field: value for field, _, value in stated}
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "",
         "reasoning_content": f"{name} takes {joined(list(arguments) or ['nothing'])}.",
         "tool_calls": [{"type": "function",
                         "function": {"name": name, "arguments": arguments}}]}]
    if answered:
        result = {noun(rng): VALUES[rng.choice(tuple(VALUES))](rng)
                  for _ in range(rng.choice((1, 1, 2)))}
        messages += [
            {"role": "tool", "content": json.dumps(result)},
            {"role": "assistant",
             "content": " ".join(f"The {key} is {value}." for key, value in result.items())}]
    return messages
