"""Hugging Face's Trainer over a parameter server: a small GPT-2, by configuration, on text that is on every machine.

ps-run -n 2 examples/transformers_gpt2.py --steps 200
ps-run -n 4 --mode async examples/transformers_gpt2.py      any mode and codec: the script is the same

The lines marked with <-- are about the servers: one keeps Transformers from starting torch.distributed, the others
wrap the optimizer and give this worker its part of the data.
"""

import argparse
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import torch_ps
from torch_ps.worker.tasks import text

LENGTH = 64


def pieces() -> list[dict[str, torch.Tensor]]:
    """Python's own source code in pieces, each of shape (LENGTH,), int64."""
    found = text.read().training.long()
    rows = found[: len(found) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


class OnServers(Trainer):  # <--
    """Takes its batches from the servers, so that workers may come and go."""

    def get_train_dataloader(self) -> Any:
        return torch_ps.shard(
            self.train_dataset,
            self.optimizer,
            batch_size=self.args.train_batch_size,
            collate_fn=self.data_collator,
        )


def model_of(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    size: dict[str, Any] = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 2}
    none: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**size, **none, bos_token_id=None, eos_token_id=None))


def train(kind: type[Trainer], model: Any, optimizer: torch.optim.Optimizer, data: Any, steps: int) -> float:
    """The mean training loss."""
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    arguments = TrainingArguments(
        max_steps=steps,
        per_device_train_batch_size=8,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = kind(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, schedule))
    return float(trainer.train().training_loss)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch_ps.alone()  # <--
    model = model_of()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with torch_ps.ParameterServerOptimizer(adamw, model) as optimizer:  # <--
        loss = train(OnServers, model, optimizer, pieces(), steps)  # <--
    print(f"mean loss of {steps} steps: {loss:.6f}")


if __name__ == "__main__":
    main()
