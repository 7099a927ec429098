"""The vision transformer of `paper_vision`, pretrained on flat drawings alone: which words does a thing go by?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from benchmarks.paper_study_run import Classifier
from flatlora_diffusion.ground.seeds import generator
from samples.tiny_sdxl.build import flat_images
from samples.tiny_sdxl.recipe.icons import load_concepts
from samples.tiny_sdxl.recipe.judge import STYLES, can_mirror, collect_renders
from samples.tiny_sdxl.recipe.loop import Schedule, train
from samples.tiny_sdxl.recipe.second_judge import augment
from samples.tiny_sdxl.recipe.vae import to_pixels

if TYPE_CHECKING:
    from samples.tiny_sdxl.recipe.icons import Concept

SCHEDULE = Schedule(steps=3000, learning_rate=1e-3, warmup=100, weight_decay=0.05, ema=0.99)
BATCH = 64
LEAST = 4  # things that a word is said of, to be learned
CONFIG = ViTConfig(
    image_size=64, patch_size=16, hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6
)  # 2.8 M parameters


class PictureClassifier(Classifier):
    """The mean of an encoder's last states, and a linear head."""

    def __init__(self, encoder: ViTModel, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        scores: Tensor = self.head(self.encoder(pixels).last_hidden_state.mean(1))
        return scores


def pretrained(work: Path, schedule: Schedule = SCHEDULE) -> Path:
    """The folder of the pretrained encoder in `work`; a killed training goes on where it was."""
    folder = work / "vision" / "vit"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        concepts = load_concepts(work)
        renders = collect_renders(concepts, flat_images(concepts, work))
        renders = renders.take((renders.styles != STYLES.index("fluent-3d")).nonzero().flatten())
        targets = word_targets([_words(concept) for concept in concepts])
        may_mirror = torch.tensor([can_mirror(concept) for concept in concepts])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = PictureClassifier(ViTModel(CONFIG, add_pooling_layer=False), targets.shape[1])

        def loss_at(step: int) -> Tensor:
            rng = generator("cpu", 0, "paper_vision pretraining", step)
            batch = renders.take(torch.randint(0, len(renders.concepts), (BATCH,), generator=rng))
            pixels = augment(to_pixels(batch.images), may_mirror[batch.concepts], rng)
            return F.cross_entropy(model(pixels), targets[batch.concepts])

        train(model.train(), loss_at, schedule, folder.parent / "vit.safetensors")
        model.encoder.save_pretrained(folder)
    return folder


def word_targets(words_of: Sequence[set[str]]) -> Tensor:
    """(things, words): what share of a thing's words each is; rare words are left out, and a last one is for none."""
    counts = Counter(word for words in words_of for word in words)
    known = {word: place for place, word in enumerate(sorted(word for word in counts if counts[word] >= LEAST))}
    targets = torch.zeros(len(words_of), len(known) + 1)
    for thing, words in enumerate(words_of):
        places = [known[word] for word in words if word in known] or [len(known)]
        targets[thing, places] = 1 / len(places)
    return targets


def _words(concept: Concept) -> set[str]:
    """Of its name and tags."""
    text = " ".join([concept.name, *concept.tags])
    return {word for word in "".join(letter if letter.isalnum() else " " for letter in text).split() if len(word) > 1}
