"""Where evaluate.py gets responses from: a sampler in its process, or any OpenAI-compatible server.

    python evaluate.py --base-url http://localhost:8000/v1 --api-model NAME --data math500 --budgets 512 ...

The server may be a running `vllm serve` or a hosted model. Every response is one request of its own, since a
server's token count covers all choices of a request. The key comes from OPENAI_API_KEY; a server of your own
needs none.
"""

import argparse
import bisect
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data import BadInput, first_line, load_config, load_tokenizer, stop_ids

RETRIES = 6  # of one request, seconds apart and doubling: a busy server (429), a restart (5xx, no connection)
# What a vLLM server is told besides: it would take these from the model's folder, and cut `</think>` out of
# the text where that is a special token. Other servers refuse what they do not know.
VLLM = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": False}
TIMEOUT = 1800.0  # seconds: a long chain of thought on a busy server
# What servers call the end of a response, and a cut at the cap. Any other word is a failure of the request.
ENDS = dict.fromkeys(("stop", "eos", "end_turn", "tool_calls"), "stop")
ENDS |= dict.fromkeys(("length", "max_tokens"), "length")

# ---- How a budget is asked for

ASK_BYS = "sentence, thinking-token-budget, template:VARIABLE, effort:low,medium,high"
ASK_BY = r"sentence|thinking-token-budget|template:[A-Za-z_]\w*|effort:\w+(,\w+)*"


def control(ask_by: str, asked: int | str | None) -> dict:
    """What a request for `asked` tokens (or an effort) carries beside its prompt, named as by vLLM."""
    way, _, variable = ask_by.partition(":")
    if way == "sentence" or asked is None:
        return {}
    if way == "template":
        return {"chat_template_kwargs": {variable: asked}}
    return {"reasoning_effort" if way == "effort" else "thinking_token_budget": asked}


def template_variables(asked: dict, tokenizer) -> dict:
    """The chat template's variables that a control sets; BadInput where the template has no such variable."""
    found = asked.get("chat_template_kwargs") or {k: v for k, v in asked.items() if k == "reasoning_effort"}
    if missing := [name for name in found if name not in str(tokenizer.chat_template)]:
        raise BadInput(f"--ask-by: the model's chat template has no variable {missing[0]}")
    return found


# ---- In this process


def open_sampler(path: str, kind: str, max_model_len: int, seed: int = 0, closed_by: str | None = None):
    """A sampler (one of the trainer's) for a finished model; `kind`: auto, vllm or hf; length in tokens.

    `closed_by`: the text with which vLLM is to close a thinking that reaches its thinking_token_budget.
    """
    import train_grpo as trainer

    kind, tokenizer = trainer.pick_sampler(kind), load_tokenizer(path)
    if closed_by and (kind != "vllm" or "/" not in closed_by):
        told = "vLLM and a --think-end with / in it, as </think>: --sampler vllm, or a server by --base-url"
        raise BadInput(f"--ask-by thinking-token-budget needs {told}")
    dtype = "bfloat16" if trainer.DEVICE.type == "cuda" else "float32"
    if kind == "vllm":
        from transformers import GenerationConfig

        try:
            declared = GenerationConfig.from_pretrained(path)
        except OSError:  # no such file: the model's configuration names the end token, too
            declared = load_config(path)
        marks = {"reasoning_start_str": (closed_by or "").replace("/", ""), "reasoning_end_str": closed_by}
        more = {"reasoning_config": marks} if closed_by else {}
        stops = stop_ids(declared, tokenizer)
        return trainer.VLLM(path, tokenizer, stops, max_model_len, dtype, seed, 0.85, 512, **more)
    from toy.hf_sampler import HFSampler

    options = argparse.Namespace(dtype=dtype, lora=0)
    model = trainer.net.load_model(path, options, frozen=True).to(trainer.DEVICE)
    return HFSampler(model, tokenizer, stop_ids(model.generation_config, tokenizer), max_model_len)


def thinking_length(ids: np.ndarray, tokenizer, think_end: str = "</think>") -> int | None:
    """Tokens up to the end of the last `think_end`; None where the thinking is never closed."""
    mark = tokenizer.encode(think_end, add_special_tokens=False)
    if len(mark) == 1 and mark[0] != tokenizer.unk_token_id and (at := np.flatnonzero(ids == mark[0])).size:
        return int(at[-1]) + 1

    def closed(k):  # how often the thinking is closed within the first k tokens
        return tokenizer.decode(ids[:k], skip_special_tokens=False).count(think_end)

    # The text may be cut into tokens in several ways: the shortest beginning that holds all its marks.
    count = closed(len(ids))
    return bisect.bisect_left(range(len(ids)), count, key=closed) if count else None


def respond(sampler, tokenizer, requests, n, temperature, top_p, seed, think_end) -> list[list[dict]]:
    """For every request n {"response", "length", "finish_reason"} and, where known, "thinking_length".

    A sampler with a `respond` of its own (a server, a baseline) is asked in its own way; there a response may
    be {"error"} alone.
    """
    if hasattr(sampler, "respond"):
        return sampler.respond(requests, n, temperature, top_p, seed, think_end)
    made = []
    for asked, group in itertools.groupby(requests, lambda r: r.get("control", {})):
        prompts, caps = zip(*((r["ids"].tolist(), r["max_tokens"]) for r in group), strict=True)
        more = asked if "thinking_token_budget" in asked else {}
        made += sampler.generate(prompts, n, caps, temperature, seed, top_p=top_p, **more)
    return [[to_text(response, tokenizer, think_end) for response in group] for group in made]


def to_text(response: dict, tokenizer, think_end: str = "</think>") -> dict:
    """A sampler's response {"ids", "truncated"} as fields of a sample."""
    ids, cut = response["ids"], response["truncated"]
    # Only the end token is left out: in many tokenizers `</think>` is a special token, too.
    text = tokenizer.decode(ids if cut else ids[:-1], skip_special_tokens=False)
    out = {"response": text, "length": len(ids), "finish_reason": "length" if cut else "stop"}
    thinking = thinking_length(ids, tokenizer, think_end) if think_end in text else None
    return out | ({} if thinking is None else {"thinking_length": thinking})


def hash_data(problems: list[dict]) -> dict:
    """{data set: {"problems", "sha256"}}: two evaluations with equal hashes asked the same."""
    rows: dict = {}
    for p in problems:
        row = [p[key] for key in ("id", "problem", "answer", "kind")] + [p.get("choices")]
        rows.setdefault(p["source"], []).append(json.dumps(row, ensure_ascii=False))
    hashes = {name: hashlib.sha256("\n".join(lines).encode()).hexdigest() for name, lines in rows.items()}
    return {name: {"problems": len(lines), "sha256": hashes[name]} for name, lines in rows.items()}


def versions() -> dict:
    """The libraries that took part: another version of the answer checker may judge otherwise."""
    found = {"python": sys.version.split()[0], "math-verify": importlib.metadata.version("math-verify")}
    used = [name for name in ("numpy", "torch", "transformers", "vllm", "openai") if name in sys.modules]
    return found | {name: sys.modules[name].__version__ for name in used}


# ---- Servers


class Server:
    """A server in the place of a sampler: asked in text, without a tokenizer here; it counts the tokens."""

    name = "api"

    def __init__(self, base_url: str, model: str, concurrency: int = 16):
        try:
            import openai
        except ImportError:
            raise BadInput("--base-url needs the package openai: pip install openai") from None
        self.openai, self.url, self.model, self.concurrency = openai, base_url, model, concurrency
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self.client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT)
        self.cap_name, self.batch = "max_tokens", 4 * concurrency  # responses between two writes
        self.extra, self.context = {}, math.inf

    def check(self) -> None:
        """BadInput, before any file is touched, where no server answers or it refuses the key."""
        try:
            models = list(self.client.with_options(max_retries=1, timeout=30).models.list())
        except (self.openai.APIError, ValueError, TypeError, AttributeError) as error:
            told = f"no usable answer from --base-url {self.url} ({first_line(error)[:300]})"
            raise BadInput(f"{told}: is the server up, its address complete (/v1), the key right?") from None
        names = [model.id for model in models]
        if any(getattr(model, "owned_by", "") == "vllm" for model in models):
            self.extra = VLLM
        if self.model not in names:
            raise BadInput(f"--api-model {self.model}: {self.url} has {', '.join(names) or 'no model'}")
        self.context = getattr(models[names.index(self.model)], "max_model_len", None) or math.inf

    def respond(self, requests, n, temperature, top_p, seed, think_end) -> list[list[dict]]:
        """As the function respond above; `concurrency` requests are under way at once."""
        asked = [(r, seed * 100_003 + i * n + k) for i, r in enumerate(requests) for k in range(n)]
        failed = []

        def ask(job):
            if 2 * len(failed) > len(asked):  # the server fails, not a request: no further one is paid for
                return {"error": failed[0]}
            try:
                found = self.ask(job[0], job[1], temperature, top_p, think_end)
            except self.openai.APIStatusError as error:
                found = {"error": f"status {error.status_code}, {first_line(error)[:300]}"}
            except (self.openai.APIError, ValueError) as error:
                found = {"error": f"{first_line(error)[:300]}: is the server up?"}
            failed.extend([found["error"]] if "error" in found else [])
            return found

        pool = ThreadPoolExecutor(self.concurrency)
        try:
            done = list(pool.map(ask, asked))
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C: on a hosted model each request costs money
        if 2 * len(failed) > len(asked):
            what = f"{len(failed)} of {len(asked)} requests failed, the first: {failed[0]}"
            raise BadInput(f"--base-url {self.url}: {what}; --resume goes on from here")
        return [done[i : i + n] for i in range(0, len(done), n)]

    def ask(self, request: dict, seed: int, temperature: float, top_p: float, think_end: str) -> dict:
        """One response; {"error"} where the server's answer is none. `length` is the server's own count."""
        options = {"temperature": temperature, "top_p": top_p, "seed": seed % 2**31}
        if request["max_tokens"] < self.context:  # else vLLM takes what the prompt leaves
            options[self.cap_name] = request["max_tokens"]
        turns = request["problem"].get("turns") or ()
        messages = [*turns, {"role": "user", "content": request["prompt"]}]
        try:
            create, extra = self.client.chat.completions.create, self.extra | request.get("control", {})
            answer = create(model=self.model, messages=messages, extra_body=extra, **options)
        except self.openai.BadRequestError as error:
            # OpenAI's newer models know the cap by its newer name only; many servers know the old one only.
            if "max_tokens" not in options or "max_completion_tokens" not in str(error):
                raise
            self.cap_name = "max_completion_tokens"
            return self.ask(request, seed, temperature, top_p, think_end)
        choice = answer.choices[0] if answer.choices else None
        if choice is None:
            return {"error": "an answer without choices"}
        finish = ENDS.get(str(choice.finish_reason).lower())
        if choice.message is None or finish is None:
            return {"error": f"finish_reason {choice.finish_reason}"}
        # A server that parses the thinking sends it apart, under one of two names.
        extra, text = choice.message.model_extra or {}, choice.message.content or ""
        if isinstance(text, list):  # of parts
            text = "".join(part.get("text") or "" for part in text if isinstance(part, dict))
        if thinking := extra.get("reasoning_content") or extra.get("reasoning"):
            # Cut off in the thinking, nothing closed it.
            cut_there = finish == "length" and not text
            text = thinking + ("" if cut_there else think_end) + text
        usage = getattr(answer, "usage", None)
        out = {"response": text, "length": getattr(usage, "completion_tokens", None), "finish_reason": finish}
        details = getattr(usage, "completion_tokens_details", None)
        if tokens := getattr(details, "reasoning_tokens", None):
            out["thinking_length"] = tokens
        return out
