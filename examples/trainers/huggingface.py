"""SFT by Transformers' Trainer, without logits: python huggingface.py MODEL ROWS.jsonl OUTPUT"""

import sys
from unittest.mock import patch

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers import DataCollatorForSeq2Seq as Collator

from grao_fast.kernels import linear_weighted_cross_entropy
from grao_fast.models.head import LogitTransform, check_head


class OnePassTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = torch.nn.functional.pad(inputs.pop("labels").cpu(), (0, 1), value=-100)[:, 1:]
        weights = (labels != -100).float() / int(num_items_in_batch or (labels != -100).sum())
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            weights *= self.accelerator.num_processes  # it counts all, and gradients are averaged
        bare = self.accelerator.unwrap_model(model)
        check_head(bare)
        head, config = bare.get_output_embeddings(), bare.config.get_text_config()
        assert LogitTransform.from_config(config) == LogitTransform(), "would scale or cap the loss"

        def loss_of(hidden_BLD):  # in place of logits, where DDP, FSDP and ZeRO-3 have the weights
            rows = hidden_BLD.flatten(0, 1), head.weight, labels.flatten(), weights.flatten()
            return linear_weighted_cross_entropy(*rows, bias_V=head.bias).loss

        with patch.object(head, "forward", loss_of):
            loss = model(**inputs, use_cache=False).logits
        return (loss, {"loss": loss}) if return_outputs else loss


def main(path: str, rows: str, output: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)

    def encode(row):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["reference"])["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    data = load_dataset("json", data_files=rows, split="train").map(encode)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    args = TrainingArguments(output, max_steps=20, learning_rate=1e-4, report_to="none")
    OnePassTrainer(model, args, Collator(tokenizer), data).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
