"""Chat rows as text: through the tokenizer's template, or as plain lines."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from crosslens.errors import CrosslensError, UsageError
from crosslens.text.documents import Messages

Style: TypeAlias = Literal["template", "plain"]

_PLAIN = "Set chat to plain for `User:`/`Assistant:` lines instead."


def format_chat(messages: Messages, style: Style, tokenizer: Any, provenance: str) -> str:
    """One conversation as text.

    `plain` gives paragraphs `User: ...` and `Assistant: ...`; `template` is what
    `tokenizer.apply_chat_template` writes, with its special tokens as text.
    """
    if style == "plain":
        return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)
    if not tokenizer.chat_template:
        raise UsageError(
            f"{provenance} is chat, but this model's tokenizer has no chat template "
            f"(base models often have none). {_PLAIN}"
        )
    if not messages:
        return ""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        raise CrosslensError(
            f"{provenance}: the tokenizer's chat template refuses this conversation: {error}. "
            f"Its roles are {', '.join(m['role'] for m in messages)}. {_PLAIN}"
        ) from error
