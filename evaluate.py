# PYTHON_ARGCOMPLETE_OK
"""Does the model think for as many tokens as it was asked to, and is it still right?

    python evaluate.py --model DIR --data math500 --budgets 512,1024,2048,3600 --n 16 --out out/eval
    python evaluate.py --model DIR --protocol l1 --out out/l1                     the settings of a paper
    python evaluate.py --base-url URL --api-model NAME --data ... --out out/api   any OpenAI-compatible server
    python evaluate.py --samples out/eval/samples.jsonl --out out/again           no model needed
    python evaluate.py --compare out/a out/b --out out/both                       finished evaluations
    python evaluate.py --watch out/run out/run2                                   learning curves of training

For every budget the prompt is rebuilt from the problem, n responses are sampled, checked, and appended to
samples.jsonl as they come; --resume goes on after a crash. Then follow results.json (all figures of
metrics.py, with intervals), problems.jsonl (the same per problem), pictures, and report.html with a browser
of single samples. samples.jsonl alone is enough to make them again. Training calls evaluate() itself.
"""

import argparse
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np

import data
import verifier
from data import BadInput
from evaluation import curves, engines, metrics, plots, report
from evaluation.metrics import jsonable
from toy import task as toy

BATCH = 1024  # responses sampled between two writes of samples.jsonl: what a crash can lose
OPEN_CAP = 8192  # response cap in tokens where no exact budget sets one (L1's choice)
# The fields of a sample that results need.
NEEDED = ("id", "source", "budget", "length", "finish_reason", "correct")
DEFAULTS = {"mode": "exact", "n": 1, "temperature": 0.6, "top_p": 0.95, "require_think": False}
# What a paper evaluates and how; any flag that is given goes before. The AI2 blog states neither samples
# nor temperature, so the defaults stand there.
PROTOCOLS = {
    "l1": {"data": "aime2025,math500,amc,olympiadbench", "budgets": "512,1024,2048,3600", "n": 16,
           "temperature": 0.6, "top_p": 0.95, "wording": "l1", "require_think": True},
    "ai2": {"data": "math500,mmlu", "budgets": "100,1024,2048,4096,6144,8192,9216,10240", "wording": "tulu"},
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------------
# Reading samples


def check_sample(sample: object, need: tuple) -> dict:
    """The sample, token counts as int; BadInput (without the line's number) if it breaks the contract."""
    if not isinstance(sample, dict):
        raise BadInput(f"it is a {type(sample).__name__}, not an object with the fields {', '.join(need)}")
    missing = [key for key in need if key not in sample]
    if missing:
        raise BadInput(f"no field {', '.join(missing)}; a sample needs {', '.join(need)} (null: not known)")
    for key, least in (("budget", 1), ("length", 0), ("thinking_length", 0)):
        value = sample.get(key)
        if value is None:
            continue
        # nan and infinity, which Python's json reads, fail the comparison with their own whole part.
        if type(value) not in (int, float) or value != value // 1 or not least <= value < 2**31:
            raise BadInput(f"{key} is {value!r}; it must be null or a whole number of tokens from {least}")
        sample[key] = int(value)
    if not isinstance(sample["id"], (str, int)) or not isinstance(sample["source"], str):
        raise BadInput("id must be a string or a whole number, and source a string")
    if "correct" in need and sample["correct"] not in (0, 1):
        raise BadInput(f"correct is {sample['correct']!r}, not true or false; --regrade checks it anew")
    if "response" in need and not (isinstance(sample["response"], str) and sample["answer"] is not None):
        raise BadInput("response must be a string and answer a string or a list of strings")
    if sample.get("kind") not in (None, "math", "choice"):
        raise BadInput(f"kind is {sample['kind']!r}; it must be math or choice")
    for key, kinds in (("baseline", str), ("target_words", (str, int)), ("preference", (int, float)),
                       ("difficulty", (int, float))):  # fmt: skip
        if sample.get(key) is not None and not (
            isinstance(sample[key], kinds) and sample[key] == sample[key]
        ):
            raise BadInput(f"{key} is {sample[key]!r}; it must be a text or a number, as its metric says")
    return sample


def read_samples(path: str, regrade: bool = False, flag: str = "--samples") -> Iterator[dict]:
    """Samples of a JSONL file, plain or gzipped, one at a time; BadInput names the line that is wrong."""
    # To be checked again, a sample needs its text and its gold answer in place of a verdict.
    need, sample = (*NEEDED[:-1], "response", "answer") if regrade else NEEDED, None
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
            for at, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    sample = check_sample(json.loads(line), need)
                except BadInput as error:
                    raise BadInput(f"{flag} {path}, line {at}: {error}") from None
                except (ValueError, RecursionError) as error:
                    raise BadInput(f"{flag} {path}, line {at} is no JSON ({error}): delete it") from None
                yield sample
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise BadInput(f"{flag} {path} cannot be read ({error}): give a .jsonl(.gz) file") from None
    if sample is None:
        raise BadInput(f"{flag} {path} holds no samples: give a file that evaluate.py wrote")


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of up to `size` items, without holding more than one of them."""
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, size)), [])


# ------------------------------------------------------------------------------------------------------------
# Sampling


def plan(
    problems: list[dict],
    budgets: list,
    mode: str,
    wording: str,
    tokenizer,
    context: int,
    max_tokens: int | None = None,
) -> Iterator[dict]:
    """One request per budget and problem: {"problem", "budget", "prompt", "ids", "max_tokens"}.

    `context` and `max_tokens` in tokens; BadInput where prompt and response do not fit into the context.
    Without a tokenizer (a server) there are no ids, and the server has to know what fits.
    """
    largest = max((b for b in budgets if b), default=0)
    if max_tokens and largest > max_tokens and mode == "exact":
        raise BadInput(f"--max-tokens ({max_tokens}) is below the budget {largest}: raise it or leave it out")
    for budget in budgets:
        # Twice the budget leaves room to see by how much a response misses it.
        cap = max_tokens or (2 * budget if budget and mode == "exact" else max(OPEN_CAP, budget or 0))
        for problem in problems:
            asked_as = mode if budget else None
            apart = problem["source"] in data.BLANK_LINE
            prompt = data.budget_prompt(problem["problem"], budget, asked_as, problem["kind"], wording, apart)
            if tokenizer is None:
                yield {"problem": problem, "budget": budget, "prompt": prompt, "max_tokens": cap}
                continue
            ids = np.array(data.encode_prompt(tokenizer, prompt), np.int32)  # an eighth of a list's memory
            room = context - len(ids)
            # A default cap gives way to the context; a budget or a cap that was asked for does not.
            wanted = max(1, budget or 0, max_tokens or 0)
            if wanted > room:
                what = f"prompt {problem['id']} ({len(ids)} tokens) and a response of {wanted}"
                way_out = "lower --budgets or --max-tokens, or drop long problems"
                raise BadInput(f"{what} exceed the model's context of {context}: {way_out}")
            request = {"problem": problem, "budget": budget, "prompt": prompt, "ids": ids}
            yield request | {"max_tokens": min(cap, room)}


def to_samples(request: dict, responses: list[dict], mode: str) -> Iterator[dict]:
    """The responses to one request as samples of the Sample contract, not yet graded."""
    problem, budget = request["problem"], request["budget"]
    for i, response in enumerate(responses):
        sample = {"id": problem["id"], "sample": i, "source": problem["source"]}
        sample |= {key: problem[key] for key in ("problem", "answer", "kind")}
        sample |= {"prompt": request["prompt"], "budget": budget, "mode": mode if budget else None}
        sample |= response
        if problem.get("choices"):
            sample["choices"] = problem["choices"]
        yield sample


def grade(samples: list[dict], require_think: bool) -> dict:
    """Set `correct` of every sample; the checker's counts (timeouts, parse failures ...).

    A response that was cut off is wrong, as in training: what stands in its middle is not checked.
    """
    whole = [s for s in samples if s["finish_reason"] != "length"]
    verdicts, counts = verifier.check_answers(
        [s["response"] for s in whole], [s["answer"] for s in whole],
        [s.get("kind") or "math" for s in whole], [s.get("choices") for s in whole], require_think,
    )  # fmt: skip
    verdicts = iter(verdicts)
    for sample in samples:
        sample["correct"] = sample["finish_reason"] != "length" and bool(next(verdicts))
    return counts | {"checked": len(samples)}


def evaluate(
    sampler, problems: list[dict], budgets: list[int | None], mode: str, n: int, out: str, *,
    wording: str = "l1", temperature: float = 0.6, top_p: float = 0.95, max_tokens: int | None = None,
    seed: int = 0, count: str = "response", require_think: bool = False,
    trained_budgets: list[int] | None = None, model: str | None = None, log: Callable = print, state=None,
    resume: bool = False, weights: str | None = None, limit: int = metrics.EXCEED,
) -> dict:  # fmt: skip
    """Sample n responses per problem and budget (None: no budget); samples, results and pictures go to `out`.

    Returns the results. Data sets are told apart by the problems' `source`. What `out` held is written over,
    or, with `resume`, gone on with. With `state` (accelerate's PartialState) its processes share the work;
    the first one writes and returns. `weights` is a hash of the model, `limit` the tokens of "exceed".
    """
    rank, processes = (state.process_index, state.num_processes) if state else (0, 1)
    tokenizer, start, batch_size = sampler.tokenizer, time.monotonic(), getattr(sampler, "batch", BATCH)
    per_batch = max(1, batch_size // n)  # problems
    # The whole plan comes first: what does not fit is found before an hour of sampling, not after it.
    requests = list(plan(problems, budgets, mode, wording, tokenizer, sampler.max_model_len, max_tokens))
    settings = {"model": model, "weights": weights, "sampler": sampler.name, "mode": mode, "wording": wording}
    settings |= {"seed": seed, "n": n, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    settings |= {"require_think": require_think, "asked": budgets, "batch": per_batch}
    settings |= {"data": hash_data(problems), "template": getattr(tokenizer, "chat_template", None)}
    done, verify, table, kept = 0, {}, {}, []
    if rank == 0:
        os.makedirs(out, exist_ok=True)
        if resume and (finished := finished_results(out, settings, log)):
            return finished
        done, verify = go_on(out, settings) if resume else start_anew(out)
    path = os.path.join(out, "samples.jsonl") if rank == 0 else os.devnull
    tally(read_samples(path, flag="--resume") if done else (), table, kept, count)
    # A batch is sampled, checked, written and counted before the next one starts.
    with open(path, "a", encoding="utf-8") as f:
        for at, batch in enumerate(batches(requests, per_batch)):
            if at * per_batch * n < done:
                continue
            own = batch[rank::processes]
            # No two batches and no two processes draw with the same seed.
            batch_seed = (seed * 1_000_003 + at) * processes + rank
            found = engines.respond(sampler, own, n, temperature, top_p, batch_seed) if own else []
            samples = [s for r, c in zip(own, found, strict=True) for s in to_samples(r, c, mode)]
            counts = [grade(samples, require_think)]
            if processes > 1:
                samples, counts = gather(samples), gather(counts)
            verify = sum_counts([verify, *counts])
            done += len(samples)
            tally(samples, table, kept, count)
            if rank == 0:
                append(f, samples)
                record = {"done": done, "verify": verify, "settings": settings}
                write_json(os.path.join(out, UNFINISHED), record)
            log(f"evaluate: {done}/{len(requests) * n} samples, {time.monotonic() - start:.0f} s")
    # Not among the settings: a server may come back at another address.
    about = settings | {"base_url": getattr(sampler, "url", None)}
    about |= {"trained_budgets": trained_budgets, "count": count, "verify": verify}
    return finish(table, about, out, kept, log, limit) if rank == 0 else {}


# ------------------------------------------------------------------------------------------------------------
# Crashes and how to go on. Beside the samples lies how many of them are whole, and how they were made.

UNFINISHED = "unfinished.json"


def tally(samples: Iterable[dict], table: dict, kept: list, count: str) -> None:
    """Samples into the table of figures and, some of them, into the report's browser."""
    for sample in samples:
        metrics.add(table, sample, count)
        report.pick(kept, sample)


def append(file, samples: list[dict]) -> None:
    """Samples to disk, for good: the record of them that follows must never be ahead of them."""
    file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    file.flush()
    os.fsync(file.fileno())


def write_json(path: str, value: dict) -> None:
    """Written beside its place, fsynced and renamed: nobody ever reads half a file."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.write(json.dumps(jsonable(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def same_settings(old: dict, new: dict, out: str) -> None:
    """BadInput that names what differs: samples made in two ways would make one figure."""
    for key, value in jsonable(new).items():
        if old.get(key) != value:
            told = f"{key} was {str(old.get(key))[:200]!r} and is {str(value)[:200]!r}"
            raise BadInput(f"--resume {out}: {told}: give the settings of the first run, or --overwrite it")


def finished_results(out: str, settings: dict, log: Callable) -> dict:
    """The results in `out` if they are there and of these settings; {} where none are."""
    results = read_results(os.path.join(out, "results.json"))
    if results:
        same_settings(results, settings, out)
        log(f"evaluate: {out} is finished: nothing to resume")
    return results


def start_anew(out: str) -> tuple[int, dict]:
    """Remove what an earlier evaluation left in `out`; no samples, no counts."""
    clear(out)
    for name in ("samples.jsonl", UNFINISHED):
        if os.path.exists(os.path.join(out, name)):
            os.remove(os.path.join(out, name))
    return 0, {}


def go_on(out: str, settings: dict) -> tuple[int, dict]:
    """(samples, checker's counts) of an unfinished sweep; lines after its last whole batch are cut off."""
    old = read_results(os.path.join(out, UNFINISHED))
    if not old:
        return start_anew(out)  # stopped before its first batch was whole
    same_settings(old["settings"], settings, out)
    with open(os.path.join(out, "samples.jsonl"), "r+b") as f:
        lines = sum(f.readline().endswith(b"\n") for _ in range(old["done"]))
        if lines < old["done"]:
            raise BadInput(f"--resume {out}: samples.jsonl lost lines since the crash: --overwrite it")
        f.truncate(f.tell())
    return old["done"], old["verify"]


def gather(items: list) -> list:
    """The items of all processes, in the order of the processes."""
    from accelerate.utils import gather_object

    return gather_object(items)


def sum_counts(counts: list[dict]) -> dict:
    """Counters added up, name by name."""
    return {key: sum(c.get(key, 0) for c in counts) for key in sorted({k for c in counts for k in c})}


def hash_data(problems: list[dict]) -> dict:
    """{data set: {"problems", "sha256"}}: two evaluations with equal hashes asked the same."""
    rows: dict = {}
    for p in problems:
        row = [p[key] for key in ("id", "problem", "answer", "kind")] + [p.get("choices")]
        rows.setdefault(p["source"], []).append(json.dumps(row, ensure_ascii=False))
    hashes = {name: hashlib.sha256("\n".join(lines).encode()).hexdigest() for name, lines in rows.items()}
    return {name: {"problems": len(lines), "sha256": hashes[name]} for name, lines in rows.items()}


# ------------------------------------------------------------------------------------------------------------
# Results on disk and on the screen


def read_results(path: str) -> dict:
    """The results of a finished evaluation; {} where there is none, BadInput where the file is broken."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            return dict(json.load(f))
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path} is no results file of evaluate.py ({error}): move it away") from None


def clear(out: str) -> None:
    """Remove an earlier evaluation's results and pictures, which would pass for those of the new samples."""
    pictures = read_results(os.path.join(out, "results.json")).get("pictures", [])
    for name in (*pictures, "results.json", "report.html", "problems.jsonl"):
        path = os.path.join(out, os.path.basename(name))
        if os.path.exists(path):
            os.remove(path)


def versions() -> dict:
    """The libraries that took part: another version of the answer checker may judge otherwise."""
    found = {"python": sys.version.split()[0], "math-verify": importlib.metadata.version("math-verify")}
    used = [name for name in ("numpy", "torch", "transformers", "vllm", "openai") if name in sys.modules]
    return found | {name: sys.modules[name].__version__ for name in used}


def finish(table: dict, about: dict, out: str, kept: list, log=print, limit: int = metrics.EXCEED) -> dict:
    """Summarise, draw, write results.json and the rest to `out`, print the tables; returns the results."""
    os.makedirs(out, exist_ok=True)
    trained = about.get("trained_budgets")
    datasets, draws = metrics.summarise(table, trained, limit, about.get("seed") or 0)
    results = jsonable(about | {"exceed_limit": limit, "versions": versions(), "datasets": datasets})
    if over_sets := metrics.mean_over_sets(datasets, draws):
        results["mean"] = jsonable({"sets": list(datasets), "budgets": over_sets})
    clear(out)
    shown = {}  # what tables and pictures need of each data set
    for name, part in table.items():
        cells, problems = metrics.pool(part["cells"]), len(part["ids"])
        shown[name] = {"problems": problems, "mode": results["datasets"][name]["mode"]}
        if len(cells) == len(part["cells"]):
            figures = {b: datasets[name]["budgets"]["none" if b is None else str(b)] for b in cells}
        else:
            figures = {b: metrics.summarise_cell(c, problems, limit, 0)[0] for b, c in cells.items()}
        shown[name] |= {
            "figures": figures,
            "lengths": {b: metrics.known_lengths(c) for b, c in cells.items()},
        }
    pictures = plots.draw(shown, out, trained, about.get("model"))
    results["pictures"] = [os.path.basename(p) for p in pictures]
    with open(os.path.join(out, "problems.jsonl"), "w", encoding="utf-8") as f:
        f.writelines(json.dumps(jsonable(row)) + "\n" for row in metrics.problem_records(table, limit))
    report.write_report(results, shown, pictures, kept, out)
    write_json(os.path.join(out, "results.json"), results)
    if os.path.exists(os.path.join(out, UNFINISHED)):
        os.remove(os.path.join(out, UNFINISHED))
    for name, part in shown.items():
        log(report.format_table(name, part, results["datasets"][name]))
    if over_sets:
        rows = report.table_rows(results["mean"]["budgets"])
        log(f"\nmean of {len(table)} data sets\n{report.plain_table(rows)}")
    log(
        f"evaluate: figures in {os.path.join(out, 'results.json')}, all in {os.path.join(out, 'report.html')}"
    )
    log(f"evaluate: pictures in {', '.join(pictures) or 'no file, as no lengths are known'}")
    return results


# ------------------------------------------------------------------------------------------------------------
# Command line


def evaluate_samples(args: argparse.Namespace) -> dict:
    """Results and pictures from saved samples; --regrade checks again and writes disagreements.jsonl."""
    path, out, regrade, table, kept, verify = args.samples, args.out, args.regrade, {}, [], {"changed": 0}
    about = {"model": None, "trained_budgets": None, "count": "response"}
    if os.path.basename(path) == "samples.jsonl":
        # Beside the samples lies what their run knew and no sample tells: model, settings, trained budgets.
        beside = read_results(os.path.join(os.path.dirname(path), "results.json"))
        about |= {k: v for k, v in beside.items() if k not in ("datasets", "mean", "pictures", "versions")}
    about |= {k: v for k, v in vars(args).items() if k in ("samples", "count", "trained_budgets") and v}
    require_think = args.require_think or bool(about.get("require_think"))
    if regrade:
        # Once through the whole file first: a broken line is found before anything is written.
        sum(1 for _ in read_samples(path, regrade))
        os.makedirs(out, exist_ok=True)
    differing = os.path.join(out, "disagreements.jsonl") if regrade else os.devnull
    with open(differing, "w", encoding="utf-8") as f:
        # Batch by batch: the file may be far larger than the memory.
        for batch in batches(read_samples(path, regrade), BATCH):
            stored = [s.get("correct") for s in batch]
            verify = sum_counts([verify, grade(batch, require_think)]) if regrade else verify
            tally(batch, table, kept, about["count"])
            for sample, old in zip(batch, stored, strict=True):
                if old is not None and bool(old) != sample["correct"]:
                    verify["changed"] += 1
                    f.write(json.dumps(sample | {"correct": old, "regraded": sample["correct"]}) + "\n")
    if regrade:
        about |= {"require_think": require_think, "verify": verify}
    return finish(table, about, out, kept, limit=args.exceed)


def budget_list(text: str, flag: str = "--budgets") -> list[int | None]:
    """ "none,512,1024" -> [None, 512, 1024], each once, in the order given; BadInput on anything else."""
    budgets = []
    for word in map(str.strip, text.split(",")):
        if word != "none" and not (re.fullmatch("[0-9]{1,9}", word) and int(word) > 0):
            raise BadInput(f"{flag} {text!r}: {word!r} is no budget; give token counts above 0: 512,1024")
        budgets.append(None if word == "none" else int(word))
    return list(dict.fromkeys(budgets))


def load_data(names: str, limit: int | None, seed: int) -> list[dict]:
    """Problems of the sets in "math500,FILE,toy"; `source` becomes the set's name (of a FILE its stem)."""
    problems = []
    for spec in map(str.strip, names.split(",")):
        # The test split: the toy's training problems are never asked here.
        if spec in toy.TASKS:
            found = toy.problems(spec, "test", limit or 200, seed)
        else:
            found = data.load_problems(spec, limit=limit)
        name = re.sub(r"\.(jsonl?|csv|parquet)(\.gz)?$", "", os.path.basename(spec.rstrip("/")))
        if name in {problem["source"] for problem in problems}:
            raise BadInput(f"--data {names!r} names {name!r} twice; results go by name, so rename a file")
        ids = Counter()
        for problem in found:
            # Two halves of one set may both number their problems from 0: equal ids would be one problem.
            ids[problem["id"]] += 1
            again = f"-{ids[problem['id']]}" if ids[problem["id"]] > 1 else ""
            problems.append(problem | {"source": name, "id": f"{problem['id']}{again}"})
    return problems


def check_out(args: argparse.Namespace) -> None:
    """BadInput if --out holds another evaluation. Saved generations are never written over by --samples."""
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise BadInput(f"--out {args.out} is a file: name a folder")
    # samples.jsonl alone is what a run leaves that was stopped half-way.
    names = ("results.json", "samples.jsonl", "compare.json")
    held = [f for f in names if os.path.exists(os.path.join(args.out, f))]
    if held and not (args.overwrite or args.resume):
        way_out = "name another, --resume it, or --overwrite it"
        raise BadInput(f"--out {args.out} holds an evaluation ({held[0]}): {way_out}")
    own = os.path.join(args.out, "samples.jsonl")
    of_another = args.samples and os.path.exists(own) and not os.path.samefile(own, args.samples)
    if of_another or (args.compare and {"results.json", "samples.jsonl"} & set(held)):
        raise BadInput(f"--out {args.out} holds samples of another evaluation: name another folder")


def fill_in(args: argparse.Namespace) -> None:
    """Flags that were not given get the value of --protocol, else the default."""
    for key, value in (
        PROTOCOLS.get(args.protocol, {}) | DEFAULTS | PROTOCOLS.get(args.protocol, {})
    ).items():
        if getattr(args, key) is None and (args.model or args.base_url):
            setattr(args, key, value)


def check_source(args: argparse.Namespace) -> None:
    """Exactly one of --model, --base-url, --samples and --compare, and no flag that goes with another one."""
    sources = ("model", "base_url", "samples", "compare", "watch")
    given = [flag for flag in sources if getattr(args, flag)]
    if len(given) != 1:
        told = "--model or --base-url (to sample), --samples (saved responses), --compare or --watch"
        raise BadInput(
            f"give one of {told}, not {' and '.join('--' + g.replace('_', '-') for g in given) or 'none'}"
        )
    if not args.out and not args.watch:
        raise BadInput("--out is missing: name a folder for the results")
    if args.samples and not os.path.isfile(args.samples):
        raise BadInput(f"--samples {args.samples}: no such file; give the samples.jsonl of an evaluation")
    sampled = "data budgets mode n limit max_tokens wording protocol temperature top_p".split()
    for key in (*sampled, "sampler", "resume") if not (args.model or args.base_url) else ():
        if getattr(args, key):
            flag = f"--{key.replace('_', '-')}"
            raise BadInput(f"--{given[0]} asks no model anything: leave out {flag}")
    if args.regrade and not args.samples:
        raise BadInput("--regrade needs --samples: the answers of a --model are checked in any case")
    if bool(args.base_url) != bool(args.api_model):
        raise BadInput("--base-url and --api-model go together: the server, and the model's name there")
    if args.base_url and args.sampler:
        raise BadInput("--sampler is for --model: with --base-url the server samples")
    if args.resume and args.overwrite:
        raise BadInput("--resume goes on, --overwrite starts anew: choose one")


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can be refused before a file or a model is opened; turn the budgets into lists."""
    check_source(args)
    fill_in(args)
    sampling = bool(args.model or args.base_url)
    if sampling and not args.data:
        raise BadInput("--data is missing: name a preset, a file of problems, toy or toy_ood")
    if sampling and args.mode != "none" and not args.budgets:
        raise BadInput("--budgets is missing: give token counts, as in --budgets 512,1024, or --mode none")
    least = {"n": 1, "limit": 1, "max_tokens": 1, "seed": 0, "concurrency": 1, "exceed": 0}
    for key, smallest in least.items():
        value = getattr(args, key)
        if value is not None and value < smallest:
            raise BadInput(f"--{key.replace('_', '-')} ({value}) must be {smallest} or more")
    # Written so that nan, which compares false with everything, is refused as well.
    if sampling and (not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1):
        raise BadInput(f"--temperature ({args.temperature}) is from 0, --top-p ({args.top_p}) in (0, 1]")
    if args.trained_budgets:
        # A distribution stands for its range: the pictures need the smallest and the largest only.
        spec = args.trained_budgets
        listed = data.parse_budgets(spec)["values"] if ":" in spec else budget_list(spec, "--trained-budgets")
        if None in listed:
            raise BadInput(f"--trained-budgets {spec!r}: give token counts only")
        args.trained_budgets = listed
    args.budgets = budget_list(args.budgets) if args.budgets else [None]
    if args.mode == "none" and args.budgets != [None]:
        print("evaluate: --mode none states no budget, so --budgets is left aside: one run without any")
        args.budgets = [None]
    if not args.watch:  # its picture may lie beside anything
        check_out(args)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags; those that --protocol may fill in are None where they are not given."""
    about = "Sweep token budgets over a model and data sets, or rebuild all figures from saved samples."
    parser = argparse.ArgumentParser(prog="evaluate.py", description=about, allow_abbrev=False)
    add = parser.add_argument_group("what is evaluated: one of these").add_argument
    add("--model", help="model folder or hub id")
    add("--base-url", help="an OpenAI-compatible server in the model's place: http://localhost:8000/v1")
    add("--samples", help="saved samples (.jsonl, .jsonl.gz) in place of a model")
    add("--compare", nargs="+", metavar="FOLDER", help="finished evaluations (FOLDER or LABEL=FOLDER)")
    add("--watch", nargs="+", metavar="FOLDER", help="training runs: draw their learning curves so far")

    add = parser.add_argument_group("output").add_argument
    add("--out", help="folder for all results (with --watch: the run's own, if not given)")
    add("--resume", action="store_true", help="go on with the unfinished sweep in --out")
    add("--overwrite", action="store_true", help="replace the evaluation that --out holds")

    add = parser.add_argument_group("what is asked (--model, --base-url)").add_argument
    add("--data", help="data sets, comma-separated: presets, hub ids, files of problems, toy, toy_ood")
    add("--budgets", help="tokens, comma-separated: 512,1024; none among them: also a run without a budget")
    add("--mode", choices=("exact", "max", "none"), help="how the budget is asked for (default exact)")
    add("--protocol", choices=PROTOCOLS, help="settings of the L1 paper or the AI2 blog; flags go before it")
    add("--n", type=int, help="samples per problem and budget (default 1; L1: 16)")
    add("--limit", type=int, help="problems per data set (default all; 200 of the toy's)")
    add("--wording", choices=("l1", "tulu"), help="the budget sentence (default l1; the toy's tasks: tulu)")

    add = parser.add_argument_group("sampling (--model, --base-url)").add_argument
    add("--temperature", type=float, help="of sampling; 0 is greedy (default 0.6)")
    add("--top-p", type=float, help="share of the probability that is kept in sampling (default 0.95)")
    add("--max-tokens", type=int, help="response cap, tokens (default: exact 2 x budget, else 8192)")
    add("--sampler", choices=("auto", "vllm", "hf"), help="default auto: vllm on CUDA if installed")
    add("--seed", type=int, default=0, help="seed of the sampling, the bootstrap and the toy's problems")
    add("--api-model", help="with --base-url: the model's name there (the key: OPENAI_API_KEY)")
    add("--concurrency", type=int, default=16, help="with --base-url: requests under way at once (16)")

    add = parser.add_argument_group("what counts").add_argument
    add("--regrade", action="store_true", help="with --samples: check the answers anew")
    think = argparse.BooleanOptionalAction
    add("--require-think", action=think, help="an answer without </think> is wrong (default: no)")
    add("--count", choices=("response", "thinking"), help="tokens that count: all (default) or to </think>")
    add("--exceed", type=int, default=metrics.EXCEED, help="tokens: limit of the share Exceed (default 4000)")
    add("--trained-budgets", help="tokens trained on, for the pictures: 512,1024 or uniform:100:4000")
    return data.one_line_errors(parser).parse_args(argv)


def evaluate_model(args: argparse.Namespace) -> dict:
    """Check all that can be checked without the weights, then load the sampler and sweep the budgets."""
    problems = load_data(args.data, args.limit, args.seed)
    is_toy = {p["source"] for p in problems} <= set(toy.TASKS)  # its tokenizer knows one wording
    wording = args.wording if args.wording and not (is_toy and args.protocol) else "tulu" if is_toy else "l1"
    sampler, weights = load_api(args) if args.base_url else load_weights(args, problems, wording)
    return evaluate(
        sampler, problems, args.budgets, args.mode, args.n, args.out, wording=wording,
        temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_tokens, seed=args.seed,
        count=args.count or "response", require_think=args.require_think, model=args.model or args.api_model,
        trained_budgets=args.trained_budgets, resume=args.resume, weights=weights, limit=args.exceed,
    )  # fmt: skip


def load_api(args: argparse.Namespace) -> tuple:
    """(the server as a sampler, no hash)."""
    sampler = engines.APISampler(args.base_url, args.api_model, args.concurrency)
    sampler.check()
    return sampler, None


def load_weights(args: argparse.Namespace, problems: list[dict], wording: str) -> tuple:
    """(an in-process sampler, the hash of its weights)."""
    # Every budget that does not fit, every missing file is found now: weights take minutes to load.
    tokenizer = data.load_tokenizer(args.model)
    context = data.load_config(args.model, tokenizer).max_position_embeddings
    requests = plan(problems, args.budgets, args.mode, wording, tokenizer, context, args.max_tokens)
    # Every prompt is encoded twice for this: what does not fit is refused before the weights are loaded.
    longest = max(len(r["ids"]) + r["max_tokens"] for r in requests)
    from sampler import load_sampler

    # No longer than needed: an engine sets memory aside for max_model_len.
    sampler = load_sampler(args.model, args.sampler or "auto", longest, args.seed)
    return sampler, engines.hash_weights(args.model)


def main(argv: list[str] | None = None) -> int:
    """Run with `argv`; 0, or 2 after a user's mistake, which is told in one line."""
    try:
        args = parse_args(argv)
        check_args(args)
        if args.watch:
            curves.watch(args.watch, args.out)
        elif args.compare:
            from evaluation.compare import compare

            compare(args.compare, args.out, args.seed)
        else:
            evaluate_samples(args) if args.samples else evaluate_model(args)
    except BadInput as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
