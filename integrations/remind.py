"""Reminders at serving time: generation in pieces against any OpenAI-compatible completions server.

For a model trained with --method reminders; docs/serving.md shows how. A response is asked for up to its next
mark, and again behind the mark, by token ids: the server's prefix cache has read the rest.
"""

import argparse
import os

import numpy as np

from data import BadInput
from evaluation.engines import VLLM, to_text
from methods.reminders import FORM, Reminders


class Completions:
    """A completions server in a sampler's place."""

    def __init__(self, base_url: str, model: str, tokenizer):
        import openai  # pip install openai

        self.model, self.tokenizer = model, tokenizer
        self.client = openai.OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none")
        vllm = any(getattr(known, "owned_by", "") == "vllm" for known in self.client.models.list())
        self.extra = VLLM | {"return_token_ids": True} if vllm else {}  # others refuse what they do not know

    def generate(self, prompts, n, caps, temperature, seed):
        """See VLLM.generate in train_grpo.py; n is 1, log-probs are unknown."""
        told, groups = {"temperature": temperature, "top_p": 1.0, "model": self.model}, []
        for i, (prompt, cap) in enumerate(zip(prompts, caps, strict=True)):
            told |= {"prompt": prompt, "max_tokens": cap, "seed": (seed * 100_003 + i) % 2**31}
            answer = self.client.completions.create(extra_body=self.extra, **told)
            [choice], end = answer.choices, [self.tokenizer.eos_token_id]
            cut = choice.finish_reason == "length"
            # vLLM says which tokens it drew; another server's text is cut into tokens here.
            text = self.tokenizer.encode(choice.text, add_special_tokens=False) + ([] if cut else end)
            ids = np.array((choice.model_extra or {}).get("token_ids") or text, np.int32)
            if cut and len(ids) != cap:
                raise BadInput(f"{self.model}: the server's text is not cut into its own {cap} tokens here")
            groups.append([{"ids": ids, "logps": np.zeros(len(ids), np.float32), "truncated": int(cut)}])
        return groups


class Reminded:
    """A sampler whose responses go on behind reminders; evaluate() asks it as it asks a server."""

    def __init__(self, sampler, tokenizer, form=FORM):
        self.sampler, self.tokenizer, self.form, self.name = sampler, tokenizer, form, "reminded"

    def respond(self, requests, n, temperature, top_p, seed, think_end="</think>"):
        """As engines.respond; top_p is 1. A request: {"ids", "budget", "max_tokens"}."""
        args = argparse.Namespace(think_end=think_end, temperature=temperature)
        method, groups = Reminders(args, self.tokenizer, form=self.form), []
        for r in requests:
            start = {
                "prompt_ids": np.asarray(r["ids"]).tolist(),
                "asked": r["budget"],
                "limit": r["max_tokens"],
            }
            start |= {"ids": np.zeros(0, np.int32), "logps": np.zeros(0, np.float32), "truncated": 1}
            groups.append([start.copy() for _ in range(n)])
        method.complete(groups, self.sampler, seed)
        return [[to_text(r, self.tokenizer, think_end) for r in group] for group in groups]
