"""The sampler for machines without vLLM: a plain generation loop on the model that is being trained.

The same face as VLLM in train_grpo.py. No second copy of the weights, always in sync; slow for big models.
"""

import torch


class HFSampler:
    name = "hf"

    def __init__(self, model, tokenizer, stop_ids: list[int], max_model_len: int, sharded=False, bf16=False):
        self.model, self.tokenizer, self.stop_ids = model, tokenizer, stop_ids
        self.max_model_len, self.sharded, self.bf16 = max_model_len, sharded, bf16

    def load(self, model) -> None:
        """Read `model` itself from now on. Shards cannot be asked token by token: they fill a copy."""
        if not self.sharded:
            self.model = model
            return
        from scaling.model import whole_weights

        own = dict(self.model.named_parameters())
        for name, weight in whole_weights(model):
            own[name].data.copy_(weight)

    def sleep(self) -> None:
        """It holds no memory of its own."""

    def generate(self, prompts, n, caps, temperature, seed, top_p=1.0, stop_ids=None, logit_bias=None):
        """See VLLM.generate."""
        torch.manual_seed(seed)
        # At most 512 rows and 2^18 tokens at once: the cache of keys and values has to fit into memory.
        rows = min(512, 2**18 // (max(map(len, prompts)) + max(caps)))
        was_training, done, per_call = self.model.training, [], max(1, rows // n)
        self.model.eval()
        for start in range(0, len(prompts), per_call):
            part = slice(start, start + per_call)
            options = temperature, top_p, stop_ids or self.stop_ids, logit_bias or {}
            done += self._generate(prompts[part], n, caps[part], *options)
        self.model.train(was_training)
        return done

    @torch.no_grad()
    def _generate(self, prompts, n, caps, temperature, top_p, stop_ids, bias):
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
        cap = torch.tensor(caps, device=device).repeat_interleave(n)
        stops = torch.tensor(stop_ids, device=device)
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
        arrays = tokens.cpu().int().numpy(), logps.cpu().numpy()
        done = zip(*arrays, length.tolist(), stopped.tolist(), strict=True)
        result = [{"ids": i[:m], "logps": lp[:m], "truncated": int(not stop)} for i, lp, m, stop in done]
        return [result[i : i + n] for i in range(0, len(result), n)]

    def _logits(self, ids, mask, position, cache):
        """Logits [N, V] of the token that follows `ids` [N, T], float32."""
        options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):  # as in training
            out = self.model(input_ids=ids, attention_mask=mask, position_ids=position, **options)
        return out.logits[:, -1].float()


def draw_token(logits, temperature: float, top_p: float, bias: dict) -> tuple:
    """(next tokens [N], their log-probs [N] with temperature and bias, without top_p) from logits [N, V]."""
    if bias:
        logits[:, list(bias)] += torch.tensor(list(bias.values()), device=logits.device)
    logp = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logp.argmax(-1, keepdim=True)
    elif top_p >= 1:
        token = torch.multinomial(logp.exp(), 1)
    else:
        from transformers import TopPLogitsWarper

        token = torch.multinomial(TopPLogitsWarper(top_p)(None, logp).softmax(-1), 1)
    return token[:, 0], logp.gather(-1, token)[:, 0]
