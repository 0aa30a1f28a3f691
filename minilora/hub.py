"""What a model says of itself, its card, and its way to the hub.

    adapter/README.md, merged/README.md     base, data, recipe, measured accuracy, how to load it

A card takes what it states from the run's config.json and result.json; what is not there was not
measured, and it says so. Of paths it shows the last name only.
"""

import argparse
import dataclasses
import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from minilora.checkpoint import ADAPTER_FILES, MODEL_FILES
from minilora.config import NANO, LoraConfig, TrainConfig, UserError, builtin, read_settings
from minilora.dialects import get_dialect
from minilora.files import read_object
from minilora.sources import split_data

# --- the card -------------------------------------------------------------------------------------

_DEFAULTS = {item.name: item.default for cls in (LoraConfig, TrainConfig)
             for item in dataclasses.fields(cls)}
# Settings that a recipe always names, and those that say where and how to run, not what to learn.
_MAIN = {"rank", "alpha", "targets", "lr", "schedule", "batch", "accumulate", "length", "train_on"}
_NO_RECIPE = {"model", "data", "eval_data", "out", "skip", "device", "compile", "recompute",
              "eval_every", "eval_share", "eval_calls", "save_every", "merge"}

_USE_ADAPTER = """With minilora, `ADAPTER` being this folder:

```bash
python infer.py --adapter ADAPTER --tools my_tools.py "What is the weather in Paris?"
```

With peft{where}:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("ADAPTER")
model = AutoModelForCausalLM.from_pretrained("{base}")
{resize}model = PeftModel.from_pretrained(model, "ADAPTER")
```

Some servers, vLLM among them, take no rows of the embedding from an adapter. For them write the
base with the rows in place, and an adapter without:

```bash
python -m minilora merge --adapter ADAPTER --out FOLDER --extended-base
```
"""

_RESIZE = """# Room for the rows of the new tokens, which the adapter holds.
model.resize_token_embeddings({rows}, mean_resizing=False)
"""

_USE_MERGED = """With minilora, `MODEL` being this folder:

```bash
python infer.py --model MODEL --tools my_tools.py "What is the weather in Paris?"
```

With transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("MODEL")
model = AutoModelForCausalLM.from_pretrained("MODEL")
```

The chat template takes `tools`, calls and their results.
"""


def model_card(library: str, base: str, dialect: str, run: str | Path, rows: int = 0) -> str:
    """The README.md of an adapter (`library` peft) or of a merged model (transformers).

    base: hub id, nano or folder. run: the folder of the run that trained it, whose settings and
    result are stated; of any other folder nothing is known. rows: how many the table has with the
    new tokens, for which peft has to make room; 0: it has room. Raises UserError where the run's
    files cannot be read.
    """
    settings, result = _read_run(run)
    name, front = Path(base).resolve().name, []
    origin, where = f"{name}, a folder", f", `BASE` being the folder of {name}"
    if _on_hub(base):
        origin, where = f"[{base}](https://huggingface.co/{base}), whose licence applies", ""
        front = [f"base_model: {base}"]  # the hub refuses one that it does not have
    elif builtin(base) == NANO:
        origin = f"{name}, which ships with minilora"
    what = "A LoRA adapter for" if library == "peft" else "A whole model, made by merging LoRA into"
    steps = "not recorded"
    if "steps" in result:
        each = f"{settings['batch']} × {settings['length']} tokens"
        each += f" × {settings['accumulate']}" if settings["accumulate"] > 1 else ""
        steps = f"{result['steps']}, each of {each}"
    tokens = " ".join(f"`{token}`" for token in get_dialect(dialect).tokens)
    about = _table(("", ""), [
        ("base", origin), ("data", _data(settings, result)), ("steps", steps),
        ("dialect", f"{dialect}, with the tokens {tokens}")])
    recipe = "Not recorded."
    if settings:
        recipe = _table(("setting", "value"), [
            (f"`{key}`", _shown(value)) for key, value in settings.items()
            if key not in _NO_RECIPE and (key in _MAIN or value != _DEFAULTS[key])])
    use = _USE_MERGED
    if library == "peft":
        use = _USE_ADAPTER.format(where=where, base="BASE" if where else base,
                                  resize=_RESIZE.format(rows=rows) if rows else "")
    front += [f"library_name: {library}", "pipeline_tag: text-generation", "tags:", "- lora",
              "- function-calling", "- minilora"]
    return "\n".join([
        "---", *front, "---", "", f"# {name} that calls functions", "",
        f"{what} {name}, trained with minilora to call functions.", "", about, "",
        "## Measured", "", _measured(settings, result, library), "",
        "## Recipe", "", recipe, "",
        "## Use", "", use])


def _read_run(run: str | Path) -> tuple[dict, dict]:
    """The settings of a run, defaults included, and its result; each empty where it has none."""
    config, result = Path(run) / "config.json", Path(run) / "result.json"
    if not (config.exists() and (Path(run) / "adapter").is_dir()):  # an adapter folder, say
        return {}, {}
    settings = _DEFAULTS | read_settings(config, LoraConfig, TrainConfig)
    return settings, read_object(result) if result.exists() else {}


def _data(settings: dict, result: dict) -> str:
    if not settings:
        return "not recorded"
    number = result.get("conversations")
    return _file_names(settings["data"]) + (f": {number} conversations" if number else "")


def _measured(settings: dict, result: dict, library: str) -> str:
    """Accuracy before and after, and of what; or that nobody knows."""
    if result.get("after") is None and result.get("no_tool_after") is None:
        return "Not measured."
    rows = [("calls right", _share(result, "before"), _share(result, "after")),
            ("no tool needed", _share(result, "no_tool_before"), _share(result, "no_tool_after"))]
    held_out = _file_names(settings["eval_data"]) or f"{settings['eval_share']:.0%} of the data"
    when = "" if library == "peft" else ", before the merge"
    return (f"On held-out conversations ({held_out}), decoded greedily{when}. Calls right: of "
            f"those that expect calls ({result.get('after_of')}), the share answered with just "
            "these, every name and argument compared. No tool needed: of those that expect none "
            f"({result.get('no_tool_after_of')}), the share answered without a call.\n\n"
            + _table(("", "before", "after"), rows))


def _share(result: dict, key: str) -> str:
    """0.727 (95 %: 0.655 to 0.789)."""
    if result.get(key) is None:
        return "not measured"
    text, interval = f"{result[key]:.3f}", result.get(f"{key}_95")
    return text + (f" (95 %: {interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |"
                     for line in lines)


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _file_names(data: str) -> str:
    return ", ".join(Path(name).name + (f" (weight {weight:g})" if weight != 1 else "")
                     for name, weight in split_data(data))


def _on_hub(base: str) -> bool:
    """Whether `base` is a hub id, org/name, as `weights.locate` takes one."""
    parts = base.split("/")
    return len(parts) == 2 and all(parts) and base[0] not in ".~" and not Path(base).exists()


# --- the hub --------------------------------------------------------------------------------------

_LOGIN = ("make a token that may write at https://huggingface.co/settings/tokens, then set "
          "HF_TOKEN or run `hf auth login`")


def add_push_flags(parser: argparse.ArgumentParser, what: str) -> None:
    """--push and --public: `what` goes to the hub, where nobody else sees it unless asked for."""
    parser.add_argument("--push", metavar="ORG/NAME", help=f"at the end upload {what} to this "
                        "repository of the hub, made private if there is none")
    parser.add_argument("--public", action="store_true", help="let --push make a repository that "
                        "everybody can read (one that is there stays as it is)")


def check_push(flags: argparse.Namespace, base: str | None = None) -> None:
    """Refuses a push that cannot succeed, before there is any work to be lost.

    Looks at the repository's name, at the token, and at whether its account may write there.
    `base`: that of the adapter to be pushed, which others must be able to load.
    """
    if not flags.push:
        if flags.public:
            raise UserError("--public says how to --push; give the repository too: --push org/name")
        return
    start = f"--push {flags.push}: "
    owner, slash, _ = flags.push.partition("/")
    try:
        validate_repo_id(flags.push)
    except HFValidationError:
        slash = ""
    if not slash:
        raise UserError(f"{start}not a repository of the form org/name, such as my-name/my-calls")
    if base and not _on_hub(base) and builtin(base) != NANO:
        raise UserError(f"{start}the adapter's base is a folder here, which nobody else has; give "
                        "its hub id as --model, or train without --push and push the whole model: "
                        f"python -m minilora merge --adapter RUN --out FOLDER --push {flags.push}")
    if get_token() is None:
        raise UserError(f"{start}there is no token for the hub; {_LOGIN}")
    try:
        account = HfApi().whoami()
    except Exception as error:  # also the transport's own errors, other ones in every release
        raise UserError(start + _reason(error)) from None
    owners = [account["name"], *(org["name"] for org in account.get("orgs", []))]
    if owner.lower() not in (name.lower() for name in owners):
        raise UserError(f"{start}the token is of {account['name']}, who is not in {owner}; push to "
                        f"{' or '.join(f'{name}/…' for name in owners)}")
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"{start}the token may only read; {_LOGIN}")


def push(folder: str | Path, repo: str, public: bool = False) -> str:
    """Uploads what `save_adapter` or `export_merged` wrote; returns the address of its page.

    Files that an earlier push left there and this one has not are deleted, so that no old shard or
    adapter is taken for a part of the model; other files stay. Raises UserError, with the command
    that tries again, where the hub refuses or cannot be reached.
    """
    api = HfApi()
    try:
        page = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Written by minilora",
                          delete_patterns=sorted({*ADAPTER_FILES, *MODEL_FILES}))
    except Exception as error:  # as above
        again = ["hf", "upload", repo, str(folder), ".", *([] if public else ["--private"])]
        raise UserError(f"{folder} is whole on the disk, but not pushed to {repo}: "
                        f"{_reason(error)}; then: {shlex.join(again)}") from None
    return str(page)


def _reason(error: Exception) -> str:
    """What went wrong between us and the hub, in one line, and what to do."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        return f"the hub could not be reached ({said}); go online"
    return f"the hub said no ({said}); " + (
        _LOGIN if status in (401, 403, 404) else "wait, or mend what it names")
