"""Reminders at serving time: generation in pieces against any OpenAI-compatible completions server.

    python -m integrations.remind --base-url http://localhost:8000/v1 --model DIR --budget 96 "What is 7 + 8?"

For a model trained with --method reminders. DIR is the model's folder or hub id, and its name at the server
unless --api-model says another one. A response is asked for up to its next mark, and again behind the mark,
by token ids: the server's prefix cache has read the rest.
"""

import argparse
import os
import sys

import numpy as np

import data
from evaluation.engines import VLLM, to_text
from methods.reminders import FORM, Reminders


class Completions:
    """A completions server in a sampler's place."""

    def __init__(self, base_url: str, model: str, tokenizer):
        import openai

        self.openai = openai
        self.client = openai.OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none")
        self.model, self.tokenizer = model, tokenizer

    def generate(self, prompts, n, caps, temperature, seed, top_p=1.0):
        """See VLLM.generate in train_grpo.py; n is 1."""
        return [[self.ask(*asked, temperature, seed, top_p)] for asked in zip(prompts, caps, strict=True)]

    def ask(self, prompt: list[int], cap: int, temperature: float, seed: int, top_p: float) -> dict:
        told = {"max_tokens": cap, "temperature": temperature, "seed": seed % 2**31, "top_p": top_p}
        # vLLM says which tokens it drew; another server's text is cut into tokens here.
        extra = VLLM | {"return_token_ids": True}
        choice = self.client.completions.create(
            model=self.model, prompt=prompt, extra_body=extra, **told
        ).choices[0]
        cut = choice.finish_reason == "length"
        ids = (choice.model_extra or {}).get("token_ids")
        if ids is None:
            ids = self.tokenizer.encode(choice.text, add_special_tokens=False)
            ids += [] if cut else [self.tokenizer.eos_token_id]
        return {
            "ids": np.array(ids, np.int32),
            "logps": np.zeros(len(ids), np.float32),
            "truncated": int(cut),
        }


class Reminded:
    """A sampler whose responses go on behind reminders; evaluate() asks it as it asks a server."""

    def __init__(self, sampler, tokenizer=None, form=None):
        self.sampler, self.tokenizer, self.form = sampler, tokenizer or sampler.tokenizer, form or FORM
        self.name = getattr(sampler, "name", "completions") + ", reminded"

    def respond(self, requests, n, temperature, top_p, seed, think_end="</think>"):
        """As engines.respond. A request: {"ids", "budget", "max_tokens"}."""
        args = argparse.Namespace(think_end=think_end, temperature=temperature)
        method, groups = Reminders(args, self.tokenizer, form=self.form), []
        for r in requests:
            start = {
                "prompt_ids": list(r["ids"]),
                "asked": r["budget"],
                "limit": r["max_tokens"],
                "truncated": 1,
            }
            empty = {"ids": np.zeros(0, np.int32), "logps": np.zeros(0, np.float32)}
            groups.append(
                [start | empty for _ in range(n)]
            )  # extend() replaces the arrays, it does not fill them
        method.complete(groups, self.sampler, seed)
        return [[to_text(r, self.tokenizer, think_end) for r in group] for group in groups]


@data.exit_code("integrations.remind")
def main(argv: list[str] | None = None) -> None:
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "description": __doc__}
    parser = data.one_line_errors(argparse.ArgumentParser("integrations.remind", **form))
    add = parser.add_argument
    add("problem", help="what is asked")
    add("--base-url", required=True, help="of the server, with its /v1")
    add("--model", required=True, help="the model's folder or hub id: its tokenizer, its chat template")
    add("--api-model", help="its name at the server (default: as --model)")
    add("--budget", type=int, required=True, help="tokens, reminders included")
    add("--max-tokens", type=int, help="cap of the response (default: twice the budget)")
    add(
        "--form",
        default=FORM,
        help="of a reminder: {i} eighths, {used} and {left} tokens (default %(default)s)",
    )
    add("--wording", default="l1", help="l1, tulu, or a sentence with {N} in it (default %(default)s)")
    add("--temperature", type=float, default=0.6, help="(default %(default)s)")
    add("--seed", type=int, default=0, help="(default %(default)s)")
    args = parser.parse_args(argv)
    tokenizer = data.load_tokenizer(args.model)
    server = Completions(args.base_url, args.api_model or args.model, tokenizer)
    prompt = data.budget_prompt(args.problem, args.budget, "exact", wording=args.wording)
    request = {"ids": data.encode_prompt(tokenizer, prompt), "budget": args.budget}
    request["max_tokens"] = args.max_tokens or 2 * args.budget
    reminded = Reminded(server, tokenizer, args.form)
    try:
        [[found]] = reminded.respond([request], 1, args.temperature, 1.0, args.seed)
    except server.openai.APIError as error:
        raise data.BadInput(
            f"--base-url {args.base_url}: {data.first_line(error)}: is the server up?"
        ) from None
    print(found["response"])
    print(f"{found['length']} tokens of {args.budget}, {found['finish_reason']}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
