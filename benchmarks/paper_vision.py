"""Does Flat-LoRA generalize better on a pretrained vision model? A small ViT, three tasks, corruptions, another style.

    pip install --no-deps --target PACKAGES scikit-learn imagecorruptions opencv-python-headless scikit-image \
        numba llvmlite lazy-loader "setuptools<81"
    python -m benchmarks.paper_vision --packages PACKAGES --work WORK

The encoder has 2.8 million parameters and is pretrained here, on flat icons (`paper_vision_base.py`; 15 minutes, kept
in WORK), with an adapter on its linear layers and a linear head. What is compared and how, `paper_study.py` says; the
images and their licences, `paper_vision_tasks.py`. WORK may be that of `samples.tiny_sdxl.build`, whose renders are
then used; without it, npm and the `recipe` extra make them. The runs are kept in `paper_vision.json` beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import ViTModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.paper_study import parser_of, study
from benchmarks.paper_study_run import Classifier
from benchmarks.paper_vision_base import PictureClassifier, pretrained
from benchmarks.paper_vision_tasks import TASKS, Splits, load_task

RESULT = Path(__file__).with_suffix(".json")
STEPS = 120
RANKS = [8, 16]  # those of the paper's Table 2


class PictureBench:
    """A task, and the folder of the encoder."""

    lr_factor = 2.0  # the best of LoRA's is between 2e-3 and 5e-3 here, and 1.25e-2 breaks it
    targets = r"layers\..*\.(q_proj|k_proj|v_proj|o_proj|fc1|fc2)"

    def __init__(self, splits: Splits, model: Path) -> None:
        self._model = model
        self.train = splits["train"]
        self.tests = {name: one for name, one in splits.items() if name != "train"}
        self._classes = 1 + max(int(one.labels.max()) for one in splits.values())

    def model(self) -> Classifier:
        return PictureClassifier(ViTModel.from_pretrained(self._model, add_pooling_layer=False), self._classes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, TASKS, RESULT, STEPS)
    parser.add_argument("--packages", type=Path, required=True, help="folder that the packages were installed to")
    parser.add_argument("--model", type=Path, help="another encoder, as a folder that transformers reads as a ViT")
    parser.set_defaults(ranks=RANKS)
    options = parser.parse_args(arguments)
    disable_progress_bar()
    torch.set_num_threads(options.threads)
    model = options.model or pretrained(options.work)
    study(options, lambda name: PictureBench(load_task(name, options.packages, options.work), model))


if __name__ == "__main__":
    main()
