"""Chat templates."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from stochgrad.core import check_flag, describe, first_line


def rendered(
    model: Any, messages: Sequence[Mapping[str, str]], begin_answer: bool, names: dict[str, Any]
) -> str:
    """Messages by a model's template, in Jinja's sandbox."""
    check_flag("begin_answer", begin_answer)
    if model.chat_template is None:
        raise ValueError("this model has no chat template: write its prompts by hand.")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(
            f"messages must be a list of {{'role': ..., 'content': ...}}, got {describe(messages)}."
        )
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError("chat needs jinja2: pip install 'stochgrad[llm]'.") from error

    def refuse(reason):
        raise ValueError(reason)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, **options: json.dumps(
        x, ensure_ascii=False, **options
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    known = {"bos_token": model.bos_token, "eos_token": model.tokenizer.id_to_token(model.end)}
    try:
        template = environment.from_string(model.chat_template)
        return template.render(
            messages=messages, add_generation_prompt=begin_answer, **{**known, **names}
        )
    except Exception as error:
        raise ValueError(f"the chat template refuses the messages: {first_line(error)}.") from error
