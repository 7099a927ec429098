"""What the base reads: a small vocabulary in Qwen3's format with its chat template, and a thin Qwen3 text encoder.

FLUX.2 klein puts the hidden states behind layers 9, 18 and 27 side by side. Two layers before each of these learn; all
others have zeros in their output projections and pass their input on. So training runs a model of 7 layers, and
`deepen` makes the one of 28 that is saved.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from samples.tiny_sdxl.recipe.captions import VOCABULARY, caption
from samples.tiny_sdxl.recipe.icons import Concept

WIDTH = 96
LAYERS = 28  # a layer behind the last tap, as in klein: its state has not passed the final norm
LEARNING = {0: 7, 1: 8, 2: 16, 3: 17, 4: 25, 5: 26, 6: 27}  # where each layer of training stands among LAYERS
TAPS = (2, 4, 6)  # in training, what 9, 18, 27 are in the saved model
LONGEST = 512  # tokens, as in klein

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINK = ("<think>", "</think>")
# Qwen3's for one turn; without thinking, its answer begins with a thought that is empty.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)


def train_tokenizer(concepts: Sequence[Concept], folder: Path) -> None:
    """Save a byte-level BPE of captions as Qwen's tokenizer in `folder`."""
    rng = torch.Generator().manual_seed(0)
    corpus = [caption(concept, rng) for concept in concepts for _ in range(40)]
    corpus += ["user\n", "assistant\n\n"] * 100
    empty = Qwen2TokenizerFast().backend_tokenizer
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 3 - len(THINK),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(corpus, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2TokenizerFast(
        vocab=model["vocab"], merges=merges, eos_token=STOP, pad_token=END, model_max_length=LONGEST
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [START, STOP]})
    tokenizer.add_tokens(list(THINK))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def tokenize(tokenizer: Qwen2TokenizerFast, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """The ids and the mask of `texts`, (B, length), as Flux2KleinPipeline makes them."""
    turns = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for text in texts
    ]
    found = tokenizer(turns, return_tensors="pt", padding="max_length", truncation=True, max_length=length)
    return found["input_ids"], found["attention_mask"]


def build_text_encoder(layers: int = len(LEARNING)) -> Qwen3ForCausalLM:
    """A randomly initialized text encoder of that many layers; call under a fixed seed."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=WIDTH // 32,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=LONGEST,
            tie_word_embeddings=True,
            initializer_range=WIDTH**-0.5,
            attn_implementation="sdpa",
        )
    )


def embeddings(encoder: Qwen3ForCausalLM, ids: Tensor, mask: Tensor, taps: Sequence[int] = TAPS) -> Tensor:
    """The states behind the layers `taps` side by side, (B, length, 3 * WIDTH)."""
    found = encoder.model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return torch.cat([found.hidden_states[tap] for tap in taps], dim=-1)


@torch.no_grad()
def deepen(encoder: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """The text encoder of `LAYERS` layers with the same embeddings behind layers 9, 18 and 27."""
    deep = build_text_encoder(LAYERS)
    deep.model.embed_tokens.load_state_dict(encoder.model.embed_tokens.state_dict())
    deep.model.norm.load_state_dict(encoder.model.norm.state_dict())
    for layer in deep.model.layers:
        for name, weight in layer.named_parameters():
            if not name.endswith("norm.weight"):
                weight.zero_()
    for place, target in LEARNING.items():
        deep.model.layers[target].load_state_dict(encoder.model.layers[place].state_dict())
    return deep
