"""Valid paths of a base, a VAE and a LoRA; pickles are an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flatlora_diffusion.config import INCLUDED_BASES, TINY, TINY_KLEIN, ConfigError
from flatlora_diffusion.storage.model_paths import PICKLES, available_bases, check_base, check_lora, check_vae

CHECKS: dict[str, Callable[[str, str], None]] = {"base": check_base, "vae": check_vae, "lora": check_lora}


@pytest.mark.parametrize("ending", [*PICKLES, ".CKPT", ""])
@pytest.mark.parametrize("kind", CHECKS)
def test_a_file_of_another_format_is_an_error_whether_it_exists_or_not(tmp_path: Path, kind: str, ending: str) -> None:
    file = tmp_path / f"model{ending}"
    for is_there in (False, True):
        if is_there:
            file.touch()
        with pytest.raises(ConfigError, match=f"{kind}="):
            CHECKS[kind](kind, str(file))


def test_existing_models_of_each_kind_are_accepted(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "MODEL.SAFETENSORS"
    file.touch()
    for name in ("tiny", str(base), "owner/name", str(file)):
        check_base("base", name)
    for name in (str(base / "vae"), "owner/name"):
        check_vae("vae", name)
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    for name in (str(file), str(tmp_path)):
        check_lora("lora", name)


def test_an_included_base_is_accepted_only_with_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INCLUDED_BASES, TINY_KLEIN, tmp_path)
    with pytest.raises(ConfigError, match="base='tiny_klein'"):
        check_base("base", TINY_KLEIN)
    assert available_bases() == [TINY]
    (tmp_path / "model_index.json").touch()
    check_base("base", TINY_KLEIN)
    assert available_bases() == [TINY, TINY_KLEIN]


@pytest.mark.parametrize("ending", [".bin", ".ckpt"])
def test_pickled_weights_are_an_error_unless_safetensors_are_beside_them(tmp_path: Path, ending: str) -> None:
    (tmp_path / "model_index.json").touch()
    (tmp_path / "unet").mkdir()
    (tmp_path / f"model{ending}").touch()  # beside the parts it is none of them
    pickled = tmp_path / "unet" / f"diffusion_pytorch_model{ending}"
    pickled.touch()
    with pytest.raises(ConfigError, match=pickled.name):
        check_base("base", str(tmp_path))
    pickled.with_suffix(".safetensors").touch()
    check_base("base", str(tmp_path))


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "../owner/name", "", "C:\\models\\base"])
def test_a_name_that_is_neither_a_path_nor_a_hub_id_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind, check in CHECKS.items():
        with pytest.raises(ConfigError, match=f"{kind}="):
            check(kind, name)
