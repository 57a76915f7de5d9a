"""Where evaluate.py gets responses from: a sampler in its process, or any OpenAI-compatible server.

    python evaluate.py --base-url http://localhost:8000/v1 --api-model NAME --data math500 --budgets 512 ...

The server may be a running `vllm serve` or a hosted model. Every response is one request of its own, since a
server's token count covers all choices of a request.
The key comes from OPENAI_API_KEY; a server of your own needs none.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

from data import BadInput, first_line

RETRIES = 6  # of one request, seconds apart and doubling: a busy server (429), a restart (5xx, no connection)
# What a vLLM server is told besides: it would take these from the model's folder, and cut `</think>` out of
# the text where that is a special token. Other servers refuse what they do not know.
VLLM = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": False}
TIMEOUT = 1800.0  # seconds: a long chain of thought on a busy server


class APISampler:
    """A server in the place of a sampler: asked in text, without a tokenizer here; it counts the tokens."""

    name, tokenizer, max_model_len = "api", None, None

    def __init__(self, base_url: str, model: str, concurrency: int = 16):
        try:
            import openai
        except ImportError:
            raise BadInput("--base-url needs the package openai: pip install openai") from None
        self.openai, self.url, self.model, self.concurrency = openai, base_url, model, concurrency
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self.client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT)
        self.cap_name, self.batch = "max_tokens", 4 * concurrency  # responses between two writes
        self.extra = {}

    def check(self) -> None:
        """BadInput, before any file is touched, where no server answers or it refuses the key."""
        try:
            models = list(self.client.with_options(max_retries=1, timeout=30).models.list())
        except self.openai.NotFoundError:
            return  # it lists no models: the first request will tell
        except self.openai.APIError as error:
            told = f"no usable answer from --base-url {self.url} ({first_line(error)[:300]})"
            raise BadInput(f"{told}: is the server up, its address complete (/v1), the key right?") from None
        names = [model.id for model in models]
        if any(getattr(model, "owned_by", "") == "vllm" for model in models):
            self.extra = VLLM
        # A host of many models may know a name that it does not list; a server of one's own does not.
        if len(names) <= 20 and self.model not in names:
            raise BadInput(f"--api-model {self.model}: {self.url} has {', '.join(names) or 'no model'}")

    def respond(
        self, requests: list[dict], n: int, temperature: float, top_p: float, seed: int
    ) -> list[list]:
        """As the function respond below; `concurrency` requests are under way at once."""
        jobs = [
            (r["prompt"], r["max_tokens"], seed * 100_003 + i * n + k)
            for i, r in enumerate(requests)
            for k in range(n)
        ]
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            done = list(pool.map(lambda job: self.ask(*job, temperature, top_p), jobs))
        except self.openai.APIStatusError as error:
            what = f"status {error.status_code}, {first_line(error)[:300]}"
            raise BadInput(f"--base-url {self.url} refused: {what}; --resume goes on from here") from None
        except self.openai.APIConnectionError as error:
            told = f"no answer from --base-url {self.url} ({first_line(error)})"
            raise BadInput(f"{told}: is the server up? --resume goes on from here") from None
        finally:
            # After a failure the requests that wait are dropped: on a hosted model each costs money.
            pool.shutdown(cancel_futures=True)
        return [done[i : i + n] for i in range(0, len(done), n)]

    def ask(self, prompt: str, cap: int, seed: int, temperature: float, top_p: float) -> dict:
        """One response. `length` is the server's own count; None where it reports none."""
        options = {"temperature": temperature, "top_p": top_p, "seed": seed % 2**31, self.cap_name: cap}
        messages = [{"role": "user", "content": prompt}]
        try:
            create = self.client.chat.completions.create
            answer = create(model=self.model, messages=messages, extra_body=self.extra, **options)
        except self.openai.BadRequestError as error:
            # OpenAI's newer models know the cap by its newer name only; many servers know the old one only.
            # What this request used counts: another thread may have changed the name meanwhile.
            if "max_tokens" not in options or "max_completion_tokens" not in str(error):
                raise
            self.cap_name = "max_completion_tokens"
            return self.ask(prompt, cap, seed, temperature, top_p)
        choice, usage = answer.choices[0], answer.usage
        text = choice.message.content or ""
        # A server that parses the reasoning sends it apart, under one of two names.
        extra = choice.message.model_extra or {}
        thinking = extra.get("reasoning_content") or extra.get("reasoning")
        text = f"{thinking}</think>{text}" if isinstance(thinking, str) else text
        out = {"response": text, "length": usage.completion_tokens if usage else None}
        out["finish_reason"] = "length" if choice.finish_reason == "length" else "stop"
        details = getattr(usage, "completion_tokens_details", None)
        if details and details.reasoning_tokens:
            out["thinking_length"] = details.reasoning_tokens
        return out


def thinking_length(ids: list[int], think_end: list[int]) -> int:
    """Tokens up to the end of the last `</think>`, whose ids are think_end; all without one."""
    ends = range(len(ids), len(think_end) - 1, -1)
    return next((end for end in ends if ids[end - len(think_end) : end] == think_end), len(ids))


def respond(sampler, requests: list[dict], n: int, temperature: float, top_p: float, seed: int) -> list[list]:
    """For every request n {"response", "length", "finish_reason"} and, where known, "thinking_length"."""
    if sampler.tokenizer is None:
        return sampler.respond(requests, n, temperature, top_p, seed)
    ids, caps = [r["ids"].tolist() for r in requests], [r["max_tokens"] for r in requests]
    think_end = sampler.tokenizer.encode("</think>", add_special_tokens=False)
    found = []
    for completions in sampler.generate(ids, n, caps, temperature, top_p, seed):
        found.append([])
        for completion in completions:
            ids, finish = list(completion["ids"]), completion["finish_reason"]
            # Only the end token is left out: in many tokenizers `</think>` is a special token, too.
            whole = ids[:-1] if finish == "stop" else ids
            text = sampler.tokenizer.decode(whole, skip_special_tokens=False)
            found[-1].append({"response": text, "length": len(ids), "finish_reason": finish})
            if "</think>" in text:
                found[-1][-1]["thinking_length"] = thinking_length(ids, think_end)
    return found


def hash_weights(model: str) -> str:
    """sha256 over names and contents of a model's safetensors files; `model`: folder or (cached) hub id."""
    folder, total = model, hashlib.sha256()
    if not os.path.isdir(folder):
        from transformers.utils import cached_file

        folder = os.path.dirname(cached_file(model, "config.json"))
    for name in sorted(name for name in os.listdir(folder) if name.endswith(".safetensors")):
        with open(os.path.join(folder, name), "rb") as f:
            total.update(f"{name} {hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
