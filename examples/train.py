"""A plain PyTorch loop that trains on several workers: the lines marked with <-- are the only difference.

ps-run -n 2 examples/train.py                                  the whole job on this host
ps-serve --workers 2                                           or by hand: the server,
ps-worker --servers 127.0.0.1:50051 examples/train.py          and this line in two other terminals
"""

import argparse

import torch
import torch.nn.functional as F

import torch_ps  # <--
from torch_ps.worker.tasks import digits


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.1)
    args = parser.parse_args()

    training, validation = digits.read()
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    sgd = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    optimizer = torch_ps.ParameterServerOptimizer(sgd, model)  # <--
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)

    with optimizer:
        for epoch in range(args.epochs):
            losses = []  # stays empty for a worker that joins after this epoch
            for images, labels in torch_ps.shard(training, optimizer, batch_size=32):  # <--
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            schedule.step()
            if losses:
                print(f"epoch {epoch + 1}: {len(losses)} batches, loss {sum(losses) / len(losses):.4f}")

    images, labels = validation.tensors
    accuracy = (model(images).argmax(1) == labels).float().mean().item()
    print(f"accuracy on the {len(labels)} digits not trained on: {accuracy:.1%}")


if __name__ == "__main__":
    main()
