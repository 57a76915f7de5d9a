"""What scaling/bench.py compares with: TRL's trainer, a bare vllm.LLM, math-verify called one by one."""

import importlib.util
import os

import numpy as np

from data import BadInput, read_file
from scaling.race import DEVICE, clock, memory, print_table, race

ANSWERS = os.path.join(os.path.dirname(__file__), "..", "tests", "data", "math_train_small.jsonl.gz")


def trl_worker(variant: str, s: dict, folder: str, pipe) -> None:
    """Worker: TRL's trainer itself; only the generation is replaced, through its own `rollout_func`."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # about rollout_func
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from scaling.bench import make_batch, make_trainer
    from toy.task import make_tokenizer

    batch, groups = make_batch(s), s["sequences"] // 8
    args, model, _, optimizer, held = make_trainer(s, folder, "trl")
    # TRL's defaults are kept where they do not change the mathematics: 8 sequences per device, padding,
    # recomputed activations (gradient_checkpointing), its chunked head.
    config = GRPOConfig(
        output_dir=os.path.join(folder, "trl"), per_device_train_batch_size=8, num_generations=8,
        gradient_accumulation_steps=groups, max_completion_length=s["high"], scale_rewards="none",
        bf16=args.dtype == "bfloat16", use_cpu=DEVICE == "cpu", max_steps=10**6, lr_scheduler_type="constant",
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            pipe.recv()
            self.began = clock()

        def on_step_end(self, args, state, control, **kwargs):  # after the optimizer's step
            seconds = clock() - self.began
            # Of what the trainer made of the rollouts, seen in the micro-batches it keeps.
            masks = [m[side] for m in trainer._buffered_inputs for side in ("prompt_mask", "completion_mask")]
            padding = 1 - sum(m.sum().item() for m in masks) / sum(m.numel() for m in masks)
            pipe.send({"seconds": seconds, "peak": memory("VmHWM"), "held": held, "padding": padding})

    def rollouts(prompts, trainer):
        ids = {"prompt_ids": [r["prompt_ids"] for r in batch]}
        return ids | {"completion_ids": [r["ids"].tolist() for r in batch], "logprobs": None}

    def reward(completion_ids, **kwargs):
        return [r["advantage"] for r in batch]

    trainer = GRPOTrainer(
        model, reward, config, Dataset.from_dict({"prompt": ["prompt"] * groups}), callbacks=[Turns()],
        processing_class=make_tokenizer(), optimizers=(optimizer, None), rollout_func=rollouts,
    )  # fmt: skip
    trainer.train()


def sampler_worker(variant: str, s: dict, folder: str, pipe) -> None:
    """Worker: responses to the same prompts, from the trainer's engine or from a plain vllm.LLM."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}  # GiB, for both
    import train_grpo
    from scaling.bench import make_args, make_model
    from toy.task import make_tokenizer

    prompts = np.random.default_rng(0).integers(6, s["vocab"], (s["prompts"], s["prompt"])).tolist()
    limit, dtype, cap = s["prompt"] + s["max_tokens"], make_args(s).dtype, s["max_tokens"]
    # Not a Qwen2: its folders are opened with Qwen's own tokenizer class, whatever they hold.
    path, tokenizer, model = os.path.join(folder, variant), make_tokenizer(), make_model(s, "Llama")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    if variant == "ours":
        engine = train_grpo.VLLM(path, tokenizer, [0], limit, dtype, 0, 0.3, s["prompts"] * s["group"])
    else:
        import vllm

        options = {"gpu_memory_utilization": 0.3} if DEVICE == "cuda" else {"enforce_eager": True}
        llm = vllm.LLM(path, dtype=dtype, max_model_len=limit, **options)
        params = vllm.SamplingParams(n=s["group"], max_tokens=cap, logprobs=0, stop_token_ids=[0])
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    while pipe.recv():
        before = clock()
        if variant == "ours":
            engine.load(model)
        after = clock()
        if variant == "ours":
            groups = engine.generate(prompts, s["group"], [cap] * len(prompts), 1.0, 0)
            tokens = sum(len(r["ids"]) for group in groups for r in group)
        else:
            answers = llm.generate(requests, params, use_tqdm=False)
            tokens = sum(len(out.token_ids) for answer in answers for out in answer.outputs)
        pipe.send({"seconds": (clock() - after) / tokens, "sync": after - before, "tokens": tokens})


def bench_sampler(s: dict, folder: str) -> dict:
    """Tokens per second of the colocated engine and of a bare one, with the log-probs that the loss needs."""
    if not importlib.util.find_spec("vllm"):
        raise BadInput("sampler needs vllm: see the README and requirements-test.txt")
    found = race(dict.fromkeys(("ours", "bare"), sampler_worker), s, folder)
    rows = [[name, f"{f['tokens']:,}", f"{1 / f['seconds']:,.0f}"] for name, f in found.items()]
    print_table(["sampler", "tokens", "tokens/s"], rows)
    sync = found["ours"]["sync"]
    print(f"bare: LLM.generate, on a CPU not compiled, as ours; weights pushed in {sync:.3f} s")
    return {"variants": found}


def bench_verify(s: dict, folder: str) -> dict:
    """Answers per second of verifier.check_answers, and of math-verify called for one after the other.

    They are groups of answers to problems of MATH, about half of them right.
    """
    from math_verify import parse, verify

    from verifier import check_answers

    known = [row["answer"] for row in read_file(ANSWERS)]
    golds = [known[i % len(known)] for i in range(s["problems"]) for _ in range(s["group"])]
    rng, responses = np.random.default_rng(0), []
    for gold in golds:
        answer = str(rng.choice([gold, gold.replace("\\frac", "\\dfrac"), rng.choice(known), f"{gold} + 1"]))
        thought = "Let me see: so we get $x$, then wait. " * int(rng.integers(10, 200))
        responses.append(f"{thought}</think> The answer is $\\boxed{{{answer}}}$.")
    found = {"ours": {"all": []}, "math_verify": {"all": []}}
    for _ in range(1 + s["rounds"]):  # the first turn is a warm-up
        for name, f in found.items():
            before = clock()
            if name == "ours":
                right, f["counts"] = check_answers(responses, golds, ["math"] * len(golds))
            else:
                pairs = zip(golds, responses, strict=True)
                right = [verify(parse(f"${gold}$"), parse(response)) for gold, response in pairs]
            f["all"].append(clock() - before)
            f |= {"right": sum(right), "per_second": len(golds) / np.median(f["all"][1:] or f["all"])}
    rows = [[name, f"{f['per_second']:,.0f}", f["right"]] for name, f in found.items()]
    print_table(["checker", "answers/s", "right"], rows)
    print(f"{len(golds)} answers; ours: {found['ours']['counts']}")
    return {"answers": len(golds), "variants": found}
