"""Tiny models whose attention is far from uniform, shared by the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 99
PAD = 0
_PROJECTIONS = ("query", "key", "q_lin", "k_lin", "q_proj", "k_proj", "c_attn", "qkv")


def _named(**settings: Any) -> dict[str, Any]:
    return settings


def widened(model: nn.Module, factor: float = 8.0) -> nn.Module:
    """The model with larger query and key projections: attention far from uniform, where mistakes show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = name.split(".")[-2]
            if owner in _PROJECTIONS and name.endswith("weight"):
                # A fused projection holds values too, which may stay as they are.
                parameter.mul_(factor)
    return model


def bert(implementation: str = "sdpa", layers: int = 2, **config: Any) -> Any:
    import transformers as t

    torch.manual_seed(0)
    sizes = _named(hidden_size=32, num_attention_heads=4, num_hidden_layers=layers, intermediate_size=48)
    settings = t.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=40, **{**sizes, **config})
    return _made(t.BertForSequenceClassification, settings, implementation, 40.0)


def distilbert(implementation: str = "sdpa") -> Any:
    import transformers as t

    torch.manual_seed(1)
    settings = t.DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_heads=4, n_layers=2, hidden_dim=48)
    return _made(t.DistilBertForSequenceClassification, settings, implementation, 40.0)


def roberta(implementation: str = "sdpa") -> Any:
    import transformers as t

    torch.manual_seed(2)
    sizes = _named(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48)
    settings = t.RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=40, pad_token_id=1, **sizes)
    return _made(t.RobertaForSequenceClassification, settings, implementation, 40.0)


def gpt2(implementation: str = "sdpa") -> Any:
    import transformers as t

    torch.manual_seed(3)
    settings = t.GPT2Config(vocab_size=VOCABULARY, n_positions=40, n_embd=32, n_layer=2, n_head=4)
    return _made(t.GPT2LMHeadModel, settings, implementation, 12.0)


def llama(implementation: str = "sdpa") -> Any:
    import transformers as t

    torch.manual_seed(4)
    heads = _named(num_attention_heads=4, num_key_value_heads=2)
    sizes = _named(hidden_size=32, num_hidden_layers=2, intermediate_size=48, max_position_embeddings=40)
    settings = t.LlamaConfig(vocab_size=VOCABULARY, **heads, **sizes)
    return _made(t.LlamaForCausalLM, settings, implementation, 20.0)


def gemma2() -> Any:
    """Softcap and a window of 4, eager only."""
    import transformers as t

    torch.manual_seed(5)
    heads = _named(num_attention_heads=4, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8)
    sizes = _named(hidden_size=32, num_hidden_layers=2, intermediate_size=48, max_position_embeddings=40)
    capped = _named(attn_logit_softcapping=3.0, sliding_window=4)
    settings = t.Gemma2Config(vocab_size=VOCABULARY, **heads, **sizes, **capped)
    return _made(t.Gemma2ForCausalLM, settings, "eager", 20.0)


def gpt_oss() -> Any:
    """A learnt sink per head, eager only."""
    import transformers as t

    torch.manual_seed(6)
    heads = _named(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    sizes = _named(
        hidden_size=32, num_hidden_layers=2, intermediate_size=16, num_local_experts=2, num_experts_per_tok=1
    )
    settings = t.GptOssConfig(vocab_size=VOCABULARY, sliding_window=4, max_position_embeddings=40, **heads, **sizes)
    model = _made(t.GptOssForCausalLM, settings, "eager", 20.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(std=2.0)
    return model


def t5(implementation: str = "sdpa") -> Any:
    """A learnt bias on the logits, encoder, decoder and cross attention."""
    import transformers as t

    torch.manual_seed(7)
    settings = t.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return _made(t.T5ForConditionalGeneration, settings, implementation, 4.0)


def _made(kind: Any, settings: Any, implementation: str, factor: float) -> Any:
    settings._attn_implementation = implementation
    settings.decoder_start_token_id = 0
    model: nn.Module = kind(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name:
                parameter.normal_(std=2.0)
    return widened(model, factor).eval()


def tokens(batch: int = 3, length: int = 12, padding: str = "none", pad: int = PAD) -> dict[str, Any]:
    """Ids and attention mask; example n has 2 n tokens of padding on the named side."""
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(ids)
    for n in range(batch):
        if padding == "left":
            mask[n, : 2 * n] = 0
        elif padding == "right":
            mask[n, length - 2 * n :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}


class PlainAttention(nn.Module):
    """Attention on torch's own SDPA, as in a model that does not use transformers."""

    def __init__(self, width: int = 32, heads: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.heads, self.causal = heads, causal

    def parts(self, x: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.parts(x)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return y.transpose(1, 2).flatten(2)


class Plain(nn.Module):
    """Two such layers and a classifier."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.layers = nn.ModuleList([PlainAttention(causal=causal) for _ in range(2)])
        self.head = nn.Linear(32, 2)
        widened(self, 3.0)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        seen = None if mask is None else mask.bool()[:, None, None, :]
        for layer in self.layers:
            x = x + layer(x, seen)
        out: Tensor = self.head(x.mean(1))
        return out
