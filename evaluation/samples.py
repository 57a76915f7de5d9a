"""Samples on disk: read and checked a line at a time, written so that a crash loses a batch at most.

A Sample is one response: {"id", "sample", "source", "problem", "answer", "kind", "prompt", "budget", "mode",
"response", "length", "finish_reason", "correct"} and, where known, "thinking_length" and "choices".
"""

import gzip
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from data import BadInput
from evaluation.metrics import jsonable

NEEDED = ("id", "source", "budget", "length", "finish_reason", "correct")  # of a sample, for results
TYPES = dict.fromkeys(("source", "problem", "prompt", "response"), str)
TYPES |= {"id": (str, int), "answer": (str, list)} | dict.fromkeys(("kind", "effort"), (str, type(None)))


def check_sample(sample: object, need: Iterable[str]) -> dict:
    """The sample, token counts as int; BadInput (without the line's number) if it breaks the contract."""
    if not isinstance(sample, dict):
        raise BadInput(f"it is a {type(sample).__name__}, not an object with the fields {', '.join(need)}")
    if missing := [key for key in need if key not in sample]:
        raise BadInput(f"no field {', '.join(missing)}; a sample needs {', '.join(need)} (null: not known)")
    for key, least in (("budget", 1), ("length", 0), ("thinking_length", 0)):
        value = sample.get(key)
        if value is None:
            continue
        # nan and infinity, which Python's json reads, fail the comparison with their own whole part.
        if type(value) not in (int, float) or value != value // 1 or not least <= value < 2**31:
            raise BadInput(f"{key} is {value!r}; it must be null or a whole number of tokens from {least}")
        sample[key] = int(value)
    if "correct" in need and sample["correct"] not in (0, 1):
        raise BadInput(f"correct is {sample['correct']!r}, not true or false; --regrade checks it anew")
    for key in [*need, "kind", "source", "effort"]:
        if key in sample and not isinstance(sample[key], TYPES.get(key, object)):
            raise BadInput(f"{key} is {str(sample[key])[:50]!r}; evaluate.py writes none such")
    return sample


def read_samples(path: str, need: Iterable[str] = NEEDED, flag: str = "--samples") -> Iterator[dict]:
    """Samples of a JSONL file, plain or gzipped, one at a time; BadInput names the line that is wrong."""
    at, sample = 0, None
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as f:
            for at, line in enumerate(f, 1):  # noqa: B007
                if line.strip():
                    sample = check_sample(json.loads(line), need)
                    yield sample
    except BadInput as error:
        raise BadInput(f"{flag} {path}, line {at}: {error}") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise BadInput(f"{flag} {path} cannot be read ({error}): give a .jsonl(.gz) file") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{flag} {path}, line {at} is no JSON ({error}): delete it") from None
    if sample is None:
        raise BadInput(f"{flag} {path} holds no samples: give a file that evaluate.py wrote")


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of up to `size` items, without holding more than one of them."""
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, size)), [])


def write_json(path: str, value: dict) -> None:
    """Written beside its place, fsynced and renamed: nobody ever reads half a file."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.write(json.dumps(jsonable(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def check_writable(folder: str) -> None:
    """BadInput, before a model is loaded, where no file can be written into `folder`; it is not made yet."""
    path = Path(os.path.abspath(folder))
    place = next(p for p in (path, *path.parents) if os.path.exists(p))
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        told = f"--out {folder} cannot be written ({place}: {error.strerror})"
        raise BadInput(f"{told}: name another") from None


def name_folders(specs: list[str]) -> dict[str, str]:
    """{label: folder} of "label=folder", or of folders: by their last part, in full where that is taken."""
    found = {}
    for spec in specs:
        label, _, folder = ("", "", spec) if os.path.isdir(spec) else spec.rpartition("=")
        if not os.path.isdir(folder):
            raise BadInput(f"{folder}: no such folder; name finished runs, or LABEL=FOLDER")
        label = label or os.path.basename(os.path.abspath(folder))
        found[folder if label in found else label] = folder
    return found
