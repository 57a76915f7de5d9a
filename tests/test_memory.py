"""The memory check: what is in memory while it runs, and that it leaves no trace."""

import copy

import pytest
import torch
from test_loss import arguments, random_batch

import methods
import train_grpo
from data import BadInput
from scaling import model as net
from scaling.memory import check_memory


def made(path, *flags):
    args = arguments("--micro-tokens", "200", "--kl-coef", "0.1", "--lr", "1e-3", "--model", path, *flags)
    return *net.build(args, None, True), args


def updated(model, reference, optimizer, args, seed):
    train_grpo.update(model, reference, optimizer, random_batch(seed=seed), methods.Method(args, None), args)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("flags", ["", "--optim adamw8bit", "--lora 4", "--minibatches 2 --ratio sequence"])
@pytest.mark.parametrize("resumed", [False, True])
def test_training_goes_on_as_if_nothing_had_been(tiny, flags, resumed):
    if "8bit" in flags:
        pytest.importorskip("bitsandbytes")
        if not hasattr(torch.ops.bitsandbytes, "optimizer_update_8bit_blockwise"):
            pytest.skip("bitsandbytes registered no kernels in this process")
    ends = []
    for checked in (False, True):
        parts = made(tiny, *flags.split())
        if resumed:
            updated(*parts, seed=1)
        if checked:
            model, reference, optimizer, args = parts
            before = copy.deepcopy(optimizer.state_dict())
            check_memory(model, reference, optimizer, 80, args)
            assert all(p.grad is None for p in model.parameters())
            after = optimizer.state_dict()
            assert after["param_groups"] == before["param_groups"] and bool(after["state"]) == resumed
        ends.append(updated(*parts, seed=2))
    assert torch.equal(*ends)


@pytest.mark.parametrize("resumed", [False, True])
def test_moments_and_gradients_are_in_memory_when_the_largest_pass_runs(tiny, monkeypatch, resumed):
    model, reference, optimizer, args = made(tiny)
    if resumed:
        updated(model, reference, optimizer, args, seed=1)
    real, seen = train_grpo.backward, []

    def spy(model, micro, args):
        learned = list(model.parameters())
        moments = sum(s["exp_avg"].numel() + s["exp_avg_sq"].numel() for s in optimizer.state.values())
        assert moments == 2 * sum(p.numel() for p in learned) and all(p.grad is not None for p in learned)
        seen.append([len(r["prompt_ids"]) + len(r["ids"]) for r in micro])
        assert all(len(r["ref_logps"]) == len(r["ids"]) == args.max_tokens for r in micro)
        return real(model, micro, args)

    monkeypatch.setattr(train_grpo, "backward", spy)
    check_memory(model, reference, optimizer, 80, args)
    assert seen == [[80, 80]]  # --micro-tokens 200


def test_what_does_not_fit_is_told_in_a_line(tiny, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    model, reference, optimizer, args = made(tiny)
    monkeypatch.setattr(train_grpo, "to_tensors", fails)
    with pytest.raises(
        BadInput, match=r"--micro-tokens \(200\) does not fit.*Tried to allocate 9 GiB\); lower"
    ):
        check_memory(model, reference, optimizer, 80, args)
    assert not optimizer.state and all(p.grad is None for p in model.parameters())
    monkeypatch.setattr(train_grpo, "to_tensors", lambda *_: (_ for _ in ()).throw(RuntimeError("other")))
    with pytest.raises(RuntimeError, match="other"):  # a fault of the code is no lack of memory
        check_memory(model, reference, optimizer, 80, args)
