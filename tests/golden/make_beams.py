"""Makes beams.json: transformers' beam search on the weights of nanochat_v1_gqa.npz. See README.md."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import NanoChatConfig, NanoChatForCausalLM

HERE = Path(__file__).parent
PROMPT, NEW_TOKENS = [5, 17, 60], 14

with np.load(HERE / "nanochat_v1_gqa.npz") as file:
    about = json.loads(str(file["about"]))
    weights = {k.removeprefix("weights/"): torch.from_numpy(file[k]) for k in file if k.startswith("weights/")}
model = NanoChatForCausalLM(NanoChatConfig(**about["config"], attn_implementation="eager")).eval()
model.load_state_dict(weights, strict=False)

prompt = torch.tensor([PROMPT])
likely = model.generate(prompt, num_beams=5, num_return_sequences=5, do_sample=False, max_new_tokens=NEW_TOKENS)
likely = likely[:, len(PROMPT) :]
one, several = [int(likely[0, 5])], sorted({int(likely[0, 9]), int(likely[4, 2]), int(likely[2, 7])})
settings_to_try = [
    {"num_beams": beams, "length_penalty": penalty, "early_stopping": stopping, "eos_token_id": ends}
    for beams, ends in (
        (3, [int(likely[0, 5])]),
        (5, sorted({int(likely[0, 9]), int(likely[4, 2]), int(likely[2, 7])})),
    )
    for penalty in (0.0, 1.0, 2.0, -0.5)
    for stopping in (False, True, "never")
]

searches = []
for settings in settings_to_try:
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_return_sequences=settings["num_beams"],
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=-1,
        **settings,
    )
    answers = [[int(t) for t in row[len(PROMPT) :] if t >= 0] for row in out.sequences]
    searches.append({"settings": settings, "answers": answers, "scores": out.sequences_scores.tolist()})

lengths = [len(answer) for search in searches for answer in search["answers"]]
assert min(lengths) < NEW_TOKENS, "no text ends: choose other end tokens"
about = {"versions": f"transformers {transformers.__version__}, torch {torch.__version__}"}
about |= {"prompt": PROMPT, "new_tokens": NEW_TOKENS}
(HERE / "beams.json").write_text(json.dumps({"about": about, "searches": searches}) + "\n")
print(sorted(lengths))
