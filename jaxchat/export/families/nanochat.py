"""transformers' NanoChatForCausalLM, which is the October 2025 family.

Like this family, transformers normalises the embedding before the first layer, rotates by -theta, and normalises
queries and keys after the rotation.
"""

from typing import Any

from jaxchat.export.families.keys import POSITIVE, Config, only, read_rope
from jaxchat.export.families.llama import ATTENTION, ENDS, HIDDEN, KEYS, LAYER, Llama
from jaxchat.export.places import Place
from jaxchat.model import GQA, Model, ReluSquared, RMSNorm, RoPE

MLP = {("mlp", x): Place(f"{LAYER}mlp.{name}.weight", keys=HIDDEN) for x, name in (("in", "fc1"), ("out", "fc2"))}


class NanoChat(Llama):
    architecture, model_type = "NanoChatForCausalLM", "nanochat"
    keys = KEYS | {"hidden_act": only("relu2"), "final_logit_softcapping": POSITIVE.or_null()._replace(default=15.0)}
    parts = (GQA, ReluSquared, RMSNorm, RoPE)
    places = ENDS | ATTENTION | MLP
    gain, qk_norm, activation, direction = "none", "last", "relu2", -1

    def rope(self, c: Config, i: int) -> RoPE:
        return read_rope(c, self.direction, kinds=("default",))

    def mlp(self, c: Config, i: int) -> ReluSquared:
        return ReluSquared(c["intermediate_size"], init="normal", init_scale=1.0)

    def ends(self, c: Config) -> dict[str, Any]:
        cap = c["final_logit_softcapping"]
        return {"softcap": cap, "embed_std": 1.0, "head_std": 0.0, "isolate_documents": False}

    def write(self, model: Model, length: int) -> dict[str, Any]:
        return {**super().write(model, length), "final_logit_softcapping": model.softcap}
