"""Started by test_train.py by torchrun: five updates of test_train.random_batch, shared by processes.

two_processes.py MODEL FILE [FLAGS ...]: the losses, the weights, and those of a copy saved and loaded again.
"""

import os
import sys

import torch
from accelerate import PartialState

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from test_train import five_updates  # noqa: E402

if __name__ == "__main__":
    state = PartialState(cpu=True)
    found = five_updates(sys.argv[1], sys.argv[3:], state)
    if state.is_main_process:
        torch.save(found | {"processes": state.num_processes}, sys.argv[2])
    state.destroy_process_group()
