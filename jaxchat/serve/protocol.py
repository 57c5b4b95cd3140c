"""Bodies of requests: OpenAI's fields, those that vLLM adds to them, and limits; and what the engine gets of them.

Types are strict and unknown fields are refused, so that nothing is ignored silently. Fields that OpenAI's clients send
but that mean nothing here are listed, and may only have the value that changes nothing.
"""

import json
from collections.abc import Container, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model

from jaxchat.data import conversations
from jaxchat.data.messages import Message, normalize
from jaxchat.decode.sampling import FILTERS, TOP, Filter, SamplingParams
from jaxchat.decode.tools import Calculator
from jaxchat.errors import UserError
from jaxchat.serve.errors import ApiError
from jaxchat.tokenizer import Tokenizer, chat

MOST_MESSAGES, MOST_TOOLS, MOST_PROMPTS, MOST_CHOICES, MOST_STOPS, MOST_BIASES = 2048, 128, 64, 16, 16, 1024
MOST_IDS = 1 << 17
CALL = Calculator.call_part  # Kind of the part in which a model calls a function.

Id = Annotated[int, Field(ge=0, le=2**31 - 1)]
Ids = Annotated[list[Id], Field(max_length=MOST_IDS)]
Name = Annotated[str, Field(max_length=256)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
Digits = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Body(BaseModel):
    """A JSON object with exactly these fields."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


def _field(row: Filter) -> Any:
    """The field of a filter; vLLM's clients turn those of whole numbers off by -1."""
    if row.dtype == np.int32:
        off = AfterValidator(lambda value: int(row.off) if value < 0 else value)
        return Annotated[int, Field(ge=-1, le=2**31 - 1), off] | None, None
    return Annotated[float, Field(ge=row.limits[0], le=row.limits[1])] | None, None


_filters: dict[str, Any] = {name: _field(row) for name, row in FILTERS.items()}
Filters: Any = create_model("Filters", __base__=Body, **_filters)


class Sampling(Filters):
    """Fields of both kinds of completion. Those of `FILTERS` are inherited."""

    model: Name | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[Digits, Bias], Field(max_length=MOST_BIASES)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
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
        names = ("temperature", *FILTERS, "presence_penalty", "frequency_penalty", "repetition_penalty")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return SamplingParams(
            **given,
            logit_bias={int(token): value for token, value in (self.logit_bias or {}).items()},
            stop=self.stops,
            stop_tokens=tuple(self.stop_token_ids or ()),
            ignore_end=bool(self.ignore_eos),
            seed=seed,
            max_tokens=max_tokens,
        )

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check(self) -> None:
        """Raises `ApiError` if fields contradict each other."""
        if self.stream_options and not self.stream:
            raise ApiError(400, "stream_options needs stream to be true", param="stream_options")

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
        if self.role != "assistant" and (self.parts or self.tool_calls):
            raise UserError(f"a message of the role {self.role!r} has neither parts nor tool_calls")
        content = self.parts or self.content
        row: Message = {"role": self.role, "content": content}
        if isinstance(content, list):
            row["content"] = [part.model_dump() for part in content]
        if self.tool_calls and not self.parts:
            row["tool_calls"] = [
                {"id": call.id, "function": {"name": call.function.name, "arguments": parsed(call.function.arguments)}}
                for call in self.tool_calls
            ]
        return row | ({"tool_call_id": self.tool_call_id} if self.tool_call_id else {})


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]


class ResponseFormat(Body):
    type: Literal["text"]


class Chat(Sampling):
    """The body of /v1/chat/completions."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        if self.max_tokens and self.max_completion_tokens:
            raise ApiError(400, "max_tokens is the old name of max_completion_tokens: give one", param="max_tokens")
        if self.tool_choice == "required" and not self.tools:
            raise ApiError(400, "tool_choice needs tools to choose from", param="tool_choice")
        if isinstance(self.tool_choice, Tool) and self.tool_choice.function.name not in self.names:
            raise ApiError(400, f"no function of tools is named {self.tool_choice.function.name}", param="tool_choice")

    def functions(self) -> list[dict[str, Any]]:
        """The client's functions as training describes them: name, description, parameters."""
        tools = [] if self.tool_choice == "none" else self.tools or []
        return [tool.function.model_dump(exclude_none=True, exclude={"strict"}) for tool in tools]

    @property
    def names(self) -> set[str]:
        """Names of the functions that may be called."""
        return {function["name"] for function in self.functions()}

    def begun(self, tokenizer: Tokenizer) -> list[int]:
        """Tokens of the beginning of the call that `tool_choice` demands, as training writes it: {"name": "NAME", of
        the one function that is possible; empty if the model may choose whether to call."""
        if self.tool_choice in (None, "none", "auto"):
            return []
        names = [self.tool_choice.function.name] if isinstance(self.tool_choice, Tool) else list(self.names)
        call = json.dumps({"name": names[0], "arguments": {}}).removesuffix(" {}}")
        call = call if len(names) == 1 else '{"name":'
        return [tokenizer.specials[tokenizer.chat_format.parts[CALL].begin], *tokenizer.encode(call)]

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
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: Literal[True] | None = None
    return_token_strs: bool | None = None


class Detokenize(Body):
    """The body of /detokenize."""

    model: Name | None = None
    tokens: Ids


def read_call(text: str, names: Container[str]) -> Call | None:
    """The call of one of the client's functions that a model wrote, or None: {"name": ..., "arguments": ...}."""
    value = parsed(text)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or value["name"] not in names:
        return None
    arguments = value.get("arguments", {})
    return Call(
        name=value["name"],
        arguments=arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
    )


def parsed(text: str) -> Any:
    """The value of a JSON text, or the text if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
