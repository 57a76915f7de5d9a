"""Sets the line numbers in docs/methods.md: `python docs/link_methods.py` after a change of rewards.py."""

import os
import re

HERE = os.path.dirname(os.path.abspath(__file__))
LINK = re.compile(r"\[`(\w+)`\]\(\.\./(\w+\.py)#L(\d+)\)")


def lines_of(file: str) -> dict[str, int]:
    """{function: number of its `def` line} of a file in the project's root."""
    with open(os.path.join(HERE, "..", file), encoding="utf-8") as f:
        found = (re.match(r"def (\w+)\(", line) for line in f)
        return {m[1]: number for number, m in enumerate(found, 1) if m}


def linked(text: str) -> str:
    """The text with every link at the line where its function is now; KeyError for one that is not there."""
    return LINK.sub(lambda m: f"[`{m[1]}`](../{m[2]}#L{lines_of(m[2])[m[1]]})", text)


if __name__ == "__main__":
    path = os.path.join(HERE, "methods.md")
    with open(path, encoding="utf-8") as f:
        text = linked(f.read())
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
