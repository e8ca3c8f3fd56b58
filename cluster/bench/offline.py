"""`diptych bench offline`: engines in this process, every request submitted at once, timed to the last token.

No HTTP, no Ray, no router: the figure that the rest of the cluster is measured against. Greedy, end tokens ignored.
This file reads the command line and tells what was measured on; batches.py measures.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.cluster.config import DiptychConfig, ModelSettings, load_config
from diptych.cluster.control.plan import choose_dtype
from diptych.cluster.engine.spec import EngineSpec
from diptych.cluster.models import ModelFolder, resolve
from diptych.protos.echo import ECHO
from diptych.protos.errors import StartupError
from diptych.protos.status import EngineInfo
from diptych.protos.types import GENERATING, EngineId, Role

from .batches import ENGINE, SESSION, Run, measure, measure_session, trace
from .figures import PeakMemory, regime, save_result, system, write_result
from .provenance import CardWatch, provenance
from .shapes import SHAPES, shape_of, write_shape
from .workload import Workload, parse_workload, read_prompts

if TYPE_CHECKING:
    from diptych.cluster.engine.offline import OfflineEngines

NATIVE, GENERIC = "native", "generic"  # who computes on a card: hand-written code where there is some, or transformers'
_ONE_BATCH = 1 << 20  # requests that may wait: all of them
_SHAPE_KEYS = (
    *("architectures", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "sliding_window"),
    *("tie_word_embeddings", "max_position_embeddings"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineOptions:
    """The command line, as it was written."""

    config: Path | None = None
    overrides: Sequence[str] = ()
    model: str | None = None
    random_weights: bool = False
    layout: str | None = None
    workloads: Sequence[str] = ()
    prompts: Path | None = None
    output: int | None = None
    repeats: int = 1
    kv_gib: float | None = None
    through: Sequence[str] = ()  # of "engine", "session"; empty: the engine
    path: str = NATIVE
    profile: Path | None = None
    json_out: Path | None = None


def run_offline(options: OfflineOptions, began: float) -> None:
    """Measure and print. `began`: when the process started, on the monotonic clock. Raises DiptychError."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="diptych-bench-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        name, settings, config = _settings(options)
        model = _model(name, settings, config, folder)
        runs = _runs(options, model)
        specs = _on_path(options.path, _specs(name, settings, config, model, folder))
        through = _through(options, settings)
        memory = stack.enter_context(PeakMemory())
        card = stack.enter_context(CardWatch())
        # torch and transformers, after everything that may be wrong with the command line
        from diptych.cluster.engine.offline import OfflineEngines

        engines = OfflineEngines(specs, has_sessions=SESSION in through)
        stack.callback(engines.stop)
        infos = engines.start()
        startup_s = time.monotonic() - began
        room = min(info.max_context_tokens for info in infos)
        for run in runs:
            _check_room(run, room, name)
        _head(name, settings, infos)
        for plan in engines.memory_plans:
            print(plan)
        result: dict[str, Any] = {"system": system(), "model": name, "startup_s": round(startup_s, 2)}
        result |= _circumstances(settings, model, infos) | {"through": list(through), "path": options.path}
        result["timeline_s"] = _timeline(engines, startup_s)
        engines.settle()
        result["settled_s"] = round(time.monotonic() - began, 2)
        for run in runs:
            key = run.workload.name
            if ENGINE in through:
                result[key] = measure(engines, run, options.repeats, card)
            if SESSION in through:
                told = measure_session(engines, run, options.repeats, card, bare=result.get(key))
                result[key if ENGINE not in through else f"{key} through session"] = told
            result |= engines.report() | {"peak_memory_mib": memory.peak_bytes >> 20}
            save_result(result, options.json_out)  # a run that is ended early has left what it had
        if options.profile is not None:
            _trace(engines, runs, options, result)
    result["peak_memory_mib"] = memory.peak_bytes >> 20
    stages = ", ".join(f"{stage} {seconds:g}" for stage, seconds in result["timeline_s"].items())
    print(f"ready after {startup_s:.1f} s: {stages}; nothing left to prepare after {result['settled_s']:.1f} s")
    print(_memory_line(result))
    write_result(result, options.json_out)


def _trace(engines: OfflineEngines, runs: Sequence[Run], options: OfflineOptions, result: Mapping[str, Any]) -> None:
    """After all figures: a tracer that fails costs none of them."""
    assert options.profile is not None
    found = {run.workload.name: trace(engines, run, options.repeats, result[run.workload.name]) for run in runs}
    try:
        options.profile.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except OSError as exc:
        raise StartupError(f"cannot write --profile {options.profile}: {exc.strerror}") from exc


def _timeline(engines: OfflineEngines, startup_s: float) -> dict[str, float]:
    """Where the time until ready went, engines added up; "process" is what came before: interpreter, imports."""
    found = {"process": startup_s - sum(seconds for _, seconds in engines.timeline)}
    for stage, seconds in engines.timeline:
        found[stage] = found.get(stage, 0.0) + seconds
    return {stage: round(seconds, 2) for stage, seconds in found.items()}


def _head(name: str, settings: ModelSettings, infos: Sequence[EngineInfo]) -> None:
    print(f"{name}, {settings.weights} weights, {infos[-1].dtype}, {settings.layout}; {regime()}")
    print("all requests at once, greedy, end tokens ignored; no warm-up but the engine's own")
    for line in sorted({choice for info in infos for choice in info.degraded}):
        print(f"degraded: {line}")


def _circumstances(settings: ModelSettings, model: ModelFolder, infos: Sequence[EngineInfo]) -> dict[str, Any]:
    """What a reader needs to judge the figures, or to get them again."""
    return provenance() | {
        "weights": settings.weights,
        "layout": settings.layout,
        "shape": _shape(model),
        "config": settings.model_dump(mode="json", exclude={"source"}),
        "degraded": sorted({choice for info in infos for choice in info.degraded}),
    }


def _shape(model: ModelFolder) -> dict[str, Any]:
    """What decides the model's speed, of its config.json; of the echo model, which has none, that of its KV."""
    facts = model.facts
    found = {"layers": facts.layers, "kv_heads": facts.kv_heads, "head_dim": facts.head_dim}
    file = model.path / "config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    config |= config.get("text_config") or {}
    return found | {"vocab_size": facts.vocab_size} | {key: config[key] for key in _SHAPE_KEYS if key in config}


def _memory_line(result: Mapping[str, Any]) -> str:
    sizes = {"host peak": result["peak_memory_mib"], **result["memory_mib"]}
    told = ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in sizes.items())
    return f"memory, MiB: {told}; KV of {result['kv_tokens']:,} tokens; {result['device']}"


def _on_path(path: str, specs: list[EngineSpec]) -> list[EngineSpec]:
    if path not in (NATIVE, GENERIC):
        raise StartupError(f"--path {path}: there is {NATIVE} and {GENERIC}")
    if path == GENERIC and any(spec.device == "cpu" for spec in specs):
        raise StartupError(f"--path {GENERIC} compares two ways of computing on a card, and these engines have none")
    return [replace(spec, by_hand=path == NATIVE) for spec in specs]


def _through(options: OfflineOptions, settings: ModelSettings) -> tuple[str, ...]:
    through = tuple(dict.fromkeys(options.through)) or (ENGINE,)
    for way in through:
        if way not in (ENGINE, SESSION):
            raise StartupError(f"--through {way}: there is {ENGINE} and {SESSION}; both for their ratio")
    if SESSION in through and settings.layout != "colocated":
        raise StartupError(f"--through {SESSION} measures one engine: --layout colocated")
    if options.profile is not None and ENGINE not in through:
        raise StartupError(f"--profile traces steps of the bare engine: add --through {ENGINE}")
    return through


def _settings(options: OfflineOptions) -> tuple[str, ModelSettings, DiptychConfig]:
    config = load_config(options.config, options.overrides, options.model, kv_gib=options.kv_gib)
    if len(config.models) > 1:
        raise StartupError(f"the configuration has several models: choose with --model {' or '.join(config.models)}")
    ((name, settings),) = config.models.items()
    if options.random_weights and settings.source == ECHO:
        raise StartupError(f"the model {ECHO} has no weights; drop it or --random-weights")
    layout = options.layout
    if layout is None:  # a decode engine alone, unless the configuration wants something else
        chosen = {"layout", "prefill"} & settings.model_fields_set
        layout = settings.layout if chosen else "colocated"
    if layout not in ("colocated", "disaggregated"):
        raise StartupError(f"--layout {layout}: there is colocated and disaggregated")
    if layout == "disaggregated" and (settings.prefill.engines, settings.decode.engines) != (1, 1):
        raise StartupError("bench offline runs one engine of each pool: set prefill.engines and decode.engines to 1")
    if layout == "colocated" and settings.decode.engines != 1:
        raise StartupError("bench offline runs one engine: set decode.engines to 1")
    update: dict[str, Any] = {"layout": layout}
    if options.random_weights:
        update["weights"] = "random"
    for pool in GENERATING:
        update[pool.value] = getattr(settings, pool).model_copy(update={"max_waiting": _ONE_BATCH})
    if "pace" not in settings.decode.model_fields_set:  # nobody waits for a single answer here
        update["decode"] = update["decode"].model_copy(update={"pace": "throughput"})
    return name, settings.model_copy(update=update), config


def _model(name: str, settings: ModelSettings, config: DiptychConfig, folder: Path) -> ModelFolder:
    source = settings.source
    if source in SHAPES:
        if settings.has_weights:
            raise StartupError(f"{source} is the shape of a model without weights: add --random-weights")
        return write_shape(source, folder)
    path = Path(source).expanduser()
    if not settings.has_weights and path.is_dir():
        return shape_of(path.resolve(), name)
    return resolve(source, config.cache_dir, print, echo=settings.echo, has_weights=settings.has_weights)


def _runs(options: OfflineOptions, model: ModelFolder) -> list[Run]:
    vocab_size = model.facts.vocab_size
    runs = [Run(parse_workload(text), None, vocab_size) for text in options.workloads]
    if (options.prompts is None) != (options.output is None):
        raise StartupError("--prompts FILE and --output N (tokens to generate) belong together")
    if options.prompts is not None and options.output is not None:
        given = tuple(tuple(prompt) for prompt in _encoded(options.prompts, model))
        if wrong := [token for prompt in given for token in prompt if token >= vocab_size]:
            raise StartupError(f"{options.prompts} holds the token id {wrong[0]}; the model's end at {vocab_size - 1}")
        longest = max(map(len, given))
        runs.append(Run(Workload(options.prompts.name, len(given), longest, options.output), given, vocab_size))
    if not runs:
        raise StartupError("nothing to measure: give --workload, or --prompts and --output")
    names = [run.workload.name for run in runs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise StartupError(f"the workload {twice.pop()} is given twice; --repeats repeats it")
    return runs


def _encoded(path: Path, model: ModelFolder) -> list[list[int]]:
    from tokenizers import Tokenizer

    @lru_cache(1)
    def tokenizer() -> Any:
        file = model.path / "tokenizer.json"
        if not file.is_file():
            raise StartupError(f"{path} holds texts, and the model has no {file}: use token ids")
        return Tokenizer.from_file(str(file))

    def encode(text: str) -> list[int]:
        return list(tokenizer().encode(text).ids)

    return [prompt for prompt in read_prompts(path, encode) if isinstance(prompt, list)]


def _specs(
    name: str, settings: ModelSettings, config: DiptychConfig, model: ModelFolder, folder: Path
) -> list[EngineSpec]:
    """The decode engine is the last one."""
    roles = [Role.DECODE] if settings.layout == "colocated" else [Role.PREFILL, Role.DECODE]
    specs = [
        EngineSpec(
            engine_id=EngineId(f"{role}-0"),
            epoch=1,
            roles=frozenset({role}),
            model=name,
            settings=settings,
            transfer=config.transfer,
            folder=model.path,
            facts=model.facts,
            dtype=settings.dtype,
            run_dir=folder,
            cores=max(1, len(os.sched_getaffinity(0)) // len(roles)),
        )
        for role in roles
    ]
    return [replace(spec, dtype=choose_dtype(settings, spec.device)[0]) for spec in specs]


def _check_room(run: Run, room: int, name: str) -> None:
    work = run.workload
    if work.input_tokens + work.output_tokens > room:
        raise StartupError(
            f"{work.name} needs a context of {work.input_tokens + work.output_tokens} tokens and there are {room}: "
            f"raise models.{name}.kv.memory_mib or max_context_tokens, where the model allows it"
        )
