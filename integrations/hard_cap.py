"""Closes the thinking part at a hard cap: a logits processor for vLLM's v1 engine. Copy it anywhere.

    LLM(DIR, logits_processors=[HardCap])     SamplingParams(max_tokens=512, extra_args={"think_cap": 448})
    PYTHONPATH=. vllm serve DIR --logits-processors hard_cap:HardCap     and in the request:
    max_tokens=512, extra_body={"vllm_xargs": {"think_cap": 448}}

A response whose thinking is still open then gets `</think>`, as token `think_cap` at the latest; the answer
has the rest up to `max_tokens`. A model trained for "up to N tokens" mostly stays below by itself: this is
the guarantee for the rest. Requests without `think_cap` are left alone.
"""

from collections.abc import Callable
from functools import partial

import torch
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


def force_close(close: list[int], cap: int, output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    """`logits` [vocabulary] of the next token: nothing but its part of `close` where the cap asks for it."""
    start = cap - len(close)  # of the forced tokens: the last one is number `cap` of the response
    at = len(output_ids) - start
    # Looked up in what came before the forced tokens: these contain their own beginning.
    before, n = output_ids[:start], len(close)
    if not 0 <= at < n or any(before[i : i + n] == close for i in range(start - n + 1)):
        return logits
    forced = logits.new_full(logits.shape, float("-inf"))
    forced[close[at]] = 0.0
    return forced


class HardCap(AdapterLogitsProcessor):
    """vLLM's base class follows the requests through its batches; here is what one of them needs."""

    def __init__(self, vllm_config: VllmConfig, device, is_pin_memory: bool):
        super().__init__(vllm_config, device, is_pin_memory)
        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        self.close = tokenizer.encode("</think>", add_special_tokens=False)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """A request with a senseless cap is refused (over HTTP: 400)."""
        cap = (sampling_params.extra_args or {}).get("think_cap", 1)
        if type(cap) is not int or cap < 1:
            raise VLLMValidationError(f"think_cap ({cap!r}) must be a whole number of tokens from 1")

    def is_argmax_invariant(self) -> bool:
        """False: greedy decoding has to see the forced tokens, too."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable | None:
        """The function for one request, or None: no cap was asked for."""
        cap = (params.extra_args or {}).get("think_cap")
        return cap and partial(force_close, self.close, max(cap, len(self.close)))
