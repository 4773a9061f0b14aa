"""SFT by Transformers' Trainer, without logits: python huggingface.py MODEL ROWS.jsonl OUTPUT"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers import DataCollatorForSeq2Seq as Collator

from grao_fast.kernels import linear_weighted_cross_entropy


class OnePassTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels").cpu()  # of the next token, one place earlier
        labels = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        weights = (labels != -100).float() / (num_items_in_batch or (labels != -100).sum()).cpu()
        causal_lm = self.accelerator.unwrap_model(model)
        output = causal_lm.base_model(**inputs)
        loss = linear_weighted_cross_entropy(
            output.last_hidden_state.flatten(0, 1),
            causal_lm.get_output_embeddings().weight,
            labels.flatten(),
            weights.flatten(),
        ).loss
        return (loss, output) if return_outputs else loss


def main(path: str, rows: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)

    def encode(row):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["reference"])["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    data = load_dataset("json", data_files=rows, split="train")
    arguments = TrainingArguments(output, max_steps=20, learning_rate=1e-4, report_to="none")
    OnePassTrainer(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        arguments,
        train_dataset=data.map(encode, remove_columns=data.column_names),
        data_collator=Collator(tokenizer),
    ).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
