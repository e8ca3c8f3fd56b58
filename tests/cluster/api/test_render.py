"""Chat templates write what the model was trained on, in a sandbox with bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from diptych.cluster.api.render import INLINE_CHARS, Renderer
from diptych.cluster.api.template import compile_template
from diptych.cluster.api.testing import TEMPLATE, byte_level_tokenizer
from diptych.cluster.config import default_cache_dir
from diptych.cluster.models import resolve
from diptych.protos.errors import ContextTooLong, DiptychError, InvalidRequest, StartupError
from diptych.protos.messages import Message, said

TURNS = (said("developer", "be brief"), said("user", "hi"))


def rendered(template: str | None, turns: tuple[Message, ...] = TURNS) -> str:
    renderer = Renderer(byte_level_tokenizer(), template, variables={"bos_token": "<s>"})
    try:
        return renderer.chat_text(turns)
    finally:
        renderer.close()


def test_the_conversation_ends_where_the_assistant_begins() -> None:
    assert rendered(TEMPLATE) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_templates_see_special_tokens_and_their_usual_functions() -> None:
    assert rendered("{{ bos_token }}{{ messages | length }}{{ messages[0] | tojson }}") == (
        '<s>2{"role": "system", "content": "be brief"}'
    )
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        rendered("{{ raise_exception('roles must alternate') }}")


def test_a_model_without_template_says_so() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        rendered(None)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 400000000 }}",
        "{{ 400000000 * ['x'] }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
        "{{ 10 ** 10 ** 8 }}",
        "{{ '%400000000d' % 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ 'x'.format_map }}{{ ('%s' | format('x')) }}",
    ],
)
def test_a_hostile_template_gets_a_refusal_in_bounded_time(template: str) -> None:
    with pytest.raises(DiptychError):
        rendered(template)


def test_a_broken_template_is_found_at_start_up() -> None:
    with pytest.raises(StartupError, match="broken"):
        compile_template("{% for %}")
    with pytest.raises(StartupError, match="limit"):
        compile_template(" " * 300_000)


async def test_short_and_long_texts_give_the_tokenizers_ids() -> None:
    renderer = Renderer(byte_level_tokenizer(), None)
    for text in ("hello", "hello world " * (INLINE_CHARS // 6)):
        ids = await renderer.encode(text, add_special=False, max_tokens=1 << 20, param="prompt")
        assert list(ids) == renderer.tokenizer.encode(text).ids
    with pytest.raises(ContextTooLong, match="at least"):
        await renderer.encode("x" * 10_000_000, add_special=False, max_tokens=100, param="prompt")
    renderer.close()


def test_a_missing_tokenizer_is_a_startup_error(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"tokenizer\.json"):
        Renderer.load(tmp_path, None)


def test_the_default_models_template_matches_transformers() -> None:
    folder = resolve("smollm2-135m-instruct", default_cache_dir(), lambda _: None)
    renderer = Renderer.load(folder.path, folder.facts.chat_template)
    text = renderer.chat_text([said("user", "hi")])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    renderer.close()
