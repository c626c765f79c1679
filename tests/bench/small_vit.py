"""A small ViT of transformers, trained on Fashion-MNIST by an ordinary loop, as a folder to fine-tune.

python tests/bench/fashion_mnist.py fashion.npz
python tests/bench/small_vit.py fashion.npz small-vit
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification, set_seed

BATCH, STEPS, RATE = 64, 2000, 2e-3
NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def main() -> None:
    data, out = dict(np.load(sys.argv[1])), Path(sys.argv[2])
    pixels, labels = data["x_train"], data["y_train"].astype(np.int64)
    torch.set_num_threads(1)
    set_seed(0)
    shape = {"image_size": 28, "patch_size": 4, "num_channels": 1, "hidden_size": 64, "intermediate_size": 256}
    config = ViTConfig(**shape, num_hidden_layers=6, num_attention_heads=4, id2label=dict(enumerate(NAMES)))
    network = ViTForImageClassification(config).train()
    ViTForImageClassification(config).save_pretrained(out.with_name(f"{out.name}-random"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    started, rng = time.perf_counter(), np.random.default_rng(0)
    for _ in range(STEPS):
        chosen = rng.integers(0, len(pixels), BATCH)
        loss = network(pixel_values=normalised(pixels[chosen]), labels=torch.from_numpy(labels[chosen])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    network.save_pretrained(out)
    right = accuracy(network.eval(), data["x_test"], data["y_test"])
    print(f"{STEPS} steps in {time.perf_counter() - started:.0f} s; right in {right:.1%} of the test pictures")


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """As a ViT takes them."""
    return torch.from_numpy(pixels).unsqueeze(1).float() / 255 / 0.5 - 1


@torch.no_grad()
def accuracy(network: torch.nn.Module, pixels: np.ndarray, labels: np.ndarray) -> float:
    """The share whose likeliest class is the right one."""
    parts = [network(pixel_values=normalised(part)).logits.argmax(-1) for part in np.array_split(pixels, 40)]
    return float((torch.cat(parts).numpy() == labels).mean())


if __name__ == "__main__":
    main()
