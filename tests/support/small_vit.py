"""A small pretrained vision transformer as a folder, and how it is fine-tuned on the built-in digits in a moment."""

import json

import torch

SMALL = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
SMALL |= {"intermediate_size": 32, "initializer_range": 0.2}
WANTED = {"data": "digits", "batch": 6, "steps": 4, "warmup": 0, "blocks": 2, "mem_budget": "4GB"}
WANTED |= {"learning_rate": 1e-2, "micro_batch": 4, "optimizer": "adamw", "weight_decay": 0.0, "hold_out": 0.02}
LORA = {**{name: value for name, value in WANTED.items() if name != "blocks"}, "tune": "lora", "lora_rank": 2}
LORA |= {"precision": "fp32"}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def write_vit(library, folder):
    """A vit without a classifier, whose files have other names than its modules."""
    torch.manual_seed(0)
    library.ViTModel(library.ViTConfig(**SMALL)).save_pretrained(folder)
    processor = {"size": {"height": 8, "width": 8}, "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
