"""CRF, "Efficient Reasoning via Reward Model": a classifier scores how concise a response is. Reward crf."""

import torch

from data import BadInput, load_config, load_tokenizer
from methods import Method


class Crf(Method):
    """model: folder or hub id of a sequence classifier with one label; "toy": that of toy/prepare.py."""

    provides = ("conciseness",)

    def __init__(self, args, tokenizer, model=None):
        super().__init__(args, tokenizer)
        if model is None:
            raise BadInput("--method crf needs a classifier: --method-args model=FOLDER (or model=toy)")
        if model == "toy":
            from toy.prepare import keep, make_conciseness

            model = keep("conciseness", make_conciseness)
        self.reads = load_tokenizer(model)
        labels = load_config(model, self.reads).num_labels
        if labels != 1:
            raise BadInput(f"--method-args model={model} has {labels} labels: one is needed, its logit")
        from transformers import AutoModelForSequenceClassification

        options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
        self.scorer, info = AutoModelForSequenceClassification.from_pretrained(model, **options)
        if info["missing_keys"]:
            raise BadInput(f"--method crf: {model} is no classifier: it lacks {min(info['missing_keys'])}")
        self.reads.pad_token = self.reads.pad_token or self.reads.eos_token
        self.scorer.config.pad_token_id = self.reads.pad_token_id
        self.scorer = self.scorer.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @torch.no_grad()
    def scores(self, texts):
        """Sigmoid of the logit of each text, in [0, 1]."""
        found, limit = [], self.scorer.config.max_position_embeddings
        for start in range(0, len(texts), 16):
            inputs = self.reads(texts[start : start + 16], padding=True, truncation=True, max_length=limit)
            names = "input_ids", "attention_mask"
            inputs = {k: torch.tensor(inputs[k], device=self.scorer.device) for k in names}
            found += self.scorer(**inputs).logits[:, 0].sigmoid().tolist()
        return found

    def revise(self, groups, rows):
        flat = sum(groups, [])
        for r, score in zip(flat, self.scores([r["text"] for r in flat]), strict=True):
            r["conciseness"] = score
