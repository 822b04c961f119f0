"""Tiny models of real architectures with random weights, and a byte-level BPE trained on the spot. For tests only."""

import functools

import torch

TEXT = ("Retrieval reads what others wrote. The language model reads the passage, then the question, then it answers. "
        "A passage stands before the text; the text never moves. In 1999 there were 42 of them, and 7 were naïve. ") * 4
CHAT = ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}")
D = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)
KV = dict(num_key_value_heads=2, head_dim=8)
SLIDE = ["sliding_attention", "full_attention"]
KINDS = {
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama": D | KV,
    "qwen2": D | dict(num_key_value_heads=2),
    "qwen3": D | KV,
    "mistral": D | KV | dict(sliding_window=6),
    "gemma2": D | KV | dict(sliding_window=6, layer_types=SLIDE, attn_logit_softcapping=5.0,
                            final_logit_softcapping=3.0, query_pre_attn_scalar=8),
    "gemma3_text": D | KV | dict(sliding_window=6, layer_types=SLIDE, query_pre_attn_scalar=8),
    "gpt_neox": D | dict(rotary_pct=0.5),
    "opt": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, max_position_embeddings=64,
                word_embed_proj_dim=32),
    "opt-post": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, max_position_embeddings=64,
                     word_embed_proj_dim=16, do_layer_norm_before=False),  # as OPT-350m: projections, norm after
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "lfm2": D | dict(num_key_value_heads=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False,
                     block_multiple_of=8),  # short convolutions: a running state
}
CAPPED = {"gemma2": 3.0}


@functools.cache
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|end|>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", bos_token="<|end|>")
    fast.chat_template = CHAT
    return fast


def make(kind: str, seed: int = 0, **changes):
    """A model in eval mode whose output depends on every input: standard deviation 0.3 in matrices, norms near 1."""
    from transformers import AutoConfig, AutoModelForCausalLM

    # untied: a random tied head mostly repeats the token it just read, and a greedy test would see one token
    options = dict(vocab_size=290, bos_token_id=0, eos_token_id=0, pad_token_id=None, tie_word_embeddings=False)
    config = AutoConfig.for_model(kind.partition("-")[0], **(options | KINDS[kind] | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3)
            else:
                p.add_(torch.randn_like(p) * 0.05)
    return model
