"""Keeps README.md and docs/*.md true to the code: `python tests/link_lines.py` after a change of a script.

A link [`text`](../file.py#L12) gets the number of the line that defines `text` (a function, class, constant,
Class.method) or, for any other text, of the one line that holds it. The tables of docs/methods.md are written
from the docstrings of rewards.py and methods/, and from the recipes.
"""

import glob
import inspect
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LINK = re.compile(r"\[`([^`]+)`\]\((?:\.\./)?([\w/.-]+)#L(\d+)\)")


def read(path: str) -> str:
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        return f.read()


def line_of(text: str, path: str) -> int:
    """Number of the line of a file that `text` means; KeyError where it is not exactly one."""
    text = " ".join(text.split())  # a line of the page may end in it
    lines, name = read(path).splitlines(), text.rpartition(".")[2]
    if re.fullmatch(r"\w+(\.\w+)?", text):
        found = [n for n, x in enumerate(lines, 1) if re.match(rf"\s*(def|class) {name}\b|{name} = ", x)]
        if "." in text:  # a method: the first of its name below the class
            found = [n for n in found if n > line_of(text.partition(".")[0], path)][:1]
    else:
        found = [n for n, x in enumerate(lines, 1) if text in x]
    if len(found) != 1:
        raise KeyError(f"{path} has `{text}` in {len(found)} lines {found}: a link needs one")
    return found[0]


def linked(text: str) -> str:
    """The text of a page with the numbers of all its links to lines as they are now."""
    return LINK.sub(lambda m: f"{m[0].rpartition('#L')[0]}#L{line_of(m[1], m[2])})", text)


# -----------------------------------------------------------------------------
# The tables of docs/methods.md


def cell(text: str) -> str:
    """A docstring or comment in one cell of a table, with its arXiv ids as links."""
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", text)


def recipes() -> dict:
    """{name: (what it is, its flags)} of all recipes; one that begins with another has that one's, too."""
    found = {}
    for path in sorted(glob.glob(f"{ROOT}/recipes/*.args"), key=os.path.basename):
        name, lines = os.path.basename(path)[:-5], read(os.path.relpath(path, ROOT)).splitlines()
        # What it is stands in its first comment, up to what is said of the data.
        about = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
        about = re.split(r" (?:Data: |toy:|Data and model|python data\.py)", about)[0]
        flags = " ".join(line for line in lines if not line.startswith("#"))
        for other in re.findall(r"@recipes/(\w+)\.args", flags):
            flags = " ".join(x for x in read(f"recipes/{other}.args").splitlines() if x[:1] != "#") + flags
        found[name] = about.strip(), flags
    return found


def flag(flags: str, name: str, default: str) -> str:
    return (re.findall(rf"{name} (\S+)", flags) or [default])[-1]


def users(name: str, word: str, default: str) -> str:
    """Links to the recipes in which the flag `name` is `word`."""
    found = [r for r, (_, flags) in recipes().items() if flag(flags, name, default) == word]
    return "most" if len(found) > 12 else ", ".join(f"[{r}](../recipes/{r}.args)" for r in found)


def functions(table: dict, name: str, default: str, section: str = "") -> str:
    """REWARDS or ADVANTAGES with their docstrings; `section`: those below that heading of rewards.py."""
    lines, rows = read("rewards.py").splitlines(), ["| name | formula, source, differences | recipes |"]
    rows.append("| --- | --- | --- |")
    for word, function in table.items():
        line = line_of(function.__name__, "rewards.py")
        heads = [x for x in lines[:line] if x.startswith("# --- ")]
        if section and section not in heads[-1]:
            continue
        other = "" if word == function.__name__ else f" (`{name} {word}`)"
        link = f"[`{function.__name__}`](../rewards.py#L{line}){other}"
        rows.append(f"| {link} | {cell(function.__doc__)} | {users(name, word, default)} |")
    return "\n".join(rows)


def tables() -> dict:
    """{marker: table} of docs/methods.md."""
    sys.path.insert(0, ROOT)
    import methods
    from rewards import ADVANTAGES, REWARDS

    made = [
        "| recipe | what it is, and where it was read | reward, advantage | method |",
        "| --- | --- | --- | --- |",
    ]
    for name, (about, flags) in recipes().items():
        reward, advantage = flag(flags, "--reward", "lcpo_exact"), flag(flags, "--advantage", "grpo")
        row = f"[{name}](../recipes/{name}.args) | {cell(about)} | `{reward}`, `{advantage}`"
        made.append(f"| {row} | {flag(flags, '--method', '').join('``') if '--method ' in flags else ''} |")
    rows = ["| name | what it does | constants | recipes |", "| --- | --- | --- | --- |"]
    for name in methods.names():
        method = methods.find(name)
        constants = list(inspect.signature(method).parameters.values())[2:]
        about = cell(inspect.getmodule(method).__doc__.partition("\n\n")[0])
        words = f"[`{name}`](../methods/{name}.py)", about
        shown = ", ".join(f"`{p.name}={p.default!r}`" for p in constants)
        rows.append("| " + " | ".join((*words, shown, users("--method", name, "plain"))) + " |")
    sections = {"target": "a target length", "short": "short is better", "guessed": "reconstructions"}
    found = {key: functions(REWARDS, "--reward", "lcpo_exact", head) for key, head in sections.items()}
    found |= {"recipes": "\n".join(made), "methods": "\n".join(rows)}
    return found | {"advantages": functions(ADVANTAGES, "--advantage", "grpo")}


def filled(text: str) -> str:
    """docs/methods.md with its tables as they are now, each between <!-- NAME --> and <!-- end -->."""
    for name, table in tables().items():
        text, n = re.subn(
            rf"<!-- {name} -->\n.*?<!-- end -->",
            lambda m, name=name, table=table: f"<!-- {name} -->\n{table}\n<!-- end -->",
            text,
            flags=re.S,
        )
        if n != 1:
            raise KeyError(f"docs/methods.md has {n} places for the table {name!r}")
    return text


def pages() -> list:
    return ["README.md", *sorted(os.path.relpath(p, ROOT) for p in glob.glob(f"{ROOT}/docs/*.md"))]


def current(path: str) -> str:
    """A page as it should be."""
    text = read(path)
    return linked(filled(text) if path == "docs/methods.md" else text)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    for page in pages():
        text = current(page)
        if text != read(page):
            print(f"{page}: written anew")
            with open(os.path.join(ROOT, page), "w", encoding="utf-8") as file:
                file.write(text)
