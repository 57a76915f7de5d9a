"""LongWriter-Zero, 2506.18841: a range of lengths for each prompt. Reward longwriter_range."""

import numpy as np

from data import BadInput
from methods import Method


class LongWriter(Method):
    """The range is the row's own "range": [lo, hi], or its budget +- width of it."""

    provides = ("range",)

    def __init__(self, args, tokenizer, width=0.1):
        super().__init__(args, tokenizer)
        self.width = width

    def row(self, row, step):
        if not row.get("range") and not row.get("budget"):
            raise BadInput("--method longwriter: rows have neither a range nor a budget: give --budgets")
        return row

    def reward_inputs(self, groups, rows, step):
        around = [1 - self.width, 1 + self.width]
        return {"range": np.array([row.get("range") or np.multiply(row["budget"], around) for row in rows])}


METHOD = LongWriter
