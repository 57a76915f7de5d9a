"""Does the model think for as many tokens as it was asked to, and is it still right?

    python evaluate.py --model DIR --data math500 --budgets 512,1024,2048,3600 --n 16 --out out/eval
    python evaluate.py --model DIR --protocol l1 --out out/l1                     the settings of a paper
    python evaluate.py --base-url URL --api-model NAME --data ... --out out/api   any OpenAI-compatible server
    python evaluate.py --model DIR --ask-by thinking-token-budget ...             the model's own control
    python evaluate.py --samples out/eval/samples.jsonl --out out/again           no model needed
    python -m evaluation.compare out/a out/b --out out/both                       finished evaluations

For every budget the prompt is rebuilt from the problem, n responses are sampled, checked, and appended to
samples.jsonl as they come; --resume goes on after a crash. Then follow results.json (all figures of
evaluation/metrics.py, with intervals), pictures, and report.html with a browser of single samples;
samples.jsonl alone is enough to make them again. Training calls evaluate().
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np

import data
from data import BadInput
from evaluation import engines, metrics, plots, report
from evaluation.engines import hash_data
from evaluation.metrics import jsonable
from evaluation.samples import batches, check_writable, read_samples, write_json
from toy import task as toy
from verifier import check_answers

BATCH = 1024  # responses sampled between two writes of samples.jsonl: what a crash can lose
OPEN_CAP = 8192  # response cap in tokens where no exact budget sets one (L1's choice)
UNFINISHED = "unfinished.json"  # beside the samples: how many of them are whole, and how they were made
NOTHING = {"samples": 0, "batches": 0, "verify": {}}  # what a sweep has done at its start
DEFAULTS = {"mode": "exact", "n": 1, "temperature": 0.6, "top_p": 0.95, "require_think": False}
# What a paper evaluates and how; any flag that is given goes before. The AI2 blog states neither samples
# nor temperature, so the defaults stand there.
PROTOCOLS = {
    "l1": {"data": "aime2025,math500,amc,olympiadbench", "budgets": "512,1024,2048,3600", "n": 16,
           "temperature": 0.6, "top_p": 0.95, "wording": "l1", "require_think": True},
    "ai2": {"data": "math500,mmlu", "budgets": "100,1024,2048,4096,6144,8192,9216,10240", "wording": "tulu"},
    "adherence": {"data": "math500,gsm8k,mmlu", "budgets": "none,256,512,1024,2048,4096,8192,16384", "n": 4,
                  "temperature": 0.6, "top_p": 0.95, "limit": 100},  # docs/adherence.md
}  # fmt: skip

# ---- Samples: planned, asked for, graded


def plan(problems, budgets, mode, wording, tokenizer, context, max_tokens=None, ask_by="sentence"):
    """One request per budget and problem: {"problem", "budget", "mode", "prompt", "control", "max_tokens"}.

    `context` and `max_tokens` in tokens; BadInput where prompt and response do not fit into the context.
    Mode "none": no prompt states its budget. With a tokenizer (no server) also the prompt's "ids". `ask_by`
    as in engines.control; budgets of "effort" are words.
    """
    largest = max((b for b in budgets if isinstance(b, int)), default=0)
    if max_tokens and largest > max_tokens and mode == "exact":
        raise BadInput(f"--max-tokens ({max_tokens}) is below the budget {largest}: raise it or leave it out")
    for asked in budgets:
        control = engines.control(ask_by, asked if mode != "none" else None)
        budget = asked if ask_by != "effort" else None
        # Twice the budget shows by how much it is missed; a control bounds the thinking, the answer follows.
        cap = 2 * budget if budget and mode == "exact" else max(OPEN_CAP, budget or 2 * largest)
        cap = max_tokens or (OPEN_CAP + (budget or 0) if control else cap)
        stated, asked_as = (budget, mode) if budget and mode != "none" else (None, None)
        how = {"control": control, "ask_by": ask_by} if control else {}
        how |= {"effort": asked} if "reasoning_effort" in control else {}
        for problem in problems:
            apart, kind = problem["source"] in data.BLANK_LINE, problem["kind"]
            named = None if control else stated
            prompt = data.budget_prompt(problem["problem"], named, asked_as, kind, wording, apart)
            request = {"problem": problem, "budget": budget, "mode": asked_as, "prompt": prompt} | how
            if tokenizer is None:
                yield request | {"max_tokens": cap}
                continue
            turns, variables = problem.get("turns"), engines.template_variables(control, tokenizer)
            # An eighth of a list's memory.
            ids = np.array(data.encode_prompt(tokenizer, prompt, turns, **variables), np.int32)
            room = context - len(ids)
            # A default cap gives way to the context; a budget or a cap that was asked for does not.
            wanted = max(1, stated or 0, max_tokens or 0)
            if wanted > room:
                what = f"prompt {problem['id']} ({len(ids)} tokens) and a response of {wanted}"
                way_out = "lower --budgets or --max-tokens, or drop long problems"
                raise BadInput(f"{what} exceed the model's context of {context}: {way_out}")
            yield request | {"ids": ids, "max_tokens": min(cap, room)}


def to_samples(request: dict, responses: list[dict]) -> Iterator[dict]:
    """The responses to one request as samples of the Sample contract, not yet graded."""
    problem = request["problem"]
    for i, response in enumerate(responses, request.get("only", 0)):
        sample = {"id": problem["id"], "sample": i, "source": problem["source"]}
        sample |= {key: problem[key] for key in ("problem", "answer", "kind")}
        asked = ("prompt", "budget", "mode", "ask_by", "effort")
        sample |= {key: request[key] for key in asked if key in request} | response
        yield sample | ({"choices": problem["choices"]} if problem.get("choices") else {})


def grade(samples: list[dict], require_think: bool, think_end: str = "</think>") -> dict:
    """Set `correct` of every sample; the checker's counts (timeouts, parse failures ...).

    A response that was cut off is wrong, as in training: what stands in its middle is not checked. The
    baseline "cut" is read as it is, since it cuts all of them.
    """
    whole = [s for s in samples if s["finish_reason"] != "length" or s.get("baseline") == "cut"]
    texts, golds = [s["response"] for s in whole], [s["answer"] for s in whole]
    kinds, choices = [s.get("kind") or "math" for s in whole], [s.get("choices") for s in whole]
    verdicts, counts = check_answers(texts, golds, kinds, choices, require_think, think_end=think_end)
    for sample in samples:
        sample["correct"] = False
    for sample, verdict in zip(whole, verdicts, strict=True):
        sample["correct"] = bool(verdict)
    return counts | {"checked": len(samples)}


def sample_batch(sampler, tokenizer, requests: list[dict], asked: tuple, log: Callable) -> list[dict]:
    """Samples of the requests, not yet graded; one that a server failed is told in a line and left out."""
    found = engines.respond(sampler, tokenizer, requests, *asked) if requests else []
    samples = []
    for request, responses in zip(requests, found, strict=True):
        for sample in to_samples(request, responses):
            if "error" in sample:
                what = f"{sample['source']}, problem {sample['id']}, budget {metrics.asked_for(sample)}"
                log(f"evaluate: no response to {what}: {sample['error']}; --resume asks again")
            else:
                samples.append(sample)
    return samples


def evaluate(sampler, problems, budgets, mode, n, out, *, tokenizer=None, context=None, wording="l1",
             temperature=0.6, top_p=0.95, max_tokens=None, seed=0, require_think=False, think_end="</think>",
             trained_budgets=None, model=None, about=None, log=print, state=None, resume=False,
             ask_by="sentence") -> dict:  # fmt: skip
    """Sample n responses per problem and budget (None: no budget); samples, results and pictures go to `out`.

    Returns the results. Data sets are told apart by the problems' `source`. What `out` held is written over,
    or, with `resume`, gone on with. With `state` (accelerate's PartialState) its processes share the work;
    the first one writes and returns. `context` is the model's, in tokens; `about` goes into the results.
    """
    rank, processes = (state.process_index, state.num_processes) if state else (0, 1)
    start, per_batch = time.monotonic(), max(1, getattr(sampler, "batch", BATCH) // n)  # problems
    # The whole plan comes first: what does not fit is found before an hour of sampling, not after it.
    requests = list(plan(problems, budgets, mode, wording, tokenizer, context, max_tokens, ask_by))
    settings = {"model": model, "sampler": sampler.name, "mode": mode, "wording": wording}
    settings |= {"seed": seed, "n": n, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    settings |= {"require_think": require_think, "think_end": think_end, "asked": budgets, "ask_by": ask_by}
    settings |= {"template": getattr(tokenizer, "chat_template", None), "batch": per_batch}
    settings |= {"data": hash_data(problems)} | (about or {})
    finished = read_results(os.path.join(out, "results.json")) if resume else {}
    if finished and not os.path.exists(os.path.join(out, UNFINISHED)):
        same_settings(finished, settings, out)
        log(f"evaluate: {out} is finished: nothing to resume")
        return finished
    table, browser = {}, report.Browser()
    done = open_sweep(out, settings, resume) if rank == 0 else dict(NOTHING)
    path = os.path.join(out, "samples.jsonl") if rank == 0 else os.devnull
    todo = list(batches(requests, per_batch))[done["batches"] :]
    if done["samples"]:
        tally(read_samples(path, flag="--resume"), table, browser, think_end)
        # Where a server failed a request, its sample is missing: that one is asked for again.
        have = {(metrics.asked_for(s), s["source"], s["id"], s["sample"]) for s in read_samples(path)}
        tried = [r | {"only": k} for r in requests[: done["batches"] * per_batch] for k in range(n)]
        names = [(metrics.asked_for(r), r["problem"]["source"], r["problem"]["id"], r["only"]) for r in tried]
        todo += batches((r for r, name in zip(tried, names, strict=True) if name not in have), per_batch)
    # A batch is sampled, checked, written and counted before the next one starts.
    with open(path, "a", encoding="utf-8") as f:
        for at, batch in enumerate(todo, done["batches"]):
            # No two batches and no two processes draw with the same seed.
            draw = (seed * 1_000_003 + at) * processes + rank
            asked = (1 if "only" in batch[0] else n, temperature, top_p, draw, think_end)
            samples = sample_batch(sampler, tokenizer, batch[rank::processes], asked, log)
            counts = [grade(samples, require_think, think_end)]
            if processes > 1:
                from accelerate.utils import gather_object

                samples, counts = gather_object(samples), gather_object(counts)
            done["samples"] += len(samples)
            done["batches"] += "only" not in batch[0]
            done["verify"] = data.add_up([done["verify"], *counts])
            tally(samples, table, browser, think_end)
            if rank == 0:
                f.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
                f.flush()
                os.fsync(f.fileno())  # for good: the record that follows must never be ahead of them
                write_json(os.path.join(out, UNFINISHED), done | {"settings": settings})
            log(f"evaluate: {done['samples']}/{len(requests) * n} samples, {time.monotonic() - start:.0f} s")
    # Not among the settings: a server may come back at another address.
    about = settings | {"base_url": getattr(sampler, "url", None), "trained_budgets": trained_budgets}
    about |= {"count": "response", "verify": done["verify"]}
    about |= {"missing": len(requests) * n - done["samples"] or None}
    return finish(table, about, out, browser, log) if rank == 0 else {}


# ---- Samples on disk, crashes and how to go on


def tally(samples: Iterable[dict], table: dict, browser: report.Browser, think_end: str = "</think>") -> None:
    """Samples into the table of figures and, some of them, into the report's browser."""
    for sample in samples:
        metrics.add(table, sample, think_end)
        browser.add(sample)


def same_settings(old: dict, new: dict, out: str) -> None:
    """BadInput that names what differs: samples made in two ways would make one figure."""
    for key, value in jsonable(new).items():
        if old.get(key) != value:
            told = f"{key} was {str(old.get(key))[:200]!r} and is {str(value)[:200]!r}"
            raise BadInput(f"--resume {out}: {told}: give the settings of the first run, or --overwrite it")


def open_sweep(out: str, settings: dict, resume: bool) -> dict:
    """What an unfinished sweep has done; lines of samples.jsonl after its last whole batch are cut off."""
    old = read_results(os.path.join(out, UNFINISHED)) if resume else {}
    if not old:  # anew, or stopped before its first batch was whole
        os.makedirs(out, exist_ok=True)
        clear(out, ("samples.jsonl", UNFINISHED))
        return dict(NOTHING)
    same_settings(old["settings"], settings, out)
    with open(os.path.join(out, "samples.jsonl"), "r+b") as f:
        lines = sum(f.readline().endswith(b"\n") for _ in range(old["samples"]))
        if lines < old["samples"]:
            raise BadInput(f"--resume {out}: samples.jsonl lost lines since the crash: --overwrite it")
        f.truncate(f.tell())
    return {key: old[key] for key in NOTHING}


# ---- Results on disk and on the screen


def read_results(path: str) -> dict:
    """The results of a finished evaluation; {} where there is none, BadInput where the file is broken."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            return dict(json.load(f))
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path} is no results file of evaluate.py ({error}): move it away") from None


def clear(out: str, more: tuple = ()) -> None:
    """Remove an earlier evaluation's results and pictures, which would pass for those of the new samples."""
    pictures = read_results(os.path.join(out, "results.json")).get("pictures", [])
    for name in (*pictures, "results.json", "report.html", "adherence.md", *more):
        path = os.path.join(out, os.path.basename(name))
        if os.path.exists(path):
            os.remove(path)


def finish(table: dict, about: dict, out: str, browser: report.Browser, log: Callable = print) -> dict:
    """Summarise, draw, write results.json and the rest to `out`, print the tables; returns the results."""
    os.makedirs(out, exist_ok=True)
    datasets, draws = metrics.summarise(table, about.get("seed") or 0)
    results = jsonable(about | {"versions": engines.versions(), "datasets": datasets})
    if over_sets := metrics.mean_over_sets(datasets, draws):
        results["mean"] = jsonable({"sets": list(datasets), "budgets": over_sets})
    clear(out)
    lengths = {name: metrics.lengths_of(part) for name, part in table.items()}
    pictures = plots.draw(results["datasets"], lengths, out, about.get("trained_budgets"))
    results["pictures"] = [os.path.basename(path) for paths in pictures.values() for path in paths]
    report.write_report(results, pictures, browser, out)
    write_json(os.path.join(out, "results.json"), results)
    if os.path.exists(os.path.join(out, UNFINISHED)) and not about.get("missing"):
        os.remove(os.path.join(out, UNFINISHED))
    for name, part in results["datasets"].items():
        log(report.format_table(name, part))
    if over_sets:
        rows = report.table_rows(results["mean"]["budgets"])
        log(f"\nmean of {len(table)} data sets\n{report.plain_table(rows)}")
    if about.get("missing"):
        log(f"evaluate: {about['missing']} responses are missing: the same command with --resume asks again")
    log(f"evaluate: figures, pictures and report.html in {out}")
    return results


def from_samples(args: argparse.Namespace) -> None:
    """Results and pictures from saved samples; --regrade checks again and writes disagreements.jsonl."""
    path, out, regrade = args.samples, args.out, args.regrade
    table, browser, verify = {}, report.Browser(), {"changed": 0}
    about = {"model": None, "trained_budgets": None, "count": "response"}
    if os.path.basename(path) == "samples.jsonl":
        # Beside the samples lies what their run knew and no sample tells: model, settings, trained budgets.
        beside = read_results(os.path.join(os.path.dirname(path), "results.json"))
        about |= {k: v for k, v in beside.items() if k not in ("datasets", "mean", "pictures", "versions")}
    about |= {"samples": path, "trained_budgets": args.trained_budgets or about["trained_budgets"]}
    think_end = args.think_end or about.get("think_end") or "</think>"
    require_think = bool(args.require_think or about.get("require_think"))
    need = {}
    if regrade:
        # To be checked again, a sample needs its text and its gold answer in place of a verdict.
        need["need"] = ("id", "source", "budget", "length", "finish_reason", "response", "answer")
        # Once through the whole file first: a broken line is found before anything is written.
        sum(1 for _ in read_samples(path, **need))
        os.makedirs(out, exist_ok=True)
    differing = os.path.join(out, "disagreements.jsonl") if regrade else os.devnull
    with open(differing, "w", encoding="utf-8") as f:
        # Batch by batch: the file may be far larger than the memory.
        for batch in batches(read_samples(path, **need), BATCH):
            stored = [s.get("correct") for s in batch]
            verify = data.add_up([verify, grade(batch, require_think, think_end)]) if regrade else verify
            tally(batch, table, browser, think_end)
            for sample, old in zip(batch, stored, strict=True):
                if old is not None and bool(old) != sample["correct"]:
                    verify["changed"] += 1
                    f.write(json.dumps(sample | {"correct": old, "regraded": sample["correct"]}) + "\n")
    about |= {"require_think": require_think, "think_end": think_end, "verify": verify} if regrade else {}
    finish(table, about, out, browser)


# ---- Command line


def budget_list(text: str, flag: str = "--budgets") -> list[int | None]:
    """ "none,512,1024" -> [None, 512, 1024], each once, in the order given; BadInput on anything else."""
    budgets = []
    for word in map(str.strip, text.split(",")):
        if word != "none" and not (re.fullmatch("[0-9]{1,9}", word) and int(word) > 0):
            raise BadInput(f"{flag} {text!r}: {word!r} is no budget; give token counts above 0: 512,1024")
        budgets.append(None if word == "none" else int(word))
    return list(dict.fromkeys(budgets))


def pick_wording(given: str | None, problems: list[dict], protocol: str | None = None, model="") -> str:
    """--wording, else that of the run whose checkpoint `model` is, else l1; the toy writes "tulu" only."""
    (folder, name), found = os.path.split(os.path.abspath(model)), None
    if not given and not protocol and re.fullmatch(r"checkpoint-\d+", name):
        with contextlib.suppress(OSError, BadInput):  # no run of ours
            found = read_results(os.path.join(folder, "args.json")).get("wording")
    is_toy = {problem.get("source") for problem in problems} <= set(toy.TASKS)
    asked = given or found or "l1"
    return "tulu" if is_toy and asked in data.SENTENCES and (protocol or not given) else asked


def load_data(names: str, limit: int | None, seed: int, drawn: bool = False) -> list[dict]:
    """Problems of the sets in "math500,FILE,toy"; `source` becomes the set's name (of a FILE its stem).

    `limit`: the first ones; with `drawn` those whose texts have the lowest CRC-32, each text once.
    """
    problems = []
    for spec in map(str.strip, names.split(",")):
        # The test split: the toy's training problems are never asked here.
        if spec in toy.TASKS:
            found = toy.problems(spec, "test", limit if limit and not drawn else 200, seed)
        else:
            found = data.load_problems(spec, limit=None if drawn else limit)
        if drawn:
            texts = {problem["problem"]: problem for problem in reversed(found)}
            found = [texts[t] for t in sorted(texts, key=lambda t: (zlib.crc32(t.encode()), t))[:limit]]
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
    check_writable(args.out)
    # samples.jsonl alone is what a run leaves that was stopped half-way.
    names = ("results.json", "samples.jsonl", "compare.json")
    held = [f for f in names if os.path.exists(os.path.join(args.out, f))]
    if held and not (args.overwrite or args.resume):
        way_out = "name another, --resume it, or --overwrite it"
        raise BadInput(f"--out {args.out} holds an evaluation ({held[0]}): {way_out}")
    own = os.path.join(args.out, "samples.jsonl")
    if args.samples and os.path.exists(own) and not os.path.samefile(own, args.samples):
        raise BadInput(f"--out {args.out} holds samples of another evaluation: name another folder")


def check_source(args: argparse.Namespace) -> None:
    """Exactly one of --model, --base-url and --samples, and no flag that goes with another one."""
    given = [flag for flag in ("model", "base_url", "samples") if getattr(args, flag)]
    if len(given) != 1:
        told = "--model or --base-url (to sample) or --samples (saved responses)"
        named = " and ".join("--" + g.replace("_", "-") for g in given) or "none"
        raise BadInput(f"give one of {told}, not {named}")
    if args.samples and not os.path.isfile(args.samples):
        raise BadInput(f"--samples {args.samples}: no such file; give the samples.jsonl of an evaluation")
    sampled = "data budgets mode n limit max_tokens wording ask_by protocol temperature top_p sampler resume"
    for key in sampled.split() if args.samples else ():
        if getattr(args, key):
            raise BadInput(f"--samples asks no model anything: leave out --{key.replace('_', '-')}")
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
    sampling = bool(args.model or args.base_url)
    if not re.fullmatch(engines.ASK_BY, args.ask_by or "sentence"):
        raise BadInput(f"--ask-by {args.ask_by!r}: it is one of {engines.ASK_BYS}")
    efforts = list(dict.fromkeys(re.findall(r"\w+", (args.ask_by or "").partition("effort:")[2])))
    if efforts and args.budgets:
        raise BadInput(f"--budgets {args.budgets}: an effort is asked for without a number, leave it out")
    # Flags that were not given get the value of --protocol, else the default.
    for key, value in (DEFAULTS | PROTOCOLS.get(args.protocol, {})).items() if sampling else ():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if sampling and not args.data:
        raise BadInput("--data is missing: name a preset, a file of problems, toy or toy_ood")
    if sampling and args.mode != "none" and not args.budgets and not efforts:
        raise BadInput("--budgets is missing: give token counts, as in --budgets 512,1024, or --mode none")
    for key in ("n", "limit", "max_tokens", "seed", "concurrency"):
        value, least = getattr(args, key), 0 if key == "seed" else 1
        if value is not None and value < least:
            raise BadInput(f"--{key.replace('_', '-')} ({value}) must be {least} or more")
    # Written so that nan, which compares false with everything, is refused as well.
    if sampling and (not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1):
        raise BadInput(f"--temperature ({args.temperature}) is from 0, --top-p ({args.top_p}) in (0, 1]")
    if spec := args.trained_budgets:
        # A distribution stands for its range: the pictures need the smallest and the largest only.
        listed = data.parse_budgets(spec)["values"] if ":" in spec else budget_list(spec, "--trained-budgets")
        if None in listed:
            raise BadInput(f"--trained-budgets {spec!r}: give token counts only")
        args.trained_budgets = listed
    args.budgets = efforts or (budget_list(args.budgets) if args.budgets else [None])
    args.ask_by = "effort" if efforts else args.ask_by or "sentence"
    if args.mode == "none" and args.budgets != [None]:
        print("evaluate: --mode none states no budget, so --budgets is left aside: one run without any")
        args.budgets = [None]
    check_out(args)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags; those that --protocol may fill in are None where they are not given."""
    about = "Sweep token budgets over a model and data sets, or rebuild all figures from saved samples."
    parser = argparse.ArgumentParser(prog="evaluate.py", description=about, allow_abbrev=False)
    add = parser.add_argument_group("what is evaluated: one of these").add_argument
    add("--model", help="model folder or hub id")
    add("--base-url", help="an OpenAI-compatible server in the model's place: http://localhost:8000/v1")
    add("--samples", help="saved samples (.jsonl, .jsonl.gz) in place of a model")

    add = parser.add_argument_group("output").add_argument
    add("--out", required=True, help="folder for all results")
    add("--resume", action="store_true", help="go on with the unfinished sweep in --out")
    add("--overwrite", action="store_true", help="replace the evaluation that --out holds")

    add = parser.add_argument_group("what is asked (--model, --base-url)").add_argument
    add("--data", help="data sets, comma-separated: presets, hub ids, files of problems, toy, toy_ood")
    add("--budgets", help="tokens, comma-separated: 512,1024; none among them: also a run without a budget")
    add("--mode", choices=("exact", "max", "none"), help="how the budget is asked for (default exact)")
    add("--protocol", choices=PROTOCOLS, help="settings of L1, the AI2 blog or docs/adherence.md; flags win")
    add("--n", type=int, help="samples per problem and budget (default 1; L1: 16)")
    add("--limit", type=int, help="problems per data set (default all; 200 of the toy's)")
    add("--wording", help="asks for budgets: l1, tulu, your own with {N} (default: that of training, or l1)")
    add("--sentence", dest="wording", help='the same: "Use at most {N} tokens."')
    add("--ask-by", help=f"how: {engines.ASK_BYS} (default sentence)")

    add = parser.add_argument_group("sampling (--model, --base-url)").add_argument
    add("--temperature", type=float, help="of sampling; 0 is greedy (default 0.6)")
    add("--top-p", type=float, help="share of the probability that is sampled from (default 0.95)")
    add("--max-tokens", type=int, help="response cap, tokens (default: 2 x budget; 8192 where none is exact)")
    add("--sampler", choices=("auto", "vllm", "hf"), help="default auto: vllm on CUDA if installed")
    add("--seed", type=int, default=0, help="of sampling, bootstrap and the toy's problems (default 0)")
    add("--api-model", help="with --base-url: the model's name there (the key: OPENAI_API_KEY)")
    add("--concurrency", type=int, default=16, help="with --base-url: requests at once (default 16)")

    add = parser.add_argument_group("what counts").add_argument
    add("--regrade", action="store_true", help="with --samples: check the answers anew")
    think = argparse.BooleanOptionalAction
    add("--require-think", action=think, help="an answer without the end of thinking is wrong (default: no)")
    add("--think-end", help="text that ends the thinking part (default </think>)")
    add("--trained-budgets", help="tokens trained on, for the pictures: 512,1024 or uniform:100:4000")
    return data.one_line_errors(parser).parse_args(argv)


def evaluate_model(args: argparse.Namespace) -> None:
    """Check all that can be checked without the weights, then load the sampler and sweep the budgets."""
    problems = load_data(args.data, args.limit, args.seed, args.protocol == "adherence")
    wording = pick_wording(args.wording, problems, args.protocol, args.model or "")
    tokenizer = context = None
    if args.base_url:
        sampler = engines.Server(args.base_url, args.api_model, args.concurrency)
        sampler.check()
    else:
        # Every budget that does not fit, every missing file is found now: weights take minutes to load.
        tokenizer = data.load_tokenizer(args.model)
        context = data.load_config(args.model, tokenizer).max_position_embeddings
        asked = args.budgets, args.mode, wording, tokenizer, context, args.max_tokens, args.ask_by
        # No longer than needed: an engine sets memory aside for it.
        longest = max(len(r["ids"]) + r["max_tokens"] for r in plan(problems, *asked))
        end = (args.think_end or "</think>") if args.ask_by == "thinking-token-budget" else None
        sampler = engines.open_sampler(args.model, args.sampler or "auto", longest, args.seed, end)
        context = longest
    evaluate(
        sampler, problems, args.budgets, args.mode, args.n, args.out, tokenizer=tokenizer, context=context,
        wording=wording, temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_tokens,
        seed=args.seed, require_think=args.require_think, think_end=args.think_end or "</think>",
        model=args.model or args.api_model, trained_budgets=args.trained_budgets, resume=args.resume,
        ask_by=args.ask_by, about={"protocol": args.protocol} if args.protocol else None,
    )  # fmt: skip


@data.exit_code("evaluate.py")
def main(argv: list[str] | None = None) -> None:
    """The command: measure a model, or saved samples."""
    args = parse_args(argv)
    check_args(args)
    from_samples(args) if args.samples else evaluate_model(args)


if __name__ == "__main__":
    sys.exit(main())
