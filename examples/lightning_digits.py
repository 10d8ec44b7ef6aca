"""Lightning's Trainer over a parameter server: a small network on handwritten digits.

ps-run -n 2 examples/lightning_digits.py --epochs 10
ps-run -n 4 --mode ssp --slack 2 examples/lightning_digits.py

The lines marked with <-- are about the servers: one keeps Lightning from starting torch.distributed, the others
wrap the optimizer and give this worker its part of the data.
"""

import argparse
from typing import Any

import lightning
import torch
import torch.nn.functional as F

import torch_ps
from torch_ps.worker.tasks import digits


class Network(lightning.LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(self.layers(images), labels)

    def configure_optimizers(self) -> Any:
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        self.optimizer = torch_ps.ParameterServerOptimizer(sgd, self)  # <--
        return [self.optimizer], [torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)]

    def train_dataloader(self) -> Any:
        return torch_ps.shard(digits.read()[0], self.optimizer, batch_size=32)  # <--


def train(network: lightning.LightningModule, epochs: int) -> None:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(network)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    torch_ps.alone()  # <--
    network = Network()
    train(network, parser.parse_args().epochs)
    network.optimizer.close()
    images, labels = digits.read()[1].tensors
    accuracy = (network.layers(images).argmax(1) == labels).float().mean().item()
    print(f"accuracy on the {len(labels)} digits not trained on: {accuracy:.1%}")


if __name__ == "__main__":
    main()
