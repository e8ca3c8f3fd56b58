"""A whole front door for tests and measurements: listener, app, router and two echo engines, with a small tokenizer.

No model, no network beyond loopback and unix sockets.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from diptych.cluster.config import LimitSettings, RouterSettings
from diptych.cluster.keys import ApiKeys
from diptych.cluster.models import NO_DEFAULTS, SamplingDefaults
from diptych.cluster.router.rig import until
from diptych.cluster.router.router import Router
from diptych.cluster.router.testing import EchoEngine, StaticDirectory
from diptych.protos.types import Role

from .app import create_app
from .listener import Listener, start_listener
from .render import Renderer
from .served import ServedModel

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MODEL = "echo"


def byte_level_tokenizer() -> Tokenizer:
    """About 300 tokens, every byte among them, ChatML's special tokens and an added plain one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox says hello to the world", "a b c stop here"] * 4, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("[plain added]", special=False)])
    return tokenizer


@dataclass
class FrontDoor:
    """A whole front door. `prefill` and `decode` are its engines."""

    listener: Listener
    router: Router
    directory: StaticDirectory
    prefill: EchoEngine
    decode: EchoEngine
    served: ServedModel

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the served model."""
        return self.served.renderer.tokenizer

    async def decode_alone(self) -> None:
        """Let the prefill engine leave: one engine tells token 0 and a failure after it in order, two may race."""
        self.directory.set([self.decode.info])
        await until(lambda: not self.router.view.has_pool(MODEL, Role.PREFILL))

    def end_token(self) -> int:
        """The one token that ends an answer."""
        (token,) = self.served.eos_token_ids
        return token


@asynccontextmanager
async def front_door(
    limits: LimitSettings | None = None,
    step_s: float = 0.0,
    defaults: SamplingDefaults = NO_DEFAULTS,
    tokenizer: Tokenizer | None = None,
    keys: ApiKeys | None = None,
) -> AsyncIterator[FrontDoor]:
    """Everything started, both engines connected; everything stopped afterwards. `defaults` are the model's; a
    `tokenizer` must know ChatML's special tokens.
    """
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines = []
        for role in (Role.PREFILL, Role.DECODE):
            engine = EchoEngine(
                f"unix:{folder}/{role}", engine_id=f"{role}-0", roles=frozenset({role}), model=MODEL, step_s=step_s
            )
            await engine.start()
            stack.push_async_callback(engine.stop)
            engines.append(engine)
        directory = StaticDirectory([engine.info for engine in engines])
        settings = RouterSettings(limits=limits or LimitSettings(), connect_timeout_s=2)
        router = Router(directory=directory, settings=settings)
        await router.start()
        stack.push_async_callback(router.stop)
        tokenizer = tokenizer or byte_level_tokenizer()
        served = ServedModel(
            name=MODEL,
            renderer=Renderer(tokenizer, TEMPLATE),
            vocab_size=tokenizer.get_vocab_size(),
            max_context_tokens=2048,
            eos_token_ids=frozenset(tokenizer.encode("<|im_end|>").ids),
            defaults=defaults,
        )
        stack.callback(served.renderer.close)
        app = create_app(router, [served], keys)
        listener = await start_listener(app, host="127.0.0.1", port=0, limits=settings.limits, metrics=router.metrics)
        stack.push_async_callback(listener.stop, 0.2)
        await until(lambda: router.is_ready(MODEL) and all(session.is_ready for session in router.view.sessions()))
        yield FrontDoor(listener, router, directory, engines[0], engines[1], served)
