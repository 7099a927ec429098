"""`FlatLoraCallback`: a real `Trainer` trains what the loop written by hand trains."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from module_surface import surface
from tiny_models import Case, llama_case, t5_case, tokens
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from flatlora_diffusion import FlatLora, FlatLoraCallback
from flatlora_diffusion.config import ConfigError

STEPS = 4
SETTINGS: dict[str, Any] = {"sigma": 0.3, "schedule": "cosine"}


class Questions(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Eight made-up pairs of texts, for T5 and Llama alike."""

    def __init__(self) -> None:
        self.text, self.labels = tokens(1, 60, 8, 7), tokens(2, 60, 8, 7)

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.text[index], "labels": self.labels[index]}


class EvaluateAtTheEnd(TrainerCallback):
    """Asks for an evaluation while eps is still there."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = state.global_step == STEPS


def t5() -> Case:
    case = t5_case()
    case.model.config.decoder_start_token_id = 0  # a config made by hand has none
    return case


def trainer(case: Case, folder: Path, callbacks: list[TrainerCallback], **arguments: Any) -> Trainer:
    return Trainer(case.model, arguments_in(folder, **arguments), train_dataset=Questions(), callbacks=callbacks)


def arguments_in(folder: Path, **arguments: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "optim": "adamw_torch",
        "train_sampling_strategy": "sequential",
        "seed": 7,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(**settings | arguments)


def by_hand(case: Case) -> None:
    """What the trainer does, written out with `perturb`."""
    model, data = case.model, Questions()
    flat = FlatLora(model, **SETTINGS, total_steps=STEPS, seed=7)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (STEPS - step) / STEPS))
    model.train()
    for step in range(STEPS):
        with flat.perturb(step):
            for micro in range(2):
                first = (step * 4 + micro * 2) % len(data)
                rows = [data[first], data[first + 1]]
                batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
                model(**batch).loss.backward()  # a sum over micro-batches: so the trainer does for T5
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
    flat.detach()


def weights(case: Case) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in case.model.named_parameters()}


def are_equal(first: Case, second: Case) -> bool:
    ours, theirs = weights(first), weights(second)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_trainer_trains_what_the_loop_by_hand_trains(tmp_path: Path) -> None:
    case, expected, plain = t5(), t5(), t5()
    trainer(case, tmp_path, [FlatLoraCallback(**SETTINGS)]).train()
    trainer(plain, tmp_path, []).train()
    by_hand(expected)
    assert are_equal(case, expected)
    assert not are_equal(case, plain), "nothing was perturbed"


def test_the_lines_of_the_page_make_a_trainer_perturb(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "in_other_trainers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n([^`]*FlatLoraCallback[^`]*)```", text)
    case, plain = t5(), t5()
    names: dict[str, Any] = {
        "Trainer": Trainer,
        "model": case.model,
        "data": Questions(),
        "arguments": arguments_in(tmp_path),
    }
    names["trainer"] = trainer(case, tmp_path, [])  # which one page makes itself
    exec(code, names)
    names["trainer"].train()
    trainer(plain, tmp_path, []).train()
    assert not are_equal(case, plain), "nothing was perturbed"


def test_the_model_is_given_back_as_it_was(tmp_path: Path) -> None:
    case = llama_case()
    before = surface(copy.deepcopy(case.model)).keys()
    forwards = [name for name, module in case.model.named_modules() if "forward" in vars(module)]
    trainer(case, tmp_path, [FlatLoraCallback(**SETTINGS)]).train()
    assert surface(case.model).keys() == before
    assert [name for name, module in case.model.named_modules() if "forward" in vars(module)] == forwards


def test_without_sigma_a_trainer_trains_plain_lora(tmp_path: Path) -> None:
    case, plain = t5(), t5()
    trainer(case, tmp_path, [FlatLoraCallback(sigma=0.0)], max_steps=2).train()
    trainer(plain, tmp_path, [], max_steps=2).train()
    assert are_equal(case, plain)


@pytest.mark.parametrize("draw", ["full", "low_rank"])
def test_a_resumed_training_goes_on_with_the_same_noise(tmp_path: Path, draw: Any) -> None:
    whole, resumed = llama_case(), llama_case()
    callback = FlatLoraCallback(**SETTINGS, draw=draw)
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    trainer(whole, tmp_path, [callback], **settings).train()
    resuming = trainer(resumed, tmp_path, [callback], **settings)
    resuming.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert are_equal(resumed, whole)


def test_the_trainers_evaluation_sees_no_noise(tmp_path: Path) -> None:
    case, expected = llama_case(), llama_case()
    running = trainer(case, tmp_path, [FlatLoraCallback(**SETTINGS), EvaluateAtTheEnd()])
    running.eval_dataset = Questions()
    running.train()
    logged = next(entry["eval_loss"] for entry in running.state.log_history if "eval_loss" in entry)
    expected.model.load_state_dict(case.model.state_dict())
    quiet = trainer(expected, tmp_path, [])
    assert quiet.evaluate(Questions())["eval_loss"] == logged


def test_a_model_without_lora_is_refused(tmp_path: Path) -> None:
    case = llama_case()
    bare = Case(case.model.unload(), case.predict, case.target)
    with pytest.raises(ConfigError, match="found no LoRA layer in the model; add an adapter first"):
        trainer(bare, tmp_path, [FlatLoraCallback()]).train()


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    running = trainer(llama_case(), tmp_path, [FlatLoraCallback()])
    running.args._n_gpu = 2
    with pytest.raises(ConfigError, match=r"copies the model to 2 GPUs.*accelerate launch"):
        running.callback_handler.on_train_begin(running.args, running.state, running.control)
