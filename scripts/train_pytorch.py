"""Train with PyTorch as train.py does by default, to compare results and speed.

This script trains network A with PyTorch's own layers and autograd, on the CPU or, with --device
cuda, on a GPU. The images are in memory as bytes. Each batch is gathered and converted separately,
which is several times faster than a DataLoader.
"""

from __future__ import annotations

from _command_line import ArgumentParser, integer, run, say

# isort: split

import time
from functools import partial
from typing import Any

from npbn import data
from npbn.errors import NpbnError


def main() -> None:
    parser = ArgumentParser(prog="train_pytorch.py", description=__doc__)
    parser.add_argument("--epochs", type=integer(1), default=10, metavar="N")
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N")
    parser.add_argument("--threads", type=integer(1), metavar="N")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    started = time.perf_counter()
    try:
        import torch
    except ModuleNotFoundError:
        raise NpbnError("PyTorch is not installed: pip install torch") from None
    from torch import nn

    from _pytorch import lenet

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise NpbnError("this PyTorch finds no GPU")
    torch.manual_seed(arguments.seed)
    dataset = data.load("fashion-mnist")
    batches: Any = partial(torch.split, split_size_or_sections=256)
    images, labels, test_images, test_labels = (
        torch.tensor(array, device=arguments.device)
        for split in (dataset.train, dataset.test)
        for array in (split.images, split.labels)
    )
    model = lenet()
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    model.to(arguments.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    criterion = nn.CrossEntropyLoss()

    def batch(indices: Any) -> tuple[Any, Any]:
        return images[indices].float().div_(255), labels[indices]

    say(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads\n")
    say("epoch    loss  train acc  test acc")
    for epoch in range(1, arguments.epochs + 1):
        model.train()
        loss_sum, correct = 0.0, 0
        for indices in batches(torch.randperm(len(images), device=arguments.device)):
            x, y = batch(indices)
            logits = model(x)
            loss = criterion(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach() * len(y)
            correct += (logits.argmax(dim=1) == y).sum()
        model.eval()
        with torch.inference_mode():
            right: Any = 0
            for x, y in zip(batches(test_images), batches(test_labels), strict=True):
                right += (model(x.float().div_(255)).argmax(dim=1) == y).sum()
        train, test = float(correct) / len(images), float(right) / len(test_images)
        say(f"{epoch:5}  {float(loss_sum) / len(images):.4f}     {train:.4f}    {test:.4f}")
    say(f"\n{time.perf_counter() - started:.1f} s in all")


if __name__ == "__main__":
    run("train_pytorch.py", main)
