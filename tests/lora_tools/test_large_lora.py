"""A large LoRA file is read and written layer by layer, in much less memory than its size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flatlora_diffusion.adapter.delta import LazyLayers, Update
from flatlora_diffusion.lora_files.kohya import kohya_tensors
from flatlora_diffusion.lora_files.names import base_names
from flatlora_diffusion.storage.tensor_io import contents_of, save_stream

RANK = 64
MEASURED = """
import json, resource, sys
from flatlora_diffusion.lora_tools import converting as lora_export
from flatlora_diffusion.lora_tools import inspecting as lora_report
from flatlora_diffusion.lora_tools import resizing as lora_resize
from flatlora_diffusion.commands.command_line import main
assert main(["inspect", sys.argv[1]]) == 0  # what is loaded once: libraries, and the base's layers
main(["inspect", sys.argv[1]])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = main(sys.argv[3:])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
open(sys.argv[2], "w").write(json.dumps([code, (after - before) * 1024]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 64 on the attention of SDXL's UNet, fp16, 184 MB."""
    names = base_names()
    rng = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for module, shape in names.shapes["unet"].items():
        if ".to_" in module:
            name = f"unet.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=rng).half()
            tensors[f"{name}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=rng).half()
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is asked of the system in Linux's unit")
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_exporting_needs_a_fraction_of_the_file_s_size(large: Path, tmp_path: Path, layout: str) -> None:
    small, result = tmp_path / "small.safetensors", tmp_path / "result.json"
    save_file(
        {
            name: value[:1] if "lora_A" in name else value[:, :1].contiguous()
            for name, value in load_file(large).items()
        },
        small,
    )
    arguments = ["export", str(large), "--layout", layout, "--output", str(tmp_path / "out.safetensors")]
    subprocess.run([sys.executable, "-c", MEASURED, str(small), str(result), *arguments], check=True)
    code, grown = json.loads(result.read_text())
    size = large.stat().st_size
    assert (code, size > 150 * 2**20) == (0, True)
    assert grown < size / 3


def test_only_one_layer_is_in_memory_at_a_time() -> None:
    alive: list[str] = []

    class Counted(Tensor):
        def __del__(self) -> None:
            alive.pop()

    def read(module: str) -> Update:
        down = torch.ones(4, 8).as_subclass(Counted)
        alive.append(module)
        assert len(alive) <= 2, "the one before is let go when the next is there"
        return Update(down, torch.ones(8, 4), 1.0)

    modules = [f"mid_block.attentions.0.transformer_blocks.{index}.attn1.to_q" for index in range(5)]
    count = sum(1 for _ in kohya_tensors({"unet": LazyLayers(modules, read)}))
    assert count == 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_streamed_file_equals_that_of_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    modules = ["mid_block.attentions.0.proj_in", "mid_block.resnets.0.conv1", "down_blocks.1.attentions.0.proj_in"]
    updates = {
        "unet": {
            name: Update(torch.randn(4, 8, generator=rng), torch.randn(8, 4, generator=rng), 0.5) for name in modules
        }
    }
    save_file(dict(kohya_tensors(updates, dtype=dtype)), tmp_path / "a.safetensors", metadata={"x": "\u00fc \n"})
    contents = contents_of(kohya_tensors(updates, dtype=dtype))
    save_stream(tmp_path / "b.safetensors", lambda: kohya_tensors(updates, dtype=dtype), contents, {"x": "\u00fc \n"})
    one, other = ((tmp_path / name).read_bytes() for name in ("a.safetensors", "b.safetensors"))
    assert one == other
