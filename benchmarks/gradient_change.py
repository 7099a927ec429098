"""What does a perturbation of W do to a step's gradient? `python -m benchmarks.gradient_change --work FOLDER`

The tiny base, the 3D icons, a plain LoRA of rank 4 on the attention layers. At eight of its steps, from step 150 on,
the gradient of A and B is taken at W and at W + eps, with the same images, noise and timesteps:

    change = gradient at W + eps - gradient at W

A change is compared with that of SAM over W, eps = rho G / ||G||, G the slope dL/dW of the step's own batch. rho is
what `--rho_rise 0.25` finds before the first step, and half of it. For eps of that length: sketches of G of low rank,
G of the up blocks alone, slopes of earlier steps and of other images, random noise, and, in a training by Bi-LoRA, its
second LoRA. For Flat-LoRA's own noise, which is longer, also what the changes of many draws have in common. And how
alike the slopes of images and of batches are.

A seed that is measured is kept in FOLDER, so the command goes on after a stop. Writes benchmarks/gradient_change.json,
of which `python -m benchmarks.gradient_change_page` makes docs/why.md; some twelve minutes of a core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.populations import SETTINGS as OF_POPULATIONS
from flatlora_diffusion import FlatLora
from flatlora_diffusion.config import SAMPLES, TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.method.gradient import MicroBatch, StepGradient
from flatlora_diffusion.method.layers import AdaptedLayer
from flatlora_diffusion.method.noise import apply_layer
from flatlora_diffusion.method.rivals.weight_gradients import WeightGradientHook, WeightGradients
from flatlora_diffusion.sdxl.objective import Batch, diffusion_loss
from flatlora_diffusion.storage.atomic_io import write_json
from flatlora_diffusion.storage.hashing import DrawHash
from flatlora_diffusion.storage.rng import derive_seed, generator
from flatlora_diffusion.training.first_weights import first_weights
from flatlora_diffusion.training.micro_batches import DrawnMicroBatch, micro_batches
from flatlora_diffusion.training.state import TrainState, prepare, put_away
from flatlora_diffusion.training.trainer import train_step

SEEDS = 5
SETTINGS: dict[str, Any] = {
    **{name: value for name, value in OF_POPULATIONS.items() if not name.startswith("perturb_")},
    "instance_data_dir": str(SAMPLES / "icons_3d"),
    "method": "sam",  # for its rho alone: what is trained is a plain LoRA
    "rho_rise": 0.25,
}
FIRST, APART, STEPS = 150, 4, 8  # the steps that are measured: 150, 154, ...
SHARES_OF_RHO = (1.0, 0.5)
RANKS = (1, 4, 8)
EARLIER, DECAY = 4, 0.9
SIGMAS = (0.05, 0.1, 0.2, 0.4)
DRAWS = {"low_rank": 12, "full": 2}
IMAGES, TIMES = 8, (0.125, 0.375, 0.625, 0.875)  # of all timesteps

Direction = list[Tensor]
"""A step in W: a tensor of the shape of W for each adapted layer."""
Plan = Mapping[str, Any]
"""`first` and `steps` to measure, `images` and `draws`: fewer of them in tests."""
PLAN: Plan = {"first": FIRST, "steps": STEPS, "images": IMAGES, "draws": DRAWS}


class Probe(WeightGradientHook, StepGradient):
    """Plain LoRA which keeps the slopes of its last steps and their momentum, and takes gradients at W + eps."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        super().__init__(models)
        self.earlier: deque[Direction] = deque(maxlen=EARLIER)
        self.momentum: Direction = []
        self._eps: dict[AdaptedLayer, Tensor] = {}

    def compute(self, step: int, micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
        losses: list[Tensor] = []

        def backward() -> None:
            losses.extend(one.backward() for one in micro_batches)

        slope = self.slope(backward)
        self.earlier.append(slope)
        self.momentum = total([*([scaled(self.momentum, DECAY)] if self.momentum else []), slope])
        return losses

    def slope(self, backward: Callable[[], Any]) -> Direction:
        """dL/dW of all that `backward` computes."""
        with self.recording(WeightGradients()) as slopes:
            backward()
        return [slopes[layer] for layer in self.layers]

    @contextmanager
    def moved(self, eps: Direction) -> Iterator[None]:
        """W + eps in place of W while this is open."""
        self._eps = dict(zip(self.layers, eps, strict=True))
        try:
            yield
        finally:
            self._eps = {}

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The layers are free for another one to attach to while this is open."""
        self.detach()
        try:
            yield
        finally:
            for layer in self.layers:
                layer.base_hook.attach(partial(self._base_forward, layer))

    def _base_forward(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = super()._base_forward(layer, x, *args, **kwargs)
        return output + apply_layer(x, self._eps[layer], None, layer.convolution) if layer in self._eps else output


def main(argv: Sequence[str] | None = None, settings: Mapping[str, Any] = SETTINGS, plan: Plan = PLAN) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the seeds that are measured")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    kept = {name: value for name, value in settings.items() if not name.endswith("_dir")}
    about = json.loads(
        json.dumps({"settings": kept, "plan": {**plan, "apart": APART}, "images": len(images(settings))})
    )
    found, of_bi_loras = [], []
    for seed in range(args.seeds):
        own = measured_once(args.work / f"seed-{seed}.json", about, partial(of_seed, seed, settings, plan))
        again = partial(of_bi_lora, seed, settings, plan, own["rho"])
        found.append(own)
        of_bi_loras.append(measured_once(args.work / f"bi-lora-{seed}.json", about, again))
        print(f"seed {seed} is measured", flush=True)
    record.save(args.out, {**about, "seeds": found, "bi-lora": of_bi_loras})


def measured_once(file: Path, about: Any, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` finds, or has found for the same settings before."""
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if kept.get("about") != about:
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = {"about": about, "found": measure()}
        write_json(file, kept)
    found: dict[str, Any] = kept["found"]
    return found


def images(settings: Mapping[str, Any]) -> list[Any]:
    return load_samples(Path(settings["instance_data_dir"])).samples


def of_seed(seed: int, settings: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Train a LoRA and measure at its steps on the way."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.from_dict({**settings, "seed": seed, "output_dir": folder})
        state = prepare(config, images(settings))
        first_weights(state)
        rho = state.config.perturb.rho
        assert rho is not None
        state.gradient.detach()
        state.progress.gradient = probe = Probe([state.sdxl.unet])
        at = range(plan["first"], plan["first"] + plan["steps"] * APART, APART)
        rows, alike = [], {}
        for step in range(at[-1] + 1):
            if step == at[0]:
                alike = cosines_of_slopes(state, probe, step, plan["images"])
            if step in at:
                rows.append({"step": step, **of_step(state, probe, step, rho, plan["draws"])})
            train_step(state, step)
        put_away(state)
    return {"seed": seed, "rho": rho, "alike": alike, "steps": rows}


def of_bi_lora(seed: int, settings: Mapping[str, Any], plan: Plan, rho: float) -> dict[str, Any]:
    """Train by Bi-LoRA; what its second LoRA, brought to length rho, does to the gradients of the next steps."""
    first = plan["first"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        changed = {"method": "bi-lora", "rho": rho, "rho_rise": None, "seed": seed, "output_dir": folder}
        state = prepare(TrainConfig.from_dict({**settings, **changed}), images(settings))
        for step in range(first):
            train_step(state, step)
        factors, _ = state.gradient.state()
        state.gradient.detach()
        state.progress.gradient = probe = Probe([state.sdxl.unet])
        second = [
            layer.scale * (factors[f"parameter.{2 * place + 1}"] @ factors[f"parameter.{2 * place}"]).view(layer.shape)
            for place, layer in enumerate(probe.layers)
        ]
        for step in range(first, first + plan["steps"] * APART, APART):
            (batch,) = micro_batches(state, step, DrawHash())
            plain, slope = gradient(state, batch), probe.slope(batch.backward)
            sam, own = (change_along(state, probe, batch, one, rho, plain) for one in (slope, second))
            rows.append({"step": step, "slopes": cosine(joined(slope), joined(second)), **against(own, sam, plain)})
        put_away(state)
    return {"seed": seed, "length": length(second) / rho, "steps": rows}


def of_step(state: TrainState, probe: Probe, step: int, rho: float, draws: Mapping[str, int]) -> dict[str, Any]:
    """What each eps does to the gradient of `step`; nothing is trained."""
    (batch,) = micro_batches(state, step, DrawHash())
    losses: list[Tensor] = []
    slope = probe.slope(lambda: losses.append(batch.backward()))
    plain = gradient(state, batch)
    directions = {"SAM": slope, **other_directions(state, probe, step, slope)}
    changes: dict[float, dict[str, Tensor]] = {}
    for share in SHARES_OF_RHO:
        changes[share] = {}
        for name, direction in directions.items():
            changes[share][name] = change_along(state, probe, batch, direction, share * rho, plain)
    with probe.aside():
        noise = {
            draw: of_noise(state, batch, draw, count, plain, changes[1.0]["SAM"], rho) for draw, count in draws.items()
        }
    return {
        "rise": rho * length(slope) / float(losses[0]),
        "slopes": {name: cosine(joined(slope), joined(one)) for name, one in directions.items()},
        "eps": {
            f"{share:g}": {name: against(change, of_share["SAM"], plain) for name, change in of_share.items()}
            for share, of_share in changes.items()
        },
        "noise": noise,
    }


def change_along(
    state: TrainState, probe: Probe, batch: DrawnMicroBatch, direction: Direction, radius: float, plain: Tensor
) -> Tensor:
    """What a step of length `radius` along `direction` does to the gradient of `batch`, which is `plain` at W."""
    with probe.moved(scaled(direction, radius / length(direction))):
        return gradient(state, batch) - plain


def other_directions(state: TrainState, probe: Probe, step: int, slope: Direction) -> dict[str, Direction]:
    """Along which to step in place of the slope."""
    later = others(state, step)
    return {
        **{f"rank {rank}": sketch(slope, rank, derive_seed(state.batches.seed, "sketch", step)) for rank in RANKS},
        "up blocks": [
            one if layer.name.startswith("up_blocks") else torch.zeros_like(one)
            for layer, one in zip(probe.layers, slope, strict=True)
        ],
        "other images": probe.slope(later.backward),
        "previous step": probe.earlier[-1],
        f"mean of {EARLIER} earlier": total(probe.earlier),
        "momentum": probe.momentum,
    }


def others(state: TrainState, step: int) -> DrawnMicroBatch:
    """The next batch that shares no image with that of `step`."""
    now, later = image_ids(state, step), step + 1
    while set(now) & set(image_ids(state, later)):
        later += 1
    (batch,) = micro_batches(state, later, DrawHash())
    return batch


def image_ids(state: TrainState, step: int) -> list[Any]:
    return [sample.id for sample in state.batches.samples_at(step, 0)]


def sketch(slope: Direction, rank: int, seed: int) -> Direction:
    """Q Q^T G of each layer's slope G (m, n), with Q = orth(G P) and P (n, rank) of N(0, 1) drawn from `seed`."""
    found = []
    for place, whole in enumerate(slope):
        matrix = whole.flatten(1)
        drawn = torch.randn(matrix.shape[1], rank, generator=generator("cpu", seed, place)).to(matrix)
        basis = torch.linalg.qr(matrix @ drawn).Q
        found.append((basis @ (basis.mT @ matrix)).view_as(whole))
    return found


def of_noise(
    state: TrainState, batch: DrawnMicroBatch, draw: Any, count: int, plain: Tensor, sam: Tensor, rho: float
) -> dict[str, Any]:
    """What Flat-LoRA's noise does by sigma, `count` draws each, and noise that is as long as SAM's eps."""
    flat = FlatLora(state.sdxl.unet, schedule="constant", seed=state.batches.seed, draw=draw)
    # E||eps||^2 = sigma^2 ||W'||^2, of which a draw differs by about a hundredth
    of_one = float(torch.cat([flat.filter_norms(name) for name in flat.layers]).norm())
    found = {}
    for name, sigma in {"of SAM's length": rho / of_one, **{f"{sigma:g}": sigma for sigma in SIGMAS}}.items():
        several = []
        for number in range(count):
            with flat.perturb(batch.step, number, sigma):
                several.append(gradient(state, batch) - plain)
        found[name] = {"sigma": sigma, "eps": sigma * of_one / rho, **of_draws(torch.stack(several), plain, sam)}
    flat.detach()
    return found


def of_draws(changes: Tensor, plain: Tensor, sam: Tensor) -> dict[str, float]:
    """What one of the `changes` (K, P) is like in the mean, and what all have in common.

    `common` is the mean product of two over the mean square of one: the share of a change's energy that is the same in
    all draws, without bias. `halves` is the cosine of the means of both halves.
    """
    each = [against(change, sam, plain) for change in changes]
    found = {key: sum(one[key] for one in each) / len(each) for key in each[0]}
    products = changes @ changes.mT
    count, own = len(changes), float(products.diagonal().mean())
    common = float(products.sum() - products.diagonal().sum()) / (count * (count - 1))
    mean = changes.mean(dim=0)
    halves = [half.mean(dim=0) for half in changes.chunk(2)]
    return {
        **found,
        "kept": sum(cosine(plain + change, plain) for change in changes) / count,
        "common": common / own,
        "halves": cosine(*halves),
        "mean length": float(mean.norm()) / own**0.5,
        "mean to SAM": cosine(mean, sam),
        "mean to gradient": cosine(mean, plain),
    }


def against(change: Tensor, sam: Tensor, plain: Tensor) -> dict[str, float]:
    """A change beside that of SAM, and beside the gradient at W."""
    return {
        "cosine": cosine(change, sam),
        "of SAM": float(change.norm() / sam.norm()),
        "of gradient": float(change.norm() / plain.norm()),
        "to gradient": cosine(change, plain),
    }


def gradient(state: TrainState, batch: DrawnMicroBatch) -> Tensor:
    """That of A and B of all layers as one vector; the parameters keep none."""
    state.optimizer.zero_grad(set_to_none=True)
    batch.backward()
    parts = [one.grad.flatten() for one in state.trainable.values() if one.grad is not None]
    state.optimizer.zero_grad(set_to_none=True)
    return torch.cat(parts).double()


def cosines_of_slopes(state: TrainState, probe: Probe, step: int, count: int) -> dict[str, float]:
    """The mean cosine of two slopes at the weights before `step`: of images, of timesteps, of noise, of batches.

    `count` images, each the first of its batch, under one noise at four timesteps, and under another noise
    at the second of them.
    """
    batches = unlike_batches(state, step, count)
    times = [int(share * state.objective.scheduler.config.num_train_timesteps) for share in TIMES]
    drawn = [one.loss.args for one in batches]  # type: ignore[attr-defined]
    firsts = [args[1].mapped(lambda part: part[:1]) for args in drawn]
    noises = [args[2][:1] for args in drawn]

    def slope(batch: Batch, noise: Tensor, time: int) -> Tensor:
        at = torch.tensor([time], device=noise.device)
        return joined(probe.slope(lambda: diffusion_loss(state.model, state.objective, batch, noise, at).backward()))

    by_time = torch.stack([torch.stack([slope(one, noises[0], time) for time in times]) for one in firsts])
    again = torch.stack([slope(one, noises[1 + place % (count - 1)], times[1]) for place, one in enumerate(firsts)])
    of_batches = torch.stack([joined(probe.slope(one.backward)) for one in batches])
    state.optimizer.zero_grad(set_to_none=True)
    return {
        "images, all else alike": sum(mean_cosine(of_time) for of_time in by_time.unbind(1)) / len(times),
        "timesteps of an image": sum(mean_cosine(of_image) for of_image in by_time) / count,
        "noises of an image": sum(map(cosine, again, by_time[:, 1])) / count,
        "batches": mean_cosine(of_batches),
    }


def unlike_batches(state: TrainState, step: int, count: int) -> list[DrawnMicroBatch]:
    """The next `count` batches in a row that share no image."""
    while True:
        chosen = range(step, step + count)
        ids = [own for one in chosen for own in image_ids(state, one)]
        if len(ids) == len(set(ids)):
            return [batch for one in chosen for batch in micro_batches(state, one, DrawHash())]
        step += 1


def mean_cosine(rows: Tensor) -> float:
    """Of all pairs of two rows."""
    unit = rows / rows.norm(dim=1, keepdim=True)
    count = len(rows)
    return float(unit.sum(dim=0).square().sum() - count) / (count * (count - 1))


def cosine(one: Tensor, other: Tensor) -> float:
    one, other = one.double(), other.double()
    return float(one @ other / (one.norm() * other.norm()))


def joined(direction: Direction) -> Tensor:
    return torch.cat([one.flatten() for one in direction])


def length(direction: Direction) -> float:
    return float(joined(direction).norm())


def scaled(direction: Direction, factor: float) -> Direction:
    return [factor * one for one in direction]


def total(directions: Iterable[Direction]) -> Direction:
    return [torch.stack(parts).sum(dim=0) for parts in zip(*directions, strict=True)]


if __name__ == "__main__":
    main()
