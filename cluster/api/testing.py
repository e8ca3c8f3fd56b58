"""A whole front door for tests and measurements: listener, app, router and two echo engines, with a small tokenizer.

No model, no network beyond loopback and unix sockets.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from diptych.cluster.browser_settings import BrowserSettings
from diptych.cluster.config import LimitSettings, ResponsesSettings, RouterSettings, TenantSettings
from diptych.cluster.formats.format import Format
from diptych.cluster.gateway.settings import GatewaySettings
from diptych.cluster.gateway.target import Target
from diptych.cluster.keys import ApiKeys
from diptych.cluster.models import NO_DEFAULTS, SamplingDefaults
from diptych.cluster.providers.settings import ProviderSettings
from diptych.cluster.router.rig import until
from diptych.cluster.router.router import Router
from diptych.cluster.router.testing import EchoEngine, StaticDirectory
from diptych.cluster.store.database import Store
from diptych.cluster.store.testing import temporary_store
from diptych.protos.types import Role

from .app import create_app
from .listener import Listener, start_listener
from .render import Renderer
from .served import NO_FORMAT, ServedModel

if TYPE_CHECKING:  # most front doors have no routes
    from diptych.cluster.gateway.gateway import Gateway

    from .routed import RoutedModels

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
    store: Store
    routes: RoutedModels | None  # with `gateway`

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
    store: Store | None = None,
    *,
    template: str = TEMPLATE,
    format: Format = NO_FORMAT,
    responses: ResponsesSettings | None = None,
    browser: BrowserSettings | None = None,
    tenants: dict[str, TenantSettings] | None = None,
    gateway: GatewaySettings | None = None,
    targets: Sequence[Target] = (),
    providers: Mapping[str, ProviderSettings] | None = None,
) -> AsyncIterator[FrontDoor]:
    """Everything started, both engines connected; everything stopped afterwards. `defaults`, `template` and `format`
    are the model's; a `tokenizer` must know ChatML's special tokens; a `store` is started, by default a temporary one.
    With `gateway` its routes lead to the model, to `targets` and to `providers`.
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
        responses = responses or ResponsesSettings()
        settings = RouterSettings(
            limits=limits or LimitSettings(),
            connect_timeout_s=2,
            responses=responses,
            browser=browser or BrowserSettings(),
            tenants=tenants or {},
        )
        router = Router(directory=directory, settings=settings, is_strict=True)
        await router.start()
        stack.push_async_callback(router.stop)
        tokenizer = tokenizer or byte_level_tokenizer()
        served = ServedModel(
            name=MODEL,
            renderer=Renderer(tokenizer, template),
            vocab_size=tokenizer.get_vocab_size(),
            max_context_tokens=2048,
            eos_token_ids=frozenset(tokenizer.encode("<|im_end|>").ids),
            defaults=defaults,
            format=format,
        )
        stack.callback(served.renderer.close)
        if store is None:
            store = await stack.enter_async_context(temporary_store(router.metrics))
        routes = None
        if gateway is not None:
            from .routed import RoutedModels

            made = make_gateway(gateway, router, served, targets, providers)
            stack.push_async_callback(made.aclose)
            routes = RoutedModels(made, router)
        app = create_app(router, [served], keys, store=store, routes=routes)
        stack.push_async_callback(app.state.background.stop)
        listener = await start_listener(app, host="127.0.0.1", port=0, limits=settings.limits, metrics=router.metrics)
        stack.push_async_callback(listener.stop, 0.2)
        await until(lambda: router.is_ready(MODEL) and all(session.is_ready for session in router.view.sessions()))
        yield FrontDoor(listener, router, directory, engines[0], engines[1], served, store, routes)


def make_gateway(
    settings: GatewaySettings,
    router: Router,
    served: ServedModel,
    targets: Sequence[Target] = (),
    providers: Mapping[str, ProviderSettings] | None = None,
) -> Gateway:
    """A front door's, to be closed: its routes may lead to the own model, to `targets` and to `providers`."""
    from diptych.cluster.gateway.gateway import Gateway
    from diptych.cluster.gateway.money import money_ports
    from diptych.cluster.providers.registry import Registry

    from .pool_target import pool_targets

    own = pool_targets(router, [served])
    registry = Registry.load(providers, {})
    return Gateway(settings, registry, targets=[*own, *targets], ports=money_ports(settings))
