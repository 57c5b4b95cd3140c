"""Training of the October 2025 shape in torch, alone in its process; `peers` starts it.

Reads an `Asked` as JSON from its one argument and prints what it measured as JSON. JAX is not imported, so that each
library has the device's memory and its own CUDA libraries to itself as far as the other leaves them.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Asked:
    """A model and how long to train it with fused AdamW; in bfloat16 under autocast, or in float32."""

    kind: str
    vocab: int
    width: int
    depth: int
    heads: int
    hidden: int
    rope_base: float
    softcap: float
    row_length: int
    rows: int
    steps: int
    compiled: bool
    device: str
    dtype: str
    warm: int = 3


def main(argv: list[str]) -> dict[str, Any]:
    """Measures with as many of the rows as fit, by halves."""
    import torch

    asked = Asked(**json.loads(argv[0]))
    torch.set_float32_matmul_precision("high")
    rows = asked.rows
    while True:
        try:
            return train(asked, rows)
        except torch.cuda.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
            torch._dynamo.reset()
            torch.cuda.empty_cache()


def train(asked: Asked, rows: int) -> dict[str, Any]:
    """Seconds of each step, waited for at its end as its loss is read a step later."""
    import torch

    torch.manual_seed(0)
    model = (plain if asked.kind == "plain" else transformers)(asked).to(asked.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.randint(asked.vocab, (2, rows, asked.row_length + 1), device=asked.device)
    cuda, half = asked.device == "cuda", asked.dtype == "bfloat16"

    def loss_of(tokens: Any, targets: Any) -> Any:
        with torch.autocast(asked.device, torch.bfloat16, enabled=half):
            logits = model(tokens)
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    step = torch.compile(loss_of) if asked.compiled else loss_of
    wait = torch.cuda.synchronize if cuda else lambda: None
    begin, seconds, loss = time.perf_counter(), [], None
    first = 0.0
    for i in range(asked.warm + asked.steps):
        wait()
        start = time.perf_counter()
        loss = step(ids[i % 2, :, :-1], ids[i % 2, :, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        if i == 0:
            first = time.perf_counter() - begin
        if i >= asked.warm:
            seconds.append(time.perf_counter() - start)
    assert loss is not None
    return {
        "rows": rows,
        "step_seconds": statistics.median(seconds),
        "tokens_per_second": rows * asked.row_length / statistics.median(seconds),
        "first_step_seconds": first,
        "loss": loss.item(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "torch": torch.__version__,
        "dtype": asked.dtype,
    }


def plain(asked: Asked) -> Any:
    """A GPT of the shape in torch alone: rotary positions, norms without weights, squared ReLU, flash attention."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    M, H, T = asked.width, asked.heads, asked.row_length
    D = M // H

    def norm(x: Any) -> Any:
        return F.rms_norm(x, (x.shape[-1],))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(M, 3 * M, bias=False), nn.Linear(M, M, bias=False)
            self.up, self.down = nn.Linear(M, asked.hidden, bias=False), nn.Linear(asked.hidden, M, bias=False)

        def forward(self, x: Any, cos: Any, sin: Any) -> Any:
            q, k, v = (part.view(*x.shape[:2], H, D).transpose(1, 2) for part in self.qkv(norm(x)).split(M, dim=-1))
            q, k = norm(turn(q, cos, sin)), norm(turn(k, cos, sin))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(o.transpose(1, 2).reshape(x.shape))
            return x + self.down(F.relu(self.up(norm(x))).square())

    def turn(x: Any, cos: Any, sin: Any) -> Any:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(asked.vocab, M), nn.Linear(M, asked.vocab, bias=False)
            self.blocks = nn.ModuleList(Block() for _ in range(asked.depth))
            angle = torch.outer(torch.arange(T), asked.rope_base ** (-torch.arange(0, D, 2) / D))
            dtype = getattr(torch, asked.dtype)
            self.register_buffer("cos", angle.cos().to(dtype))
            self.register_buffer("sin", angle.sin().to(dtype))

        def forward(self, tokens: Any) -> Any:
            x = norm(self.embed(tokens)).to(self.cos.dtype)
            for block in self.blocks:
                x = block(x, self.cos, self.sin)
            return asked.softcap * torch.tanh(self.head(norm(x)) / asked.softcap)

    return Model()


def transformers(asked: Asked) -> Any:
    """The same shape as transformers writes it."""
    from torch import nn
    from transformers import NanoChatConfig, NanoChatForCausalLM

    config = NanoChatConfig(
        vocab_size=asked.vocab,
        hidden_size=asked.width,
        intermediate_size=asked.hidden,
        num_hidden_layers=asked.depth,
        num_attention_heads=asked.heads,
        num_key_value_heads=asked.heads,
        max_position_embeddings=asked.row_length,
        rope_parameters={"rope_type": "default", "rope_theta": asked.rope_base},
        final_logit_softcapping=asked.softcap,
        use_cache=False,
    )

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = NanoChatForCausalLM(config)

        def forward(self, tokens: Any) -> Any:
            return self.model(tokens, use_cache=False).logits

    return Logits()


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
