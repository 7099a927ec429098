"""What `populations` compares: each arm and each average of LoRAs, with its cost in passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flatlora_diffusion.compare.arms import parse_arm
from flatlora_diffusion.config import TINY, TINY_KLEIN

STEPS, BATCH = 300, 2  # of the shared settings


@dataclass(frozen=True)
class Subject:
    """An arm's run, or the average of several LoRAs of a group.

    `checkpoints` are steps of each run, None for its end. More than one LoRA are averaged where `is_average`, else
    each is a row of its own; the average is cut to `rank` and its members, before, to `member_rank`. `reference` is
    what it is compared with. With `branch_at` all members but the first go on, with seeds of their own, from the first
    member's LoRA at that step. SAM ascends in every `sam_every`-th step from step `sam_from` on. It is trained on the
    first `images` alone, where that is given. With `own_rise` SAM has an eps for each image, by which the loss of that
    image rises by this share to first order.
    """

    name: str
    arm: str = "lora"
    members: tuple[int, ...] = (0,)
    checkpoints: tuple[int | None, ...] = (None,)
    is_average: bool = False
    rank: int | None = None
    member_rank: int | None = None
    branch_at: int = 0
    strengths: tuple[float, ...] = (1.0,)
    sam_every: int = 1
    sam_from: int = 0
    images: int | None = None
    own_rise: float | None = None
    reference: str = "lora"

    @property
    def folder(self) -> str:
        """Below the work folder; runs that are trained in a way of their own lie apart."""
        every = self.sam_every if self.sam_every > 1 else 0
        ways = {"every": every, "from": self.sam_from, "images": self.images, "rise": self.own_rise}
        return "-".join(["runs", *(f"{way}-{value}" for way, value in ways.items() if value)])

    @property
    def passes(self) -> float:
        """Forward and backward passes of samples, in those of one LoRA; a step of SAM's with an ascent has two."""
        arm = parse_arm(self.arm)
        batch = int(arm.changes.get("train_batch_size", BATCH)) * int(
            arm.changes.get("gradient_accumulation_steps", 1)
        )
        steps = int(arm.changes.get("max_train_steps", STEPS)) * batch
        a_step = 1 + (arm.method == "sam") / self.sam_every * (1 - self.sam_from / STEPS)
        last = max((step for step in self.checkpoints if step is not None), default=STEPS)
        share = 1.0 if None in self.checkpoints else last / STEPS
        runs = 1 + (len(self.members) - 1) * (1 - self.branch_at / STEPS) if self.is_average else 1
        return steps * a_step * share * runs / (STEPS * BATCH)

    def describe(self) -> dict[str, Any]:
        """What the JSON says of it."""
        return {
            "arm": self.arm,
            "members": list(self.members),
            "checkpoints": ["end" if step is None else step for step in self.checkpoints],
            "is_average": self.is_average,
            "rank": self.rank,
            "member_rank": self.member_rank,
            "branch_at": self.branch_at,
            "sam_every": self.sam_every,
            "sam_from": self.sam_from,
            "images": self.images,
            "own_rise": self.own_rise,
            "reference": self.reference,
            "passes": round(self.passes, 2),
        }


_WEAKENED = (0.7, 1.0)  # of what forgets more than the reference, or is one


def _average(name: str, **settings: Any) -> Subject:
    return Subject(name, is_average=True, **{"members": (0, 1, 2)} | settings)


_FLAT = "flat-lora:sigma=0.4,sigma_schedule=constant"
_TUNED = "learning_rate=0.00042,lora_dropout=0.17,adam_weight_decay=0.22,sigma=0.69,sigma_schedule=down"
_DEMO = "lora:lora_target_modules=conv,rank=16,max_train_steps=150,train_batch_size=4,learning_rate=0.001"
_BY_IMAGE = "sam:rho=0.125,train_batch_size=1,gradient_accumulation_steps=2"
_ALL = [
    Subject("lora", members=(0, 1, 2), strengths=_WEAKENED),
    _average("average of 3", strengths=(0.7, 1.0, 1.3)),
    _average("average of 3, rank 4", rank=4),
    _average("average of 3, rank 1", rank=1),
    _average("average of 3, each cut to rank 1", member_rank=1),
    _average("average of 3, cut to rank 3", rank=3),
    _average("average of 2", members=(0, 1)),
    _average("average of 4", members=(0, 1, 2, 3)),
    _average("average of 6", members=(0, 1, 2, 3, 4, 5)),
    _average("3 branches from step 150", branch_at=150),
    _average("average of 3, 150 steps", checkpoints=(150,)),
    _average("average along a run", members=(0,), checkpoints=(150, 200, 250, None)),
    Subject("200 steps", checkpoints=(200,)),
    Subject("half the rate", "lora:learning_rate=0.00025"),
    Subject("cosine rate", "lora:lr_scheduler=cosine,lr_warmup_steps=0"),
    Subject("EMA 0.99", "lora:use_ema=true,ema_decay=0.99"),
    Subject("early stopping", "lora:holdout_images=3,holdout_patience=3"),
    Subject("10 images: LoRA", members=(0, 1, 2), images=10, strengths=_WEAKENED),
    _average("10 images: average of 3", images=10, reference="10 images: LoRA"),
    Subject("input noise 0.1", "lora:ip_noise_gamma=0.1", strengths=_WEAKENED),
    Subject("DoRA", "lora:use_dora=true", strengths=_WEAKENED),
    Subject("rank 12", "lora:rank=12", members=(0, 1, 2), strengths=_WEAKENED),
    _average("average of 3 of rank 12", arm="lora:rank=12", reference="rank 12"),
    Subject("3 x batch", "lora:train_batch_size=6", strengths=_WEAKENED),
    Subject("3 x batch, half the rate", "lora:train_batch_size=6,learning_rate=0.00025", strengths=_WEAKENED),
    Subject("3 x steps, third of the rate", "lora:max_train_steps=900,learning_rate=0.000167", strengths=_WEAKENED),
    Subject(
        "3 x steps, cosine rate", "lora:max_train_steps=900,lr_scheduler=cosine,lr_warmup_steps=0", strengths=_WEAKENED
    ),
    Subject("Flat-LoRA, paper", "flat-lora:perturb_draw=full,perturb_per=step,perturb_norm_every=1"),
    Subject("Flat-LoRA 0.4", _FLAT, strengths=_WEAKENED),
    Subject("Flat-LoRA, tuned", f"flat-lora:{_TUNED}", strengths=_WEAKENED),
    Subject("LoRA, tuned", "lora:learning_rate=0.00052,lora_dropout=0.14,adam_weight_decay=1.2"),
    Subject("SAM, rise 10 %", "sam:rho_rise=0.1", strengths=_WEAKENED),
    Subject("SAM 0.25", "sam:rho=0.25", strengths=_WEAKENED),
    Subject("SAM 0.125", "sam:rho=0.125", strengths=_WEAKENED),
    Subject("SAM 0.125, every 2nd step", "sam:rho=0.125", sam_every=2, strengths=_WEAKENED),
    Subject("SAM 0.125, last 90 steps", "sam:rho=0.125", sam_from=210, strengths=_WEAKENED),
    Subject("SAM, own rho for each image", _BY_IMAGE, own_rise=0.2, strengths=_WEAKENED),
    _average("average of 3 Flat-LoRAs 0.4", arm=_FLAT),
    _average("average of 3 SAMs 0.125", arm="sam:rho=0.125"),
    Subject("demo: LoRA", _DEMO, members=(0, 1, 2), strengths=_WEAKENED),
    _average("demo: average of 3", arm=_DEMO, reference="demo: LoRA"),
]
SUBJECTS = {subject.name: subject for subject in _ALL}
# A rho fits one base, while a rise of the loss means the same on each. 10 % is half of what is like rho 0.25 on tiny.
_KLEIN = ("lora", "average of 3", "Flat-LoRA, paper", "Flat-LoRA 0.4", "SAM, rise 10 %")
SUBJECTS_ON = {TINY: tuple(name for name in SUBJECTS if name != "SAM, rise 10 %"), TINY_KLEIN: _KLEIN}
