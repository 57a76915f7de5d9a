"""Prompts once: responses to a prompt share its computation, in the update's forward and backward pass.

Of G responses of R tokens to a prompt of P tokens a plain pass computes G (P + R) tokens, this one P + G R:
the prompt runs once, and all its responses look back at its keys and values. In a causal model the prompt
cannot see the response: values and gradients are the same, autograd adds up what the responses send back.
"""

import torch

# Sharing pays where at most this part of the tokens is left. The second pass attends through a mask, which is
# slower: where responses are long and prompts short, it would cost what it saves.
MOST = 2 / 3


def pays(responses: list[dict]) -> bool:
    """Whether sharing leaves at most MOST of the tokens of responses {"prompt_ids", "ids"}."""
    prompts = {tuple(r["prompt_ids"]): len(r["prompt_ids"]) for r in responses}
    own, all_prompts = sum(len(r["ids"]) for r in responses), sum(len(r["prompt_ids"]) for r in responses)
    return sum(prompts.values()) + own <= MOST * (all_prompts + own)


def units(responses: list[dict], limit: int, processes: int = 1) -> list[list[dict]]:
    """What should stay together in a micro-batch of `limit` tokens, longest first, as the input is.

    Responses to one prompt where sharing pays, in parts that fit, and enough of them for all processes; else
    every response is by itself.
    """
    groups, parts = {}, []
    for r in responses if pays(responses) else ():
        groups.setdefault(tuple(r["prompt_ids"]), []).append(r)
    for prompt, group in groups.items():
        n = max(1, min(limit // (len(prompt) + len(group[0]["ids"])), -(-len(group) // processes)))
        parts += [group[i : i + n] for i in range(0, len(group), n)]
    parts.sort(key=lambda part: len(part[0]["prompt_ids"]) + len(part[0]["ids"]), reverse=True)
    return parts or [[r] for r in responses]


def fits(model, args) -> bool:
    """Whether the model's past is keys and values in every layer, and is there to be read."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    # A sharded model is called as one module, and recomputed activations leave no keys and values behind.
    whole = not args.fsdp and not args.gradient_checkpointing
    return whole and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def hidden_states(model, t: dict, bf16: bool) -> torch.Tensor:
    """Last hidden states [T, d] that predict the response tokens, as model.output_head takes them.

    t: ids [N, width]; prompt [N], lengths; row and column [T] of the places from which tokens are predicted.
    """
    from transformers import DynamicCache

    ids, length, decoder = t["ids"], t["prompt"], model.get_decoder()
    own = torch.arange(int(length.max()), device=ids.device) < length[:, None]
    # The different prompts [K, P], padded by -1, and which of them each response has [N].
    prompts, which = ids[:, : own.shape[1]].where(own, -1).unique(dim=0, return_inverse=True)
    place = t["column"] - length[t["row"]] + 1  # of a token in its response; 0 is predicted by the prompt
    position = length[:, None] + torch.arange(max(1, int(place.max())), device=ids.device)
    options = {"past_key_values": DynamicCache(config=model.config), "use_cache": True}
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        first = decoder(input_ids=prompts.clamp(min=0), **options).last_hidden_state
        options["past_key_values"].batch_select_indices(which)
        # What pads a prompt is hidden from its responses; what pads a response comes after all that counts.
        options["attention_mask"] = torch.cat([own, torch.ones_like(position, dtype=torch.bool)], 1)
        after = ids.gather(1, position.clamp(max=ids.shape[1] - 1))
        rest = decoder(input_ids=after, position_ids=position, **options).last_hidden_state
    hidden = torch.cat([first[which, length - 1][:, None], rest], 1)[t["row"], place]
    return hidden.bfloat16() if bf16 else hidden
