"""Started by test_train.py by torchrun: the update of test_train.random_batch, shared by processes."""

import os
import sys

import torch
from accelerate import PartialState

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from test_train import arguments, random_batch, weights_after_update  # noqa: E402

import sampler  # noqa: E402

if __name__ == "__main__":
    state = PartialState(cpu=True)
    options = {"rank": state.process_index, "processes": state.num_processes}
    model, args = sampler.load_model(sys.argv[1]), arguments("--minibatches", "2")
    weights, stats = weights_after_update(model, random_batch(), args, **options)
    if state.is_main_process:
        torch.save({"weights": weights, "loss": stats["loss"], "processes": state.num_processes}, sys.argv[2])
