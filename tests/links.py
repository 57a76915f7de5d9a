"""Sets the line numbers in docs/*.md: `python tests/links.py` after a change of a script."""

import glob
import os
import re

DOCS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "docs")
LINK = re.compile(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)#L(\d+)\)")


def lines_of(file: str) -> dict[str, int]:
    """{function, class, CONSTANT or Class.method: line of its definition} of a file in the project's root."""
    found, owner = {}, ""
    with open(os.path.join(DOCS, "..", file), encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if m := re.match(r"(?:def|class) (\w+)|([A-Z_]+) = ", line):
                owner = m[1] or m[2]
                found.setdefault(owner, number)
            elif m := re.match(r"    def (\w+)\(", line):
                found[f"{owner}.{m[1]}"] = number
    return found


def linked(text: str) -> str:
    """The text with every link at the line where its name is defined now; KeyError for one that is not."""
    return LINK.sub(lambda m: f"[`{m[1]}`](../{m[2]}#L{lines_of(m[2])[m[1]]})", text)


if __name__ == "__main__":
    for path in glob.glob(os.path.join(DOCS, "*.md")):
        with open(path, encoding="utf-8") as f:
            text = f.read()
        if linked(text) != text:
            with open(path, "w", encoding="utf-8") as f:
                f.write(linked(text))
