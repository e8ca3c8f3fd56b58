"""Engines of the role embed, a router and its HTTP listener in this process, without Ray; and tiny models for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import torch
from pair import raise_failure
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertModel

from diptych.cluster.api.app import create_app
from diptych.cluster.api.listener import Listener, start_listener
from diptych.cluster.api.text_model import TextModel
from diptych.cluster.batches.runner import BatchRunner
from diptych.cluster.config import LimitSettings, ModelSettings, RouterSettings
from diptych.cluster.engine.embed_engine import EmbedEngine
from diptych.cluster.engine.spec import EngineSpec
from diptych.cluster.models import ModelFolder, resolve
from diptych.cluster.router.rig import until
from diptych.cluster.router.router import Router
from diptych.cluster.router.testing import StaticDirectory
from diptych.cluster.security import trust_of
from diptych.cluster.store.testing import temporary_store
from diptych.cluster.tasks import text_facts
from diptych.protos.faults import FaultSettings
from diptych.protos.settings import EmbedPoolSettings, TransferSettings
from diptych.protos.status import EngineInfo
from diptych.protos.trust import ROUTER
from diptych.protos.types import EngineId, EngineRef, Role

WORDS = "the a cat dog sat on mat ran in park red blue sky sea is was not one two three four five query".split()
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SECRET = bytes(32)
WAIT_S = 30
_SIZES: dict[str, Any] = {
    "vocab_size": len(SPECIALS) + len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "initializer_range": 0.5,
}


def tiny_tokenizer(*, is_bert: bool = True) -> Tokenizer:
    """One token a word; BERT's around a text, or an end token behind it."""
    vocabulary = {word: number for number, word in enumerate((*SPECIALS, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIALS))
    single, pair = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1") if is_bert else ("$A [SEP]", "$A [SEP] $B [SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def make_encoder(folder: Path, *, pooling: str = "mean", normalize: bool = True, seed: int = 0) -> Path:
    """A BERT with random weights and the files of sentence-transformers."""
    config = BertConfig(**_SIZES, pad_token_id=0)
    _saved(folder, config, BertModel(config, add_pooling_layer=False), seed)
    return sentence_files(folder, pooling, normalize=normalize)


def make_decoder(folder: Path, model_type: str = "qwen3", seed: int = 0) -> Path:
    """A causal model with random weights and nothing beside it."""
    from diptych.kernels.testing import make_tiny_checkpoint

    make_tiny_checkpoint(folder, model_type, seed, vocab_size=_SIZES["vocab_size"], max_position_embeddings=48)
    write_tokenizer(folder, tiny_tokenizer(is_bert=False))
    return folder


def make_ranker(folder: Path, *, activation: str | None = None, num_labels: int = 1, seed: int = 0) -> Path:
    """A BERT with a head for pairs."""
    extra = {} if activation is None else {"sentence_transformers": {"activation_fn": activation}}
    config = AutoConfig.for_model("bert", **_SIZES, pad_token_id=0, num_labels=num_labels, **extra)
    build: Any = AutoModelForSequenceClassification.from_config
    return _saved(folder, config, build(config), seed)


def _saved(folder: Path, config: Any, model: Any, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.5)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_tokenizer(folder, tiny_tokenizer())
    return folder


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """As transformers would find it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    known: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 48} | names
    known["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(known))


def sentence_files(folder: Path, pooling: str, *, normalize: bool) -> Path:
    """What sentence-transformers writes beside a model."""
    steps = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{step}"}
        for number, (step, path) in enumerate(zip(steps, paths, strict=False))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(
        json.dumps({"word_embedding_dimension": _SIZES["hidden_size"], "pooling_mode": pooling})
    )
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24, "do_lower_case": False}))
    return folder


@dataclass
class TextCluster:
    """Running; made by `text_cluster`. `engines` by name, such as embed-0."""

    router: Router
    listener: Listener
    directory: StaticDirectory
    engines: dict[str, EmbedEngine] = field(default_factory=dict)
    infos: dict[EngineRef, EngineInfo] = field(default_factory=dict)

    async def post(self, path: str, **body: object) -> httpx2.Response:
        """The answer to a body."""
        async with httpx2.AsyncClient() as client:
            return await client.post(f"{self.listener.url}{path}", json=body, timeout=WAIT_S)

    async def get(self, path: str) -> Any:
        """The JSON of a page."""
        async with httpx2.AsyncClient() as client:
            reply = await client.get(f"{self.listener.url}{path}", timeout=WAIT_S)
        return reply.json()

    async def kill(self, name: str) -> None:
        """Cut its connections in mid-call, as the death of its process does; the directory learns of it at once."""
        engine = self.engines.pop(name)
        await asyncio.to_thread(engine._asyncio_thread.call, engine._server.stop(None), WAIT_S)
        self.infos = {ref: info for ref, info in self.infos.items() if ref.engine_id != name}
        self.directory.set(list(self.infos.values()))
        await asyncio.to_thread(engine.stop)

    def count(self, name: str) -> float:
        """The sum of a counter over all engines."""
        return sum(engine.status().counters[name] for engine in self.engines.values())


@asynccontextmanager
async def text_cluster(
    run_dir: Path,
    folders: Mapping[str, Path],
    *,
    num: int = 1,
    settings: ModelSettings | None = None,
    limits: LimitSettings | None = None,
    faults: FaultSettings | None = None,
    generators: Mapping[str, Any] | None = None,
) -> AsyncIterator[TextCluster]:
    """`num` engines of each model in `folders` (by name). What a folder says of its task wins over `settings`."""
    async with AsyncExitStack() as stack:
        trust, infos, engines, served = trust_of_all(), {}, {}, []
        for name, path in folders.items():
            folder = await asyncio.to_thread(resolve, str(path), run_dir)
            wanted = settings or ModelSettings(embed=EmbedPoolSettings(threads=1))
            if wanted.task == "auto":
                wanted = wanted.model_copy(update={"task": folder.facts.task})
            for _ in range(num):
                spec = _spec(folder, run_dir, name, wanted, f"embed-{len(engines)}")
                spec = spec if faults is None else _with(spec, faults)
                engine = EmbedEngine(spec, on_failure=raise_failure, trust=trust(spec.ref.engine_id.partition("-")[0]))
                info = (await asyncio.to_thread(engine.start)).info
                infos[info.ref], engines[info.ref.engine_id] = info, engine
            facts = text_facts(name, wanted, folder)
            assert facts is not None
            served.append(TextModel.load(name, folder, facts, truncate=wanted.embed.truncate))
            stack.callback(served[-1].close)
        directory = StaticDirectory(list(infos.values()))
        router_settings = RouterSettings(limits=limits or LimitSettings(), connect_timeout_s=2)
        router = Router(directory=directory, settings=router_settings, trust=trust(ROUTER), is_strict=True)
        await router.start()
        stack.push_async_callback(router.stop)
        store = await stack.enter_async_context(temporary_store(router.metrics))
        app = create_app(router, [*served, *(generators or {}).values()], store=store)
        batches = BatchRunner(router, [*served, *(generators or {}).values()], store)
        await batches.start()
        stack.push_async_callback(batches.stop)
        listener = await start_listener(
            app, host="127.0.0.1", port=0, limits=router_settings.limits, metrics=router.metrics
        )
        stack.push_async_callback(listener.stop, 0.2)
        made = TextCluster(router, listener, directory, dict(engines), dict(infos))
        stack.push_async_callback(_end, made)
        await until(lambda: router.view.is_complete and all(session.is_ready for session in router.view.sessions()))
        yield made
        await until(lambda: router.in_flight == {} and router.admission.running == 0)


async def _end(made: TextCluster) -> None:
    for engine in made.engines.values():
        await asyncio.to_thread(engine.stop)


def trust_of_all() -> Any:
    """One secret for all processes."""
    from diptych.cluster.config import SecuritySettings

    return lambda name: trust_of(SecuritySettings(), SECRET, name)


def _with(spec: EngineSpec, faults: FaultSettings) -> EngineSpec:
    from dataclasses import replace

    return replace(spec, faults=faults)


def _spec(folder: ModelFolder, run_dir: Path, name: str, settings: ModelSettings, engine: str) -> EngineSpec:
    return EngineSpec(
        engine_id=EngineId(engine),
        epoch=1,
        roles=frozenset({Role.EMBED}),
        model=name,
        settings=settings.model_copy(update={"device": "cpu"}),
        transfer=TransferSettings(),
        folder=folder.path,
        facts=folder.facts,
        text=text_facts(name, settings, folder),
        dtype="float32",
        run_dir=run_dir,
        cores=1,
    )
