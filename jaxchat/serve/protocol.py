"""Bodies of requests: OpenAI's fields, those that vLLM adds to them, and limits; and what the engine gets of them.

Types are strict and unknown fields are refused, so that nothing is ignored silently. Fields that OpenAI's clients send
but that mean nothing here are listed, and may only have the value that changes nothing.
"""

import json
import secrets
from collections.abc import Container, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from jaxchat.data import conversations
from jaxchat.data.messages import Message, normalize
from jaxchat.decode.sampling import TOP, SamplingParams
from jaxchat.errors import UserError
from jaxchat.tokenizer import Tokenizer, chat

MOST_MESSAGES, MOST_TOOLS, MOST_PROMPTS, MOST_CHOICES, MOST_STOPS, MOST_BIASES = 2048, 128, 64, 16, 16, 1024
MOST_IDS = 1 << 17

Id = Annotated[int, Field(ge=0, le=2**31 - 1)]
Ids = Annotated[list[Id], Field(max_length=MOST_IDS)]
Name = Annotated[str, Field(max_length=256)]


class Body(BaseModel):
    """A JSON object with exactly these fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Sampling(Body):
    """Fields of both kinds of completion."""

    model: Name | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MOST_BIASES),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=1024)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=MOST_STOPS)]
        | None
    ) = None
    stop_token_ids: Annotated[list[Id], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Name | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None

    def params(self, *, seed: int, max_tokens: int) -> SamplingParams:
        """Sampling parameters of the engine; fields that are null have OpenAI's defaults."""
        names = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return SamplingParams(
            **given,
            top_k=max(0, self.top_k or 0),  # vLLM's clients turn top_k off by -1.
            logit_bias={int(token): value for token, value in (self.logit_bias or {}).items()},
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_tokens=tuple(self.stop_token_ids or ()),
            ignore_end=bool(self.ignore_eos),
            seed=seed,
            max_tokens=max_tokens,
        )

    @property
    def chosen_seed(self) -> int:
        """The seed, or a fresh one of 32 bits, which every JSON reader keeps exact."""
        return secrets.randbits(32) if self.seed is None else self.seed

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Completion(Sampling):
    """The body of /v1/completions. A prompt that does not begin with the first token of documents gets it in front, as
    every text of training, unless `add_special_tokens` is false.
    """

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
        | None
    ) = None
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of each prompt as they were written, without a first token that was added."""
        given: Any = self.prompt or ""
        if isinstance(given, str) or isinstance(given[0], int):
            given = [given]
        return [tokenizer.encode(one) if isinstance(one, str) else list(one) for one in given]

    def first_tokens(self, prompt: list[int], tokenizer: Tokenizer) -> list[int]:
        """What is put before a prompt."""
        return [] if self.add_special_tokens is False or prompt[:1] == [tokenizer.bos] else [tokenizer.bos]


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class Call(Body):
    name: Annotated[str, Field(max_length=64)]
    arguments: str


class ToolCall(Body):
    id: Name | None = None
    index: int | None = None
    type: Literal["function"] | None = None
    function: Call


class Part(Body):
    """A part of a message: a text; of the assistant also a call of a built-in tool, or its result."""

    type: Annotated[str, Field(max_length=64)]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    parts: list[Part] | None = None
    """The assistant's text, calls and results as this server returned them; used instead of `content`."""
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS)] | None = None
    tool_call_id: Name | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    def row(self) -> Message:
        """The message as a data set would have it; arguments of calls are objects, as in training."""
        content = self.parts if self.parts and self.role == "assistant" else self.content
        row: Message = {"role": self.role, "content": content}
        if isinstance(content, list):
            row["content"] = [part.model_dump() for part in content]
        if self.tool_calls and not self.parts:
            row["tool_calls"] = [
                {"id": call.id, "function": {"name": call.function.name, "arguments": _value(call.function.arguments)}}
                for call in self.tool_calls
            ]
        return row | ({"tool_call_id": self.tool_call_id} if self.tool_call_id else {})


class ResponseFormat(Body):
    type: Literal["text"]


class Chat(Sampling):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None

    def functions(self) -> list[dict[str, Any]]:
        """The client's functions as training describes them: name, description, parameters."""
        tools = [] if self.tool_choice == "none" else self.tools or []
        return [tool.function.model_dump(exclude_none=True, exclude={"strict"}) for tool in tools]

    def prompt(self, tokenizer: Tokenizer, *, whole: bool = False) -> list[int]:
        """Token ids of the conversation up to the point from which the assistant continues; with `whole`, it may end
        with an answer.

        Raises:
            UserError: the messages are in an order that training never has.
        """

        def refuse(phrase: str) -> None:
            raise UserError(f"this is a conversation {phrase}: send only what is to be read")

        functions = self.functions()
        messages = conversations.opened(
            {"tools": functions}, normalize([message.row() for message in self.messages], refuse), refuse
        )
        if messages and messages[-1]["role"] == "assistant":
            if whole and self.messages[-1].role == "assistant":
                return chat.render(messages, tokenizer).ids
            if self.messages[-1].role not in ("tool", "function"):
                raise UserError("the last message is the assistant's: end with a message of the user or of a tool")
            return chat.render(messages, tokenizer).ids[:-1]  # Without the end of the turn, which is continued.
        return chat.render(messages, tokenizer, complete=True).ids


class Tokenize(Body):
    """The body of /tokenize, as vLLM has it: a text, or messages."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: Literal[True] | None = None
    return_token_strs: bool | None = None


class Detokenize(Body):
    """The body of /detokenize."""

    model: Name | None = None
    tokens: Ids


def read_call(text: str, names: Container[str]) -> Call | None:
    """The call of one of the client's functions that a model wrote, or None: {"name": ..., "arguments": ...}."""
    value = _value(text)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or value["name"] not in names:
        return None
    arguments = value.get("arguments", {})
    return Call(
        name=value["name"],
        arguments=arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
    )


def _value(text: str) -> Any:
    """The value of a JSON text, or the text if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
