"""Makes templates.json: conversations in chat templates as transformers 5.24 renders and encodes them.

python tests/golden/make_templates.py      needs transformers >= 5.24; from the root of the repository
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
from templates import NAMES, TALKS, TEMPLATES, tokenizer_json


def rendered(tokenizer: Any, talk: list[dict[str, Any]], template: str) -> dict[str, Any]:
    """Text and ids of a conversation, with the mask if the template marks answers; the error of one that it refuses."""
    options = {"add_generation_prompt": talk[-1]["role"] == "user"}
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False, **options)
    except Exception as error:
        return {"error": str(error)}
    marked = "{% generation %}" in template and not options["add_generation_prompt"]
    found = tokenizer.apply_chat_template(
        talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=marked, **options
    )
    return {"text": text, "ids": found["input_ids"]} | ({"mask": found["assistant_masks"]} if marked else {})


def main() -> None:
    golden: dict[str, Any] = {}
    for name, template in TEMPLATES.items():
        with tempfile.TemporaryDirectory() as directory:
            files = {
                "tokenizer.json": json.dumps(tokenizer_json()),
                "tokenizer_config.json": json.dumps({**NAMES, "tokenizer_class": "PreTrainedTokenizerFast"}),
                "chat_template.jinja": template,
            }
            for file, content in files.items():
                Path(directory, file).write_text(content)
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        golden[name] = {key: rendered(tokenizer, talk, template) for key, talk in TALKS.items()}
    path = Path(__file__).parent / "templates.json"
    path.write_text(json.dumps(golden, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
