"""Measures seconds to the first step and peak memory of a run on datasets of several sizes.

    python benchmarks/first_step.py                            # writes results/first_step-cpu.json
    python benchmarks/first_step.py --checkout PATH --as NAME  # of other code, into the same file
    python benchmarks/first_step.py --table

Each run is a process of its own, on a tiny Llama (two layers of 64 dimensions) with a byte-level
BPE tokenizer of 4,096 tokens that is trained on the same text. A row is a message of about 60 words
and a reference of about 40, made of 5,000 made-up words, in JSON Lines or in Arrow files
(`Dataset.save_to_disk`), which are in the page cache. The clock starts when `train` is called, that
imports most of what it needs, and stops when the first step has ended; the process's peak of
resident memory is read there. CPU seconds, which other programs on the machine disturb less, are
the process's own. For Linux.

Another checkout needs a link from its grao_fast/kernels to its kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "first_step-cpu.json"
SIZES = (1_000, 100_000, 1_000_000)
FORMATS = ("jsonl", "arrow")
PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "pyarrow")
_LIMIT = 1800  # seconds


def make_rows(number: int) -> Any:
    draw = random.Random(0)
    letters = "etaoinshrdlu"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(5000)]
    for _ in range(number):
        prompt, reference = (" ".join(draw.choices(words, k=draw.randint(*b)))
                             for b in ((20, 100), (10, 70)))  # fmt: skip
        yield {"prompt": [{"role": "user", "content": prompt}], "reference": reference}


def make_model(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet
    )
    raw.train_from_iterator((row["reference"] for row in make_rows(2000)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_dataset(folder: Path, number: int) -> None:
    """Write the rows in every format, if they are not there yet."""
    from datasets import Dataset

    path = folder / f"{number}.jsonl"
    if path.exists():
        return
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in make_rows(number))
    # Rows of JSON are read by Arrow here, whose types these have.
    Dataset.from_json(
        str(path), cache_dir=str(folder / "cache"), keep_in_memory=False
    ).save_to_disk(folder / f"{number}.arrow")


def first_step(model: str, dataset: str, output: str) -> None:
    """Run one step, and print the seconds until it ended and the peak memory in MiB."""
    import torch

    import grao_fast
    from grao_fast.callbacks import Callback

    torch.set_num_threads(1)
    imported, started, cpu = _peak_mib(), time.perf_counter(), time.process_time()

    class Stop(Callback):
        def on_step_end(self, step: int, metrics: Any) -> bool:
            result = {
                "seconds": time.perf_counter() - started,
                "cpu_seconds": time.process_time() - cpu,
                "peak_mib": _peak_mib(),
                "imports_mib": imported,
            }
            print(json.dumps(result), flush=True)
            return True

    def brevity(completions: Any) -> list[float]:
        return [-float(len(turns[0]["content"])) for turns in completions]

    config = grao_fast.GRAOConfig(
        num_generations=2,
        max_new_tokens=8,
        prompts_per_step=8,
        max_steps=2,
        save_steps=0,
        disable_tqdm=True,
        device="cpu",
    )
    grao_fast.train(model, dataset, brevity, config=config, callbacks=[Stop()], output_dir=output)


def _peak_mib() -> float:
    """The peak of this process's own memory; `ru_maxrss` would begin with its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measured(checkout: Path, folder: Path, number: int, kind: str) -> dict[str, Any]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-P", __file__, "--run", str(folder / "model"),
                   str(folder / f"{number}.{kind}"), output]  # fmt: skip
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=_LIMIT,
            check=False,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    if not lines:
        raise SystemExit(f"the run on {number} rows failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[-1])


def table(results: dict[str, Any]) -> str:
    lines = [
        "| rows | format | code | seconds to the first step | of them CPU | peak memory, MiB |",
        "| ---: | --- | --- | ---: | ---: | ---: |",
    ]
    for row in sorted(results["runs"], key=lambda row: (row["rows"], row["format"], row["code"])):
        lines.append(
            f"| {row['rows']:,} | {row['format']} | {row['code']} | {row['seconds']:.1f} | "
            f"{row['cpu_seconds']:.1f} | {row['peak_mib']:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", nargs=3, metavar=("MODEL", "DATASET", "OUTPUT"))
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--as", dest="code", default="now", help="name of the code in the table")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--folder", type=Path, help="for model and datasets, kept for later calls")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.run:
        first_step(*args.run)
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
    if not args.table:
        folder = args.folder or Path(tempfile.mkdtemp())
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "model").exists():
            make_model(folder / "model")
        results["machine"] = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
        results["versions"] = {name: version(name) for name in PACKAGES}
        results["versions"]["python"] = platform.python_version()
        for number in args.sizes:
            make_dataset(folder, number)
            for kind in FORMATS:
                row = {"rows": number, "format": kind, "code": args.code}
                found = measured(args.checkout, folder, number, kind)
                print(row | found, flush=True)
                results["runs"] = [old for old in results["runs"] if old | row != old]
                results["runs"].append(row | found | {"load": os.getloadavg()[0]})
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
