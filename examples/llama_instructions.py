"""Llama 2 on instructions as in Tables 3 and 4 of Flat-LoRA's paper (arXiv:2409.14396): a LoRA to evaluate.

    python -m examples.llama_instructions --output_dir outputs/alpaca            # Flat-LoRA
    python -m examples.llama_instructions --output_dir outputs/plain --sigma 0   # plain LoRA, all else alike
    python -m examples.llama_instructions --model meta-llama/Llama-2-13b-hf      # Table 4
    python -m examples.llama_instructions --data meta-math/MetaMathQA --question query --answer response --rows 100000
    python -m examples.llama_instructions --data m-a-p/CodeFeedback-Filtered-Instruction --question query \\
      --answer answer --rows 100000
    python -m examples.llama_instructions --data WizardLMTeam/WizardLM_evol_instruct_70k

The last three are math, code and chat; the sets for code and chat are our choice. From the paper: the base in bf16 and
the LoRA in fp32, rank 8, alpha 16, all linear layers, 5e-4 with a cosine after a warm-up of 0.03, 2 epochs, batches of
32, sigma 0.05 with its ramp. The prompt takes no part in the loss.
`--data FOLDER` takes `train.json` with the two columns.

The paper's evaluations, with EleutherAI's harness (`pip install lm_eval`): GSM8K, HumanEval, and MMLU, DROP and BBH of
InstructEval:

    lm_eval --model hf --model_args pretrained=meta-llama/Llama-2-7b-hf,dtype=bfloat16,peft=outputs/alpaca \\
      --tasks gsm8k,humaneval,mmlu,drop,bbh --confirm_run_unsafe_code

MT-Bench is judged by GPT-4, with `python -m fastchat.llm_judge.gen_model_answer --model-path MERGED --model-id flat`
and then `gen_judgment`; MERGED is a folder that `merge_and_unload` of PEFT was saved to.
"""

from __future__ import annotations

from typing import Any

import torch
import tyro
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from flatlora_diffusion import FlatLoraCallback


def main(  # noqa: PLR0913 (each is a setting of the command line)
    model: str = "meta-llama/Llama-2-7b-hf",
    data: str = "tatsu-lab/alpaca",
    question: str = "instruction",
    answer: str = "output",
    output_dir: str = "outputs/llama_instructions",
    rows: int | None = None,
    sigma: float = 0.05,
    rank: int = 8,
    micro_batch: int = 4,
    seed: int = 0,
    max_steps: int = -1,
) -> float:
    """Train, keep the LoRA in `output_dir`, and return the mean training loss."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    lora = get_peft_model(base, LoraConfig("CAUSAL_LM", r=rank, lora_alpha=16, target_modules="all-linear"))

    def as_tokens(row: dict[str, Any]) -> dict[str, list[int]]:
        asked = " ".join([row[question], row.get("input") or ""]).strip()
        prompt = tokenizer(f"### Instruction:\n{asked}\n\n### Response:\n")["input_ids"]
        reply = tokenizer(row[answer], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = (prompt + reply)[:1024]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ([-100] * len(prompt) + reply)[:1024]}

    train = load_dataset(data, split="train" if rows is None else f"train[:{rows}]")
    trainer = Trainer(
        lora,
        TrainingArguments(
            output_dir=output_dir,
            learning_rate=5e-4,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            num_train_epochs=2,
            max_steps=max_steps,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=max(1, 32 // micro_batch),
            gradient_checkpointing=True,
            save_strategy="no",
            report_to="none",
            seed=seed,
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=train.map(as_tokens, remove_columns=train.column_names),
        callbacks=[FlatLoraCallback(sigma=sigma, draw="full")],
    )
    loss = trainer.train().training_loss
    lora.save_pretrained(output_dir)
    return float(loss)


if __name__ == "__main__":
    print(f"loss {tyro.cli(main):.4f}")
