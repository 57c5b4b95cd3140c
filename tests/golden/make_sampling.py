"""Makes sampling.npz: what transformers keeps and how it penalises, on random logits. See README.md."""

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

ROWS, VOCAB, PROMPT = 1_000, 32, 8

generator = np.random.default_rng(0)
logits = (generator.standard_normal((ROWS, VOCAB)) * generator.choice([0.3, 1, 4], (ROWS, 1))).astype(np.float32)
temperature = generator.uniform(0.2, 2, ROWS).astype(np.float32)
top_k = (generator.integers(1, 40, ROWS) * generator.integers(0, 2, ROWS)).astype(np.int32)
top_p = np.where(generator.random(ROWS) < 0.3, 1, generator.uniform(0.05, 1, ROWS)).astype(np.float32)
min_p = np.where(generator.random(ROWS) < 0.5, 0, generator.uniform(0, 0.5, ROWS)).astype(np.float32)
repetition = generator.uniform(0.5, 2, ROWS).astype(np.float32)
prompt = generator.integers(0, VOCAB, (ROWS, PROMPT))

kept, penalised = [], []
for row in range(ROWS):
    ids, z = torch.from_numpy(prompt[row : row + 1]), torch.from_numpy(logits[row : row + 1])
    penalised.append(RepetitionPenaltyLogitsProcessor(float(repetition[row]))(ids, z.clone())[0].numpy())
    z = TemperatureLogitsWarper(float(temperature[row]))(ids, z)
    if top_k[row]:
        z = TopKLogitsWarper(int(top_k[row]))(ids, z)
    if top_p[row] < 1:
        z = TopPLogitsWarper(float(top_p[row]))(ids, z)
    if min_p[row]:
        z = MinPLogitsWarper(float(min_p[row]))(ids, z)
    kept.append(torch.isfinite(z)[0].numpy())

np.savez_compressed(
    Path(__file__).parent / "sampling.npz",
    logits=logits,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    min_p=min_p,
    repetition_penalty=repetition,
    prompt=prompt.astype(np.int8),
    kept=np.packbits(kept, axis=1),
    penalised=np.array(penalised[:100]),
    versions=f"transformers {transformers.__version__}, torch {torch.__version__}",
)
