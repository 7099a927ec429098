"""LoRA files from elsewhere: what is taken becomes a finished entry; what is hostile or foreign does not."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import gradio as gr
import pytest
import torch
from safetensors.torch import load_file, save_file

from app.compare.view import BY_PROMPT, CompareView, Form
from app.context import AppContext, make_context
from app.flatness.view import FlatnessView
from app.forms.forms import ConfigForm
from app.runs.lora_import import import_lora_file, known_bases, origin_of
from app.runs_tab.run_list import NEWEST, rows_of
from app.runs_tab.tab import clone, delete, details, refresh, take_lora, undo
from app.runs_tab.trash import delete_for_good, look
from app.settings import AppSettings
from flatlora_diffusion.adapter.delta import difference, norm
from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.lora_files.reading import import_lora
from flatlora_diffusion.lora_files.safe_reading import read_header


@pytest.fixture
def context(pair: Path, tmp_path: Path) -> AppContext:
    shutil.copytree(pair, tmp_path / "runs")
    return make_context(AppSettings(runs_dir=str(tmp_path / "runs")))


@pytest.fixture
def upload(pair: Path, tmp_path: Path) -> Path:
    """A LoRA in kohya's layout, as it is shared."""
    return Path(shutil.copy(pair / "icons-lora" / "icons-lora.safetensors", tmp_path / "Soft clay.safetensors"))


def test_an_imported_lora_is_a_finished_entry_that_the_comparison_takes(
    context: AppContext, upload: Path, base: Path
) -> None:
    assert known_bases(context.runs)[0] == str(base)
    taken = import_lora_file(context.runs, upload, str(base))
    run = context.runs.get(taken.run)
    assert (taken.run, run.state, run.method, taken.unknown) == ("Soft-clay", "finished", "imported", 0)
    kept = import_lora(read_header(run.folder / "pytorch_lora_weights.safetensors"), str(base)).updates
    given = import_lora(read_header(upload), str(base)).updates
    assert given["unet"]
    for module, update in given["unet"].items():
        assert difference(kept["unet"][module], update) < 1e-4 * norm(update)
    view = CompareView(context)
    form = Form(["icons-flat-lora", taken.run], "a fox", "0", BY_PROMPT, 1.0, "", 1, 1.0)
    comparison = view.comparison(form)
    assert [title for title, _ in comparison.titles] == ["Base", "Flat-LoRA", "Imported"]
    assert len(view.draw(form, "me")) == 1
    assert taken.run not in [run_id for _, run_id in FlatnessView(context).runs()]
    assert str(base) not in (run.folder / "config.json").read_text(encoding="utf-8")  # which the app serves


def test_the_runs_tab_shows_where_it_comes_from_and_offers_no_training(
    context: AppContext, upload: Path, base: Path
) -> None:
    told, choice, emptied = take_lora(context, str(upload), str(base))
    run_id = choice.value
    assert ("Soft-clay", run_id) in choice.choices  # else the page refuses its own choice
    assert "Soft-clay is among the runs now" in told
    assert emptied is None
    assert not upload.exists()  # the copy of the upload, not the user's own file
    (row,) = [row for row in rows_of(context) if row.id == run_id]
    assert (row.name, row.state, row.method, row.steps) == ("Soft-clay", "finished", "Imported", "")
    shown = details(context, run_id)
    assert "from Soft clay.safetensors" in shown[0]
    assert [shown[-2].interactive, shown[-1].interactive] == [False, False]
    with pytest.raises(Exception, match="Soft-clay was imported, not trained"):
        clone(context, ConfigForm(), "", run_id)
    origin = origin_of(context.runs.get(run_id).folder)
    assert origin is not None
    assert origin.layers > 0


def test_the_same_file_is_not_taken_twice(context: AppContext, upload: Path, base: Path) -> None:
    import_lora_file(context.runs, upload, str(base))
    with pytest.raises(ConfigError, match="is among the runs already, as Soft-clay"):
        import_lora_file(context.runs, upload, str(base))


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"lora": [1, 2]}))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def not_finite(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: torch.full_like(value, torch.nan) for name, value in tensors.items()}, path)


def of_a_wider_base(path: Path) -> None:
    tensors = load_file(path)
    wider = {
        name: torch.cat([value, value], 1) if name.endswith("down.weight") else value
        for name, value in tensors.items()
    }
    save_file(wider, path)


def of_flux(path: Path) -> None:
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(4, 8)}, path)


def nothing_to_change(path: Path) -> None:
    zeros = {name: value if name.endswith("alpha") else value * 0 for name, value in load_file(path).items()}
    save_file(zeros, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pickled, "Python pickle"),
        (cut_short, "truncated"),
        (not_finite, "NaN|not finite"),
        (of_a_wider_base, "--base"),
        (of_flux, "is a LoRA for Flux, not for SDXL"),
        (nothing_to_change, "Soft clay.safetensors would have no effect"),
    ],
)
def test_hostile_and_foreign_files_leave_nothing_behind(
    context: AppContext, upload: Path, base: Path, spoil: object, message: str
) -> None:
    spoil(upload)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=message) as rejected:
        import_lora_file(context.runs, upload, str(base))
    assert str(upload.parent) not in str(rejected.value)  # the user knows the file by its name only
    assert {run.id for run in context.runs.all()} == {"icons-lora", "icons-flat-lora"}
    assert not any(context.runs.temporary.iterdir())


def test_an_upload_that_is_gone_is_one_sentence(context: AppContext, upload: Path, base: Path) -> None:
    upload.unlink()
    with pytest.raises(ConfigError, match=r"Soft clay\.safetensors is not here any more"):
        import_lora_file(context.runs, upload, str(base))


def test_other_endings_and_missing_files_are_told_beside_the_upload(context: AppContext, tmp_path: Path) -> None:
    other = tmp_path / "lora.ckpt"
    other.write_bytes(b"x")
    told = take_lora(context, str(other), "tiny")[0]
    assert "lora.ckpt is no .safetensors file; other formats can hold code" in told
    assert "no file was given" in take_lora(context, None, "tiny")[0]
    assert "tiny" in known_bases(context.runs)


def test_a_deleted_entry_comes_back_as_a_choice_of_the_page(context: AppContext, upload: Path, base: Path) -> None:
    run_id = import_lora_file(context.runs, upload, str(base)).run
    delete(context, run_id)
    assert run_id not in [row.id for row in rows_of(context)]
    again = make_context(context.settings)  # as after a reload
    *_, fold, entries = refresh(again, None, "", NEWEST)
    assert (fold.visible, fold.label) == (True, "Trash (1)")
    assert entries.choices[0][0].startswith(f"{run_id}, deleted ")
    choice = undo(again, entries.value)
    assert (choice.value, (run_id, run_id) in choice.choices) == (run_id, True)
    assert f'data-run="{run_id}"' in refresh(again, run_id, "", NEWEST)[0]
    assert context.runs.settings(run_id)["pretrained_model_name_or_path"] == str(base)
    delete(context, run_id)
    delete_for_good(context, refresh(context, None, "", NEWEST)[4].value)
    assert not look(context)[0].visible
    assert context.runs.trash.size() == 0
    with pytest.raises(gr.Error, match="no run is chosen"):
        delete_for_good(context, None)
