"""Is there a faster generator for full draws on a CPU? `python -m benchmarks.cpu_draws`

Normal numbers for the eps of one 1280 x 1280 layer, by PyTorch's generator on one thread and by what could be faster:
two streams on two threads, numpy's ziggurat, a table of 65,536 quantiles looked up by random bits, and sums of random
bytes, which are nearly normal (Irwin-Hall; GaussWS makes its noise of bits too). They take turns; a ratio is that of
a turn. `excess kurtosis` is 0 for normal numbers. Writes benchmarks/cpu_draws.json.
"""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
from torch import Tensor

from benchmarks import record
from benchmarks.turns import Step, ratio_quartiles, timed

SHAPE = (1280, 1280)
TURNS = 60
BYTES = 4  # of a sum
PLAIN = "PyTorch, one stream"


def main() -> None:
    torch.set_num_threads(1)
    eps = torch.empty(SHAPE)
    with ThreadPoolExecutor(2) as pool:
        draws = generators(eps, pool)
        seconds: dict[str, list[float]] = {name: [] for name in draws}
        for turn in range(TURNS):
            for name, draw in draws.items():
                seconds[name].append(timed(draw, turn))
        kurtoses = {name: _kurtosis_after(draw, eps) for name, draw in draws.items()}
    figures = {}
    for name, own in seconds.items():
        median, ratio, kurtosis = statistics.median(own), ratio_quartiles(own, seconds[PLAIN]), kurtoses[name]
        figures[name] = {"seconds": median, "ratio": ratio, "excess_kurtosis": kurtosis}
        print(f"{name:30} {1e3 * median:7.2f} ms {ratio[1]:7.3f} {kurtosis:+.3f}")
    record.save(Path(__file__).with_suffix(".json"), {"draws": figures})


def generators(eps: Tensor, pool: ThreadPoolExecutor) -> dict[str, Step]:
    """What fills `eps` with numbers of mean 0 and variance 1, from a seed, by name."""
    halves, rngs = eps.chunk(2), [torch.Generator(), torch.Generator()]
    table = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16).float()
    table /= table.std(correction=0)
    spread = (BYTES * (2**16 - 1) / 12) ** 0.5  # of a sum of uniform bytes

    def one_stream(seed: int) -> float:
        eps.normal_(generator=rngs[0].manual_seed(seed))
        return 0.0

    def two_streams(seed: int) -> float:
        list(pool.map(lambda half, rng: half.normal_(generator=rng.manual_seed(seed)), halves, rngs))
        return 0.0

    def ziggurat(seed: int) -> float:
        numpy.random.Generator(numpy.random.SFC64(seed)).standard_normal(out=eps.numpy(), dtype=numpy.float32)
        return 0.0

    def looked_up(seed: int) -> float:
        bits = numpy.random.SFC64(seed).random_raw(eps.numel() // 4).view(numpy.uint16)
        numpy.take(table.numpy(), bits.reshape(SHAPE), out=eps.numpy())
        return 0.0

    def sums(seed: int) -> float:
        bits = numpy.random.SFC64(seed).random_raw(eps.numel() * BYTES // 8)
        bytes_ = torch.from_numpy(bits.view(numpy.uint8)).view(BYTES, *SHAPE)
        torch.sum(bytes_, dim=0, dtype=torch.float32, out=eps)
        eps.sub_(BYTES * 255 / 2).div_(spread)
        return 0.0

    return {
        PLAIN: one_stream,
        "PyTorch, two streams": two_streams,
        "numpy, ziggurat": ziggurat,
        "table of quantiles": looked_up,
        f"sums of {BYTES} bytes": sums,
    }


def _kurtosis_after(draw: Step, eps: Tensor) -> float:
    draw(0)
    torch.testing.assert_close(torch.stack([eps.mean(), eps.var()]), torch.tensor([0.0, 1.0]), atol=0.01, rtol=0)
    return float(eps.double().pow(4).mean() / eps.double().square().mean().square() - 3)


if __name__ == "__main__":
    main()
