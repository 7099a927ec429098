"""CLIP ViT-B/32 on image classification as in Table 2 of Flat-LoRA's paper (arXiv:2409.14396): test accuracy.

    python -m examples.clip_images                                                    # CIFAR-100, Flat-LoRA
    python -m examples.clip_images --sigma 0                                          # plain LoRA, all else alike
    python -m examples.clip_images --data uoft-cs/cifar10 --image img --label label

From the paper: rank 8 (or 16), a frozen head made of the classes' names, 224 pixels, 5e-4 with a cosine, 10 epochs,
weight decay 0.1, sigma 0.15 with its ramp. It names no batch size: 64 is ours, as are alpha 16 and the layers, all
linear ones of the image tower. `--data FOLDER` takes `train/CLASS/*.png` and `test/CLASS/*.png`, with `--image image`
and `--label label`; corrupted images in `test/` give the accuracy of Figure 4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import tyro
from datasets import load_dataset
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoProcessor, CLIPModel, Trainer, TrainingArguments, set_seed

from flatlora_diffusion import FlatLoraCallback


class Classifier(nn.Module):
    """CLIP's image tower with LoRA, and the texts of the classes as its head."""

    def __init__(self, clip: CLIPModel, processor: Any, names: list[str], rank: int) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(False)
        texts = processor.tokenizer([f"a photo of a {name}." for name in names], padding=True, return_tensors="pt")
        with torch.no_grad():
            self.register_buffer("head", F.normalize(clip.text_projection(clip.text_model(**texts).pooler_output)))
        config = LoraConfig(r=rank, lora_alpha=16, target_modules=r".*encoder.*\.(q_proj|k_proj|v_proj|out_proj|fc\d)")
        inject_adapter_in_model(config, clip.vision_model)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        features = self.clip.visual_projection(self.clip.vision_model(pixel_values).pooler_output)
        logits = self.clip.logit_scale.exp() * F.normalize(features) @ self.head.mT
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def main(  # noqa: PLR0913 (each is a setting of the command line)
    model: str = "openai/clip-vit-base-patch32",
    data: str = "uoft-cs/cifar100",
    image: str = "img",
    label: str = "fine_label",
    output_dir: str = "outputs/clip_images",
    sigma: float = 0.15,
    rank: int = 8,
    seed: int = 0,
    max_steps: int = -1,
) -> float:
    """Train, keep the LoRA in `output_dir`, and return the accuracy."""
    set_seed(seed)
    splits, processor = load_dataset(data), AutoProcessor.from_pretrained(model)
    names = [name.replace("_", " ") for name in splits["train"].features[label].names]
    classifier = Classifier(CLIPModel.from_pretrained(model), processor, names, rank)

    def as_batch(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        pictures = processor.image_processor([row[image].convert("RGB") for row in rows], return_tensors="pt")
        return {**pictures, "labels": torch.tensor([row[label] for row in rows])}

    trainer = Trainer(
        classifier,
        TrainingArguments(
            output_dir=output_dir,
            learning_rate=5e-4,
            lr_scheduler_type="cosine",
            weight_decay=0.1,
            num_train_epochs=10,
            max_steps=max_steps,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=256,
            remove_unused_columns=False,
            label_names=["labels"],
            save_strategy="no",
            report_to="none",
            seed=seed,
        ),
        data_collator=as_batch,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        compute_metrics=lambda seen: {"accuracy": float(np.mean(seen.predictions.argmax(1) == seen.label_ids))},
        callbacks=[FlatLoraCallback(sigma=sigma, draw="full")],
    )
    trainer.train()
    save_file(get_peft_model_state_dict(classifier.clip.vision_model), f"{output_dir}/lora.safetensors")
    return float(trainer.evaluate()["eval_accuracy"])


if __name__ == "__main__":
    print(f"accuracy {tyro.cli(main):.4f}")
