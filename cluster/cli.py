"""The command `diptych`. Every verb imports what it needs when it runs, so that the command itself starts at once."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from .batch_verbs import batch

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench", help="Measure: an engine alone, a running server, or kernels.")
app.add_typer(batch, name="batch", help="Typed calls in batches: submit, status, wait, cancel, results, list.")
keys = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(keys, name="keys", help="API keys: create, list, revoke.")
providers = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(providers, name="providers", help="Outside providers: list, test.")
route = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(route, name="route", help="Routes of the gateway: explain.")

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file; the README shows its keys.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key: a.b=value. May be repeated.", metavar="KEY=VALUE"),
]
KvGib = Annotated[
    float | None,
    typer.Option("--kv-gib", min=0.001, help="Memory for KV of each engine; by default its card's rest, or 0.5."),
]
Url = Annotated[str | None, typer.Option(help="A running cluster; by default the one started last here.")]


def _writable(path: Path | None) -> Path | None:
    """Refused now with exit code 2, as every wrong option, not after minutes of measuring."""
    from diptych.cluster.bench.figures import why_unwritable

    if path is not None and (why := why_unwritable(path)):
        raise typer.BadParameter(f"cannot write {path}: {why}")
    return path


def _role(name: str | None) -> str | None:
    if name not in (None, "prefill", "decode", "embed"):
        raise typer.BadParameter(f"{name!r} is no role; there are prefill, decode and embed")
    return name


ResultFile = Annotated[Path | None, typer.Option("--json", help="Result as a file.", callback=_writable)]


@app.callback()
def diptych() -> None:
    """A serving cluster for language models: separate prefill and decode pools on Ray."""


@app.command()
def serve(
    config: ConfigFile = None,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="Model to serve: a name, folder or GGUF file.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the API.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join (host:port).")] = None,
    kv_gib: KvGib = None,
) -> None:
    """Start a cluster and serve until Ctrl-C."""
    began = _process_start()
    from diptych.cluster.config import load_config
    from diptych.protos.errors import StartupError

    short = [f"router.port={port}"] if port is not None else []
    short += [f"ray.address={address}"] if address is not None else []
    try:
        loaded = load_config(config, [*(overrides or []), *short], model, kv_gib=kv_gib)
    except StartupError as exc:
        print(f"diptych: {exc}", file=sys.stderr)
        raise typer.Exit(1) from exc
    from diptych.cluster.serve import run_serve

    raise typer.Exit(run_serve(loaded, began))


@app.command()
def status(config: ConfigFile = None, overrides: Overrides = None, url: Url = None) -> None:
    """Show pools, engines, blocks and queues of a running cluster."""
    from diptych.cluster.status import run_status

    raise typer.Exit(run_status(config, overrides or [], url))


@app.command()
def scale(
    model: Annotated[str, typer.Argument(help="A served model.")],
    prefill: Annotated[int | None, typer.Option(help="Engines of its prefill pool.")] = None,
    decode: Annotated[int | None, typer.Option(help="Engines of its decode pool.")] = None,
    embed: Annotated[int | None, typer.Option(help="Engines of a model that embeds or ranks texts.")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    url: Url = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster it runs on (host:port).")] = None,
) -> None:
    """Change the sizes of a model's pools while they serve; dismissed engines finish their requests first."""
    from diptych.cluster.scale import run_scale
    from diptych.protos.types import Role

    wishes = {Role.PREFILL: prefill, Role.DECODE: decode, Role.EMBED: embed}
    sizes = {role: engines for role, engines in wishes.items() if engines is not None}
    raise typer.Exit(run_scale(model, sizes, config=config, overrides=overrides or (), url=url, address=address))


@app.command()
def restart(
    model: Annotated[str | None, typer.Argument(help="A served model; by default all.")] = None,
    role: Annotated[str | None, typer.Option(help="prefill, decode or embed; by default all.", callback=_role)] = None,
    router: Annotated[bool, typer.Option("--router", help="The router alone.")] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
    url: Url = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster it runs on (host:port).")] = None,
) -> None:
    """Replace the engines one by one while they serve, then the router where no model or role is named; each process
    finishes its requests after its successor is ready.
    """
    from diptych.cluster.scale import run_restart
    from diptych.protos.types import Role

    which = None if role is None else Role(role)
    code = run_restart(model, which, router=router, config=config, overrides=overrides or (), url=url, address=address)
    raise typer.Exit(code)


@app.command("apply")
def apply_config(config: ConfigFile = None, overrides: Overrides = None, url: Url = None) -> None:
    """Give a running cluster another configuration: --config names all of it, --set alone changes what runs; the
    engines that it concerns are replaced while the old ones serve.
    """
    from diptych.cluster.apply import run_apply

    raise typer.Exit(run_apply(config, overrides or (), url=url))


@app.command("role")
def change_role(
    engine: Annotated[str, typer.Argument(help="An engine that serves, such as prefill-0.")],
    role: Annotated[str, typer.Argument(help="prefill or decode.", callback=_role)],
    config: ConfigFile = None,
    overrides: Overrides = None,
    url: Url = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster it runs on (host:port).")] = None,
) -> None:
    """Move an engine to the other pool of its model; its requests finish first, and nothing is loaded again."""
    from diptych.cluster.scale import run_role
    from diptych.protos.types import Role

    raise typer.Exit(run_role(engine, Role(role), config=config, overrides=overrides or (), url=url, address=address))


@app.command()
def models(config: ConfigFile = None, overrides: Overrides = None, url: Url = None) -> None:
    """List models: built in, configured, converted, served."""
    from diptych.cluster.model_list import run_models

    raise typer.Exit(run_models(config, overrides or [], url))


@keys.command("create")
def keys_create(
    tenant: Annotated[str, typer.Argument(help="Whose key it is.")],
    name: Annotated[str, typer.Option(help="For people, to tell it from others.")] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(help="inference, files or admin; may be repeated. By default the first two."),
    ] = None,
    expires: Annotated[str | None, typer.Option(help="90d, 12h, or a day such as 2027-01-31.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="More get 429.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests in work; more get 429.")] = None,
    may_override: Annotated[
        list[str] | None,
        typer.Option(help="target, strategy or cache: by the headers x-route-*, x-cache; may be repeated."),
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="For rules, budgets and limits; may be repeated.")] = None,
    file: Annotated[Path | None, typer.Option(help="Append to this file of security.api_keys instead.")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Make an API key and print it, this once; a cluster that runs on the same store takes it at once."""
    from diptych.cluster.key_verbs import place_of, run_create

    code = run_create(
        tenant,
        name=name,
        scopes=scope or (),
        expires=expires,
        limits=(requests_per_minute, concurrency),
        routing=(may_override or (), tag or ()),
        file=file,
        place=place_of(config, overrides),
    )
    raise typer.Exit(code)


@keys.command("list")
def keys_list(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Show the keys by their ids, never a key."""
    from diptych.cluster.key_verbs import place_of, run_list

    raise typer.Exit(run_list(tenant, as_json=as_json, place=place_of(config, overrides)))


@keys.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `diptych keys list` shows it.")],
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Let a key open nothing any more, a quarter of a second later; answers in work go on."""
    from diptych.cluster.key_verbs import place_of, run_revoke

    raise typer.Exit(run_revoke(key_id, place=place_of(config, overrides)))


@providers.command("list")
def providers_list(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Show the providers that can be named, built in and configured, and whether their keys are there."""
    from diptych.cluster.providers.verbs import place_of, run_list

    raise typer.Exit(run_list(as_json=as_json, place=place_of(config, overrides)))


@providers.command("test")
def providers_test(
    target: Annotated[str, typer.Argument(metavar="PROVIDER/MODEL", help="As `model` of a request names it.")],
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Send one request for a single token and show the time and the tokens, or what is wrong and what helps."""
    from diptych.cluster.providers.verbs import place_of, run_test

    raise typer.Exit(run_test(target, timeout_s=timeout_s, as_json=as_json, place=place_of(config, overrides)))


@route.callback()
def route_group() -> None:
    """Routes of the gateway."""


@route.command("explain")
def route_explain(
    model: Annotated[str | None, typer.Option(help="A route, or PROVIDER/MODEL.")] = None,
    message: Annotated[str | None, typer.Option(help="What the user says.")] = None,
    request: Annotated[
        Path | None, typer.Option(help="Instead: the body of a request as a JSON file.", metavar="FILE")
    ] = None,
    tenant: Annotated[str, typer.Option(help="Ask as this tenant.")] = "",
    key: Annotated[str, typer.Option(help="Ask as this API key, by its id.", metavar="ID")] = "",
    session: Annotated[str, typer.Option(help="Ask in this session.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="With this tag; may be repeated.")] = None,
    header: Annotated[
        list[str] | None,
        typer.Option(help="A header, such as x-route-strategy=sticky; may be repeated.", metavar="NAME=VALUE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    config: Annotated[
        Path | None, typer.Option("--config", help="Explain by this file alone; no server is asked.")
    ] = None,
    overrides: Overrides = None,
    url: Url = None,
) -> None:
    """Say which rule decides about a request, where it would go and why not elsewhere, and what it would cost. Nothing
    is sent to any target. A server is asked with the key of DIPTYCH_API_KEY.
    """
    from diptych.cluster.route_verbs import Asker, body_of, run_explain
    from diptych.protos.errors import StartupError

    pairs = [(name, value) for name, _, value in (one.partition("=") for one in header or ())]
    if any(not name or not value for name, value in pairs):
        raise typer.BadParameter("write --header NAME=VALUE")
    asker = Asker(tenant=tenant, key=key, session=session, tags=tuple(tag or ()), headers=tuple(pairs))
    try:
        body = body_of(model, message, request)
    except StartupError as exc:
        print(f"diptych: {exc}", file=sys.stderr)
        raise typer.Exit(1) from exc
    code = run_explain(body, asker, as_json=as_json, config=config, overrides=overrides or (), url=url)
    raise typer.Exit(code)


@app.command()
def usage(
    by: Annotated[str, typer.Option(help="tenant, key, route, target or day.")] = "route",
    since: Annotated[str | None, typer.Option(help="2026-11-01, or 7d or 24h ago; by default the 1st.")] = None,
    until: Annotated[str | None, typer.Option(help="Likewise; by default now.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's; by default all, of --url your own.")] = None,
    key: Annotated[str | None, typer.Option(help="Only this key's, by its id.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
    url: Annotated[str | None, typer.Option(help="Ask a running server, not the store of the configuration.")] = None,
) -> None:
    """Show what requests through the gateway used and cost, and what is left of budgets."""
    from diptych.cluster.usage_verbs import run_usage

    asked = {"by": by, "since": since, "until": until, "tenant": tenant, "key": key}
    fields = {name: value for name, value in asked.items() if value is not None}
    raise typer.Exit(run_usage(fields, config=config, overrides=overrides or (), url=url, as_json=as_json))


@app.command()
def doctor(
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what would keep a cluster from starting here, and what to do about it."""
    from diptych.cluster.doctor import run_doctor

    raise typer.Exit(run_doctor(config, overrides or [], as_json=as_json))


@app.command("run", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run_function(
    rest: typer.Context,
    target: Annotated[str, typer.Argument(metavar="FILE:FUNCTION", help="A call, an agent, a prompt or a function.")],
    arg: Annotated[
        list[str] | None,
        typer.Option("--arg", help="An argument; --NAME VALUE is short for it.", metavar="NAME=VALUE"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="PREFIX/MODEL that is asked instead.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Text as it comes, typed results as lines of JSON.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The whole reply: value, model, cost, attempts.")] = False,
) -> None:
    """Run a typed call, an agent or a function with arguments from the command line, and print what it gives."""
    from diptych.agents.llm.command import run

    raise typer.Exit(run(target, rest.args, named=arg or (), model=model, stream=stream, as_json=as_json))


@app.command()
def chat(
    config: ConfigFile = None,
    overrides: Overrides = None,
    url: Url = None,
    model: Annotated[str | None, typer.Option(help="Model; by default the first one served.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 is greedy; not given: the model's own, or 0.3 where it names none."),
    ] = None,
) -> None:
    """Talk to a model in the terminal; piped input is one question per line."""
    from diptych.cluster.chat import chat as converse
    from diptych.cluster.status import cluster_url
    from diptych.protos.errors import StartupError

    try:
        where = cluster_url(config, overrides or [], url)
    except StartupError as exc:
        print(f"diptych: {exc}", file=sys.stderr)
        raise typer.Exit(1) from exc
    raise typer.Exit(converse(where, model=model, system=system, max_tokens=max_tokens, temperature=temperature))


@bench.command()
def offline(
    config: ConfigFile = None,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="As for serve, or the name of a shape.")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Need no weights, only a shape.")] = False,
    layout: Annotated[str | None, typer.Option(help="colocated or disaggregated.")] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(help="A name, or REQUESTSxINPUTxOUTPUT. May be repeated."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help='Lines of {"prompt": ...}.')] = None,
    output: Annotated[int | None, typer.Option(min=1, help="Tokens for each of the prompts.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each workload; the median counts.")] = 1,
    kv_gib: KvGib = None,
    through: Annotated[
        list[str] | None,
        typer.Option(help="engine (default) or session, the engine's gRPC; give both for their ratio."),
    ] = None,
    path: Annotated[
        str, typer.Option(help="native, or generic: on a card transformers' forward instead of hand-written code.")
    ] = "native",
    profile: Annotated[
        Path | None,
        typer.Option(help="Trace some steps of each workload too: their kernels as JSON.", callback=_writable),
    ] = None,
    json_out: ResultFile = None,
) -> None:
    """Engines in this process: all requests at once, timed to the last token."""
    began = _process_start()
    from diptych.cluster.bench.offline import OfflineOptions, run_offline
    from diptych.protos.errors import DiptychError

    options = OfflineOptions(
        config=config,
        overrides=overrides or (),
        model=model,
        random_weights=random_weights,
        layout=layout,
        workloads=workload or (),
        prompts=prompts,
        output=output,
        repeats=repeats,
        kv_gib=kv_gib,
        through=through or (),
        path=path,
        profile=profile,
        json_out=json_out,
    )
    try:
        run_offline(options, began)
    except DiptychError as exc:
        print(f"diptych: {exc}", file=sys.stderr)
        raise typer.Exit(1) from exc


@bench.command("serve")
def bench_serve(
    config: ConfigFile = None,
    overrides: Overrides = None,
    url: Url = None,
    model: Annotated[str | None, typer.Option(help="Model; by default the first one served.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="By default 64, or all prompts.")] = None,
    rate: Annotated[float, typer.Option(help="Requests per second, Poisson; inf: all at once.")] = float("inf"),
    input: Annotated[int, typer.Option(min=1, help="Tokens of a random prompt.")] = 128,
    output: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    vocab: Annotated[int, typer.Option(min=2, help="Random token ids are below this.")] = 30_000,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Most requests in work.")] = None,
    clients: Annotated[int, typer.Option(min=1, help="Processes that send and read.")] = 1,
    prompts: Annotated[Path | None, typer.Option(help='Lines of {"prompt": ...}.')] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for one request.")] = 600.0,
    json_out: ResultFile = None,
) -> None:
    """A running server under load: streamed, open loop, every gap between tokens counted."""
    from diptych.cluster.bench.serve import ServeOptions, run_serve_bench
    from diptych.cluster.status import cluster_url
    from diptych.protos.errors import DiptychError

    try:
        options = ServeOptions(
            url=cluster_url(config, overrides or [], url),
            model=model,
            requests=requests,
            rate=rate,
            input=input,
            output=output,
            seed=seed,
            vocab=vocab,
            concurrency=concurrency,
            clients=clients,
            prompts=prompts,
            timeout_s=timeout_s,
            json_out=json_out,
        )
        code = run_serve_bench(options)
    except DiptychError as exc:
        print(f"diptych: {exc}", file=sys.stderr)
        raise typer.Exit(1) from exc
    raise typer.Exit(code)


@bench.command()
def kernels(
    op: Annotated[list[str] | None, typer.Option(help="An op; may be repeated. By default all.")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Find and keep this card's launch tables first.")] = False,
    json_out: ResultFile = None,
) -> None:
    """Each op on this machine's CUDA device: time, rate, fraction of the ceilings measured in the same run."""
    from diptych.cluster.bench.kernels import run_kernels
    from diptych.protos.errors import DiptychError

    try:
        run_kernels(op or (), is_tuned=tune, json_out=json_out)
    except DiptychError as exc:
        print(f"diptych: {exc}", file=sys.stderr)
        raise typer.Exit(1) from exc


def _process_start() -> float:
    """When this process began, on the monotonic clock: the interpreter's start is part of the start-up."""
    import psutil

    return time.monotonic() - max(time.time() - psutil.Process().create_time(), 0.0)


def main() -> None:
    """Entry point."""
    app()
