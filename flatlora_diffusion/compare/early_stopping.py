"""Whether a run went on for too long, and which checkpoint and strength to use instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flatlora_diffusion.compare.trajectory import TrajectoryPoint

# What must be gained, as a share of the whole gain over the base, before another checkpoint or strength is suggested.
WORTH = 0.02
# Rise of the similarity to the nearest training image that is called copying when the held-out loss rises with it.
COPYING = 0.02


_NO_GAIN = (
    "No checkpoint predicts the held-out images better than the base does: train fewer steps or with a lower learning "
    "rate, or more of both if nothing was learned."
)
_NO_SIGN = "The held-out loss fell, or stayed, up to the end: no sign of over-fitting."
_NO_CHECKPOINT = "There is no checkpoint to compare the end with, so over-fitting cannot be seen."


@dataclass(frozen=True)
class Advice:
    """Use the LoRA of step `checkpoint` at `strength`."""

    checkpoint: int
    strength: float
    over_fit: bool
    why: str


def advise(run: Sequence[TrajectoryPoint], strengths: Mapping[float, float]) -> Advice:
    """The checkpoint and strength that predict the held-out images best.

    `run` begins with the base (step 0) and ends with the finished LoRA; `strengths` has the held-out loss of the
    finished LoRA at each strength.
    """
    base, last = run[0], run[-1]
    best = min(run[1:], key=lambda point: point.heldout_loss)
    gain = base.heldout_loss - best.heldout_loss
    if gain <= 0:
        return Advice(best.step, 1.0, last.heldout_loss > base.heldout_loss, _NO_GAIN)
    lost = last.heldout_loss - best.heldout_loss
    if lost > WORTH * gain:
        return Advice(best.step, 1.0, True, _over_fit(best, last, lost / gain))
    strength = min(strengths, key=lambda at: strengths[at], default=1.0)
    if strengths and strengths[1.0] - strengths[strength] > WORTH * gain:
        share = (strengths[1.0] - strengths[strength]) / gain
        why = f"No sign of over-fitting; at strength {strength:g} the gain over the base grows by {share:.0%}."
        return Advice(last.step, strength, False, why)
    return Advice(last.step, 1.0, False, _NO_CHECKPOINT if len(run) == 2 else _NO_SIGN)


def _over_fit(best: TrajectoryPoint, last: TrajectoryPoint, share: float) -> str:
    why = f"From step {best.step} to {last.step} the held-out loss rose again: {share:.0%} of what was gained is lost"
    if best.memorization is not None and last.memorization is not None:
        more = last.memorization - best.memorization
        why += f", and images came {'closer' if more > 0 else 'no closer'} to training images ({more:+.3f})"
        if more > COPYING:
            why += ", which is copying"
    if last.drift is not None and best.drift is not None:
        why += f"; pictures of other prompts changed by {last.drift:.4f}, at step {best.step} by {best.drift:.4f}"
    return why + "."
