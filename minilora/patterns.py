"""Which linears an adapter of peft means: names, or regular expressions that come with it.

An expression such as (a+)+$ can take years over forty characters. So what an adapter_config.json
brings is matched by another Python process, which gets expressions and names and half a second.
"""

import json
import subprocess
import sys

_MATCH = """
import json, re, signal, sys
if hasattr(signal, "setitimer"):  # of work; where there is no such timer, the parent's counts
    signal.setitimer(signal.ITIMER_PROF, 0.5)
how, patterns, names = json.load(sys.stdin)
found = [[getattr(re, how)(pattern, name) for name in names] for pattern in patterns]
print(json.dumps([[match and [match[0], *match.groups()] for match in row] for row in found]))
"""


def _match(how: str, patterns: list[str], names: list[str]) -> list[list[list[str] | None]]:
    """For every pattern and every name what matched and its groups, or None, by `re.match` or
    `re.fullmatch`. Raises ValueError for what is no expression, and for what takes too long.
    """
    if not patterns:
        return []
    try:
        done = subprocess.run([sys.executable, "-I", "-S", "-c", _MATCH], check=True, timeout=10,
                              input=json.dumps([how, patterns, names]), encoding="utf-8",
                              capture_output=True)
    except (OSError, subprocess.SubprocessError):
        raise ValueError("no regular expression, or one that takes too long") from None
    return json.loads(done.stdout)


def chosen(config: dict, names: list[str]) -> list[str]:
    """The modules that peft adapts: `tuners/tuners_utils.py`, check_target_module_exists.

    Raises ValueError or TypeError for what can choose none.
    """
    def named(which: str | list[str]) -> set[str]:
        if isinstance(which, str):
            [row] = _match("fullmatch", [which], names)
            return {name for name, match in zip(names, row, strict=True) if match}
        wanted = set(which)
        return {name for name in names if any(
            name[at:] in wanted for at in range(len(name)) if not at or name[at - 1] == ".")}

    targets = named(config.get("target_modules") or []) - named(config.get("exclude_modules") or [])
    layers = config.get("layers_to_transform")
    if layers is not None and layers != []:
        behind = _as_list(config.get("layers_pattern") or "[^.]*")
        rows = _match("match", [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in behind], names)
        for name, matches in zip(names, zip(*rows, strict=True), strict=True):
            found = next((match for match in matches if match), None)  # the first that matches
            if found is None or int(found[1]) not in _as_list(layers):
                targets.discard(name)
    return [name for name in names if name in targets]


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [value]


def numbers(patterns: dict, names: list[str]) -> dict[str, int | float]:
    """The number of the first pattern that a name ends with, for names that have one:
    `utils/other.py`, get_pattern_key. Raises ValueError or TypeError.
    """
    if not isinstance(patterns, dict) or not all(
            type(number) in (int, float) for number in patterns.values()):
        raise TypeError
    rows = _match("match", [rf"(.*\.)?({pattern})$" for pattern in patterns], names)
    found = {}
    for number, row in reversed([*zip(patterns.values(), rows, strict=True)]):
        found |= {name: number for name, match in zip(names, row, strict=True) if match}
    return found
