"""Small models from scratch, with their tokenizers."""

from collections.abc import Iterable

import tokenizers
import torch
import transformers

from rl_llm.config import ScratchConfig

END = "<|end|>"


def build_scratch(config: ScratchConfig, texts: Iterable[str], folder: str, seed: int) -> None:
    """An untrained GPT-like model and a byte-level byte-pair tokenizer learned from `texts`, saved to `folder`."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    # With a space put before every text a word is one token wherever it stands, first in a target or within.
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    settings = scratch_settings(config, len(tokenizer), tokenizer.eos_token_id)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def scratch_settings(config: ScratchConfig, vocab_size: int, end_id: int) -> transformers.LlamaConfig:
    """The architecture of a policy built from scratch."""
    return transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.hidden_size * 8 // 3,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=end_id,
    )
