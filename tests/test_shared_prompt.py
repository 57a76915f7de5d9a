"""Each prompt computed once: the same loss and gradient as with a row for every response, fewer tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_grpo
from scaling import bench, memory, shared_prompt
from scaling import model as net


def arguments(*flags):
    common = ["--dtype", "float32", "--tis-cap", "0", "--micro-tokens", "400", "--max-tokens", "64"]
    return train_grpo.build_parser().parse_args([*common, *flags])


def response(prompt, length, rng=None, **more):
    rng = rng or np.random.default_rng(length)
    r = {"prompt_ids": list(prompt), "ids": rng.integers(0, 40, length).astype(np.int32), "weight": 0.01}
    r |= {"mask": np.ones(length, np.float32), "logps": np.full(length, np.nan, np.float32)}
    return r | {"advantage": float(rng.normal())} | more


def groups(prompts, lengths, seed=0):
    """A response of each of lengths[i] to a random prompt of prompts[i] tokens; 0 is a token as any other."""
    rng, batch = np.random.default_rng(seed), []
    for n, own in zip(prompts, lengths, strict=True):
        prompt = rng.integers(0, 40, n).tolist()
        batch += [response(prompt, length, rng) for length in own]
    return [batch[i] for i in rng.permutation(len(batch))]


def gradient(model, batch, most, monkeypatch, *flags):
    """(loss, gradient of all that learns in one row, tokens that the embedding saw) of a batch."""
    args, seen = arguments(*flags), []
    monkeypatch.setattr(shared_prompt, "MOST", most)
    hook = model.get_input_embeddings().register_forward_hook(lambda m, i, o: seen.append(i[0].numel()))
    model.zero_grad()
    micros = train_grpo.micro_batches([dict(r) for r in batch], args.micro_tokens)
    loss = sum(float(train_grpo.backward(model, micro, args)["loss"]) for micro in micros)
    hook.remove()
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), sum(seen)


def small(kind):
    return bench.make_model({"width": 64, "layers": 2, "vocab": 40}, kind).train()


MODELS = {kind: small(kind) for kind in ("Qwen2", "Llama")}


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(MODELS)), st.integers(0, 99), st.sampled_from(["60", "400", "5000"]),
    st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(1, 30), min_size=1, max_size=6)), min_size=1,
             max_size=4),
)  # fmt: skip
def test_loss_and_gradient_are_those_of_a_row_for_each_response(kind, seed, limit, drawn):
    batch = groups(*zip(*drawn, strict=True), seed)
    with pytest.MonkeyPatch.context() as patch:
        flags = patch, "--micro-tokens", limit, "--temperature", "0.7"
        loss, want, _ = gradient(MODELS[kind], batch, 0.0, *flags)
        shared_loss, got, _ = gradient(MODELS[kind], batch, 9.0, *flags)
    assert shared_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert (got - want).norm() <= 1e-5 * want.norm() and want.norm() > 0


def test_a_prompt_is_seen_once(monkeypatch):
    """Two groups of 4: prompts of 2 x 20 tokens; of responses all but the longest one's last place, 8 x 9."""
    batch = groups([20, 20], [[10, 5, 5, 1], [10, 9, 8, 7]])
    model, flags = MODELS["Llama"], ("--micro-tokens", "1000")
    assert gradient(model, batch, shared_prompt.MOST, monkeypatch, *flags)[2] == 2 * 20 + 8 * 9
    assert gradient(model, batch, 0.0, monkeypatch, *flags)[2] == 8 * 30


def test_old_and_reference_log_probs_are_the_same_either_way(monkeypatch):
    batch, found = groups([20, 9], [[10, 5, 5, 1], [3, 2, 2]]), []
    for most in (0.0, 9.0):
        monkeypatch.setattr(shared_prompt, "MOST", most)
        train_grpo.add_logps(MODELS["Qwen2"], batch, "logps", arguments())
        found.append(np.concatenate([r["logps"] for r in batch]))
    np.testing.assert_allclose(*found, atol=1e-5)
    assert np.isfinite(found).all() and np.ptp(found[0]) > 0.01


def test_adapters_learn_the_same(monkeypatch):
    pytest.importorskip("peft")
    model, batch = small("Llama"), groups([20, 12], [[10, 5, 5, 1], [3, 2, 2]])
    net.add_lora(model, 4, seed=0)
    for name, p in model.named_parameters():
        p.data = p.data + 0.1 if "lora_B" in name else p.data  # at first nothing gets through them
    _, want, all_tokens = gradient(model, batch, 0.0, monkeypatch)
    _, got, fewer = gradient(model, batch, 9.0, monkeypatch)
    assert (got - want).norm() <= 1e-5 * want.norm() and want.norm() > 0 and fewer < all_tokens


def test_when_it_pays_by_hand():
    prompt = range(20)
    # eight responses of 10 tokens: 20 + 80 of 240 tokens; of 200 tokens: 20 + 1,600 of 1,760
    assert shared_prompt.pays([response(prompt, 10)] * 8)
    assert not shared_prompt.pays([response(prompt, 200)] * 8)
    # two responses of 20 tokens to a prompt of 40: 80 of 120, two thirds; one token more is too much
    assert shared_prompt.pays([response(range(40), 20)] * 2)
    assert not shared_prompt.pays([response(range(40), 20), response(range(40), 21)])
    assert not shared_prompt.pays([response([i] * 20, 5) for i in range(8)])  # nobody shares
    assert train_grpo.to_tensors([response(prompt, 10)] * 8)["prompt"].tolist() == [20] * 8
    assert train_grpo.to_tensors([response(prompt, 200)] * 8)["prompt"] is None


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(2, 9)), min_size=1, max_size=9), st.integers(1, 999)
)
def test_groups_stay_together_and_within_the_limit(drawn, limit):
    rng = np.random.default_rng(len(drawn))
    batch = groups([p for p, _ in drawn], [rng.integers(1, 9, n).tolist() for _, n in drawn])
    parts = train_grpo.micro_batches(batch, limit)
    assert sorted(id(r) for part in parts for r in part) == sorted(map(id, batch))
    for part in parts:  # as if nothing was shared: memory stays below what it was
        assert len(part) == 1 or len(part) * max(map(train_grpo.size, part)) <= limit
    if shared_prompt.pays(batch):
        units = shared_prompt.units(sorted(batch, key=train_grpo.size, reverse=True), 10**6)
        largest = max(len(unit) * train_grpo.size(unit[0]) for unit in units)
        prompts = [{tuple(r["prompt_ids"]) for r in part} for part in parts]
        if largest <= limit:  # no group is split
            assert sum(map(len, prompts)) == len(set().union(*prompts))


def test_where_it_does_not_fit():
    import transformers

    plain = arguments()
    assert shared_prompt.fits(MODELS["Llama"], plain) and shared_prompt.fits(MODELS["Qwen2"], plain)
    assert not shared_prompt.fits(MODELS["Llama"], arguments("--gradient-checkpointing"))
    assert not shared_prompt.fits(MODELS["Llama"], arguments("--fsdp"))
    sizes = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    window = transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=8, **sizes))
    assert not shared_prompt.fits(window, plain)


def test_recomputed_activations_and_windows_keep_a_row_for_each_response(monkeypatch):
    batch = groups([20, 20], [[10, 5, 5, 1], [10, 9, 8, 7]])
    flags = "--gradient-checkpointing", "--micro-tokens", "1000"
    assert gradient(MODELS["Llama"], batch, shared_prompt.MOST, monkeypatch, *flags)[2] == 8 * 30


def test_the_memory_check_shares_nothing(monkeypatch):
    """It looks for the largest update, and in another one prompts may be all different."""
    seen, args = [], arguments("--max-tokens", "8", "--micro-tokens", "400")
    monkeypatch.setattr(train_grpo, "backward", lambda model, micro, args: seen.append(micro))
    optimizer = torch.optim.AdamW(MODELS["Llama"].parameters())
    memory.check_memory(MODELS["Llama"], None, optimizer, 40, args)
    assert len(seen[0]) == 10 and train_grpo.to_tensors(seen[0])["prompt"] is None
