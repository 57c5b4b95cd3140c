"""The chat format of a model from another project: a template in Jinja, which writes a conversation as one text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from string import Template
from typing import Any

from jaxchat.errors import UserError, first_line, require
from jaxchat.tokenizer.chat_format import CHAT_FORMATS, ChatFormat, Malformed

Region = tuple[int, int]  # Begin and end of a part of a text, in characters.

_TEMPLATE = Template("""\
{{- '$bos' -}}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- if messages | length < 2 or messages[1]['role'] != 'user' -%}
{{- raise_exception('a system message must be followed by a user message') -}}
{%- endif -%}
{%- set before = messages[0]['content'] + '\\n\\n' if messages[0]['content'] else '' -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set before = '' -%}
{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}
{{- raise_exception('user and assistant must take turns, the user first') -}}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{- '$user_begin' + (before if loop.first else '') + message['content'] + '$user_end' -}}
{%- else -%}
{{- '$assistant_begin' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
$parts{%- else -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '$assistant_end' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '$assistant_begin' -}}
{%- endif -%}
""")
_PART = Template("""\
{%- elif part['type'] == '$kind' -%}
{{- '$begin' + part['text'] + '$end' -}}
""")
_NO_PARTS = "{%- if false -%}\n"

NO_TEMPLATE = (
    "this model has no chat template, so it only continues texts: use --style=text, or put a chat_template.jinja "
    "beside its tokenizer_config.json and import it again"
)


@dataclass(frozen=True)
class JinjaFormat(ChatFormat):
    """A chat format without marks of its own: what is special, the template writes.

    Attributes:
        source: the template; None for a model that only continues texts.
        last: the special token that ends the assistant's turn.
        names: what the template calls special tokens, such as {"eos_token": "</s>"}.
    """

    source: str | None = None
    last: str = ""
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def end(self) -> str:
        return self.last

    @property
    def required(self) -> str:
        """The template; raises `UserError` if there is none."""
        if self.source is None:
            raise UserError(NO_TEMPLATE)
        return self.source

    def text(self, messages: Sequence[Mapping[str, str]], *, prompt: bool = False) -> str:
        """The conversation as a text with names of special tokens; with `prompt`, up to the assistant's next answer.

        Raises:
            Malformed: the template refuses the conversation, or takes too long.
            UserError: there is no template, or it is not valid.
        """
        return _unmarked(self._marked(messages, prompt=prompt))[0]

    def targets(
        self, messages: Sequence[Mapping[str, str]], silent: Sequence[bool], *, everything: bool = False
    ) -> tuple[str, list[Region]]:
        """The conversation as a text, and the parts of it that are training targets.

        These are what the template marks by `{% generation %}`. Without marks, an answer begins where the prompt of
        the messages before it ends, and ends with the token that ends a turn. `silent` messages are no targets.

        Raises:
            Malformed: as `text`; or the text of the first messages is not the beginning of the whole text, so that
                it cannot be said which message a part of the text belongs to.
        """
        text, marked = _unmarked(self._marked(messages, prompt=False))
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if everything:
            return text, list(self._outside(text, messages, silent))
        if not marked:
            return text, [self._answer(text, messages, i) for i in answers if not silent[i]]
        if any(silent[i] for i in answers):
            if len(marked) != len(answers):
                sentence = f"the chat template marks {len(marked)} answers of {len(answers)}, some of weight 0"
                raise Malformed("answers cannot be matched", sentence)
            marked = [region for region, i in zip(marked, answers) if not silent[i]]
        return text, marked

    def _answer(self, text: str, messages: Sequence[Mapping[str, str]], index: int) -> Region:
        start = self._prefix(text, messages[:index], prompt=True)
        found = text.find(self.last, start)
        return start, found + len(self.last) if found >= 0 else self._prefix(text, messages[: index + 1])

    def _outside(self, text: str, messages: Sequence[Mapping[str, str]], silent: Sequence[bool]) -> Iterator[Region]:
        """What lies between silent messages."""
        start = 0
        for i in (i for i, one in enumerate(silent) if one):
            yield start, self._prefix(text, messages[:i]) if i else 0
            start = self._prefix(text, messages[: i + 1])
        yield start, len(text)

    def _prefix(self, text: str, messages: Sequence[Mapping[str, str]], *, prompt: bool = False) -> int:
        """Length of the text of the first messages."""
        begin = self.text(messages, prompt=prompt)
        if not text.startswith(begin):
            raise Malformed(
                "turns rewritten by the chat template",
                f"the chat template writes the first {len(messages)} messages in another way once others follow: mark "
                "what the assistant says in it with {% generation %} and {% endgeneration %}",
            )
        return len(begin)

    def _marked(self, messages: Sequence[Mapping[str, str]], *, prompt: bool) -> str:
        source = self.required
        require("jinja2", "chat templates need jinja2", "convert")
        import jinja2

        from jaxchat.tokenizer import jinja

        values: dict[str, Any] = {"messages": [dict(message) for message in messages], "add_generation_prompt": prompt}
        values |= {"tools": None, "documents": None, **self.names}
        try:
            return jinja.render(source, values)
        except jinja2.TemplateSyntaxError as error:
            sentence = f"the chat template is not valid in line {error.lineno}: {first_line(error)}"
            raise UserError(f"{sentence}; correct it, or remove it and import the model again") from None
        except (jinja2.TemplateError, *jinja.RAISED) as error:
            sentence = f"the model's chat template refuses this conversation: {first_line(error).rstrip('.')}"
            raise Malformed("refused by the chat template", sentence) from None


def template(chat_format: ChatFormat) -> str:
    """What `render` does as a Jinja template with special tokens spelled out, for other programs.

    Raises:
        UserError: the model has no chat template.
    """
    if isinstance(chat_format, JinjaFormat):
        return chat_format.required
    parts = [_PART.substitute(kind=kind, begin=part.begin, end=part.end) for kind, part in chat_format.parts.items()]
    names = {"bos": chat_format.bos, "parts": "".join(parts).replace("elif", "if", 1) or _NO_PARTS}
    for role, turn in chat_format.turns.items():
        names |= {f"{role}_begin": turn.begin, f"{role}_end": turn.end}
    return _TEMPLATE.substitute(names)


def known(source: str | None) -> ChatFormat | None:
    """The chat format of ours that a template writes, or None."""
    forms = CHAT_FORMATS.values()
    return next((form for form in forms if source is not None and source.strip() == template(form).strip()), None)


def _unmarked(text: str) -> tuple[str, list[Region]]:
    """A text without marks, and what lay between them."""
    from jaxchat.tokenizer.jinja import BEGIN, END

    first, *others = text.split(BEGIN)
    parts, regions, size = [first], [], len(first)
    for other in others:
        inside, _, after = other.partition(END)
        regions.append((size, size + len(inside)))
        parts += [inside, after]
        size += len(inside) + len(after)
    return "".join(parts).replace(END, ""), regions
