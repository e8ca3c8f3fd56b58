"""What `diptych doctor` asks of one configuration on this machine: models, memory, ports, folders."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path

from diptych.cluster.config import DiptychConfig
from diptych.cluster.control import cards, host
from diptych.cluster.control.memory import plan_memory
from diptych.cluster.control.plan import PLAINTEXT, plan_cluster
from diptych.cluster.control.state import dead_folders, find_cluster
from diptych.cluster.engine.card_plan import card_plans
from diptych.cluster.gateway.check import check_gateway, is_used, unpriced
from diptych.cluster.keys import check_exposed
from diptych.cluster.models import ModelFolder, resolve
from diptych.cluster.security import check_security, names_of
from diptych.cluster.security_settings import API_PLAINTEXT
from diptych.cluster.store.engines import file_of, shown, url_of
from diptych.cluster.store.schema import waiting_migrations
from diptych.cluster.tasks import settle_tasks
from diptych.protos.errors import StartupError

from .doctor_machine import Finding, State

MIN_DISK = 1 << 30


def examine(config: DiptychConfig) -> list[Finding]:
    """All findings about this configuration."""
    folders, findings = models(config)
    if len(folders) == len(config.models):
        with contextlib.suppress(StartupError):  # which the plan's finding tells
            config = settle_tasks(config, folders)
        findings += [memory(config, folders), engines(config)]
    findings += ports(config)
    findings += [security(config), store(config)]
    if is_used(config.gateway) or config.providers:
        findings.append(gateway(config))
    findings += [run_dir(config.run_dir), leftovers(config.run_dir)]
    folders_of = (("cache_dir", config.cache_dir), ("data_dir", config.data_dir), ("run_dir", config.run_dir))
    findings += [disk(key, folder) for key, folder in folders_of]
    if config.ray.address is not None:
        findings.append(ray_cluster(config.ray.address))
    return findings


def gateway(config: DiptychConfig) -> Finding:
    """Providers, their keys, and what routes lead to."""
    try:
        check_gateway(config)
    except StartupError as error:
        return Finding("gateway", State.STOP, str(error), "correct these keys, or set these variables")
    if lacking := unpriced(config.gateway):
        return Finding("gateway", State.SLOW, "; ".join(lacking), "give these prices")
    told = f"{len(config.gateway.routes)} routes, {len(config.providers)} providers named"
    return Finding("gateway", State.OK, told)


def models(config: DiptychConfig) -> tuple[dict[str, ModelFolder], list[Finding]]:
    """The folders of the models that can be served, and a finding for each model."""
    folders, findings = {}, []
    for name, settings in config.models.items():
        try:
            folders[name] = folder = resolve(
                settings.source, config.cache_dir, echo=settings.echo, has_weights=settings.has_weights
            )
        except StartupError as error:
            findings.append(
                Finding("model", State.STOP, f"{name}: {error}", f"set models.{name}.source, or cache_dir, accordingly")
            )
            continue
        facts = folder.facts
        told = f"{name}: {facts.architecture}, {facts.num_parameters / 1e6:,.0f} M parameters, {folder.path}"
        findings.append(Finding("model", State.OK, told))
    return folders, findings


def security(config: DiptychConfig) -> Finding:
    """The files behind `security:`, and whether anything leaves this machine unprotected."""
    try:
        check_security(config.security, names_of(config))
    except StartupError as error:
        return Finding("security", State.STOP, str(error), "docs/concepts/security.md shows how to make these files")
    if config.engines.leaves_host and config.security.tls is None:
        return Finding("security", State.SLOW, f"{PLAINTEXT} (engines.host {config.engines.host})", "set security.tls")
    if config.router.leaves_host:
        return Finding("security", State.SLOW, API_PLAINTEXT, "use 127.0.0.1 with a proxy that speaks TLS in front")
    told = (
        "mutual TLS between engines and routers"
        if config.security.tls is not None
        else "engines and routers talk on this machine only"
    )
    return Finding("security", State.OK, told)


def store(config: DiptychConfig) -> Finding:
    """Whether the store can be opened and is of this version, and whether a key opens an API that others can reach."""
    remedy = "set data_dir to a folder on a local disk, or store.url to a database"
    try:
        url = url_of(config.store, config.data_dir)
        file = file_of(url)
        if file is not None and not file.exists():
            above = next(parent for parent in file.parents if parent.exists())
            if not _is_writable(above):
                return Finding("store", State.STOP, f"{file} cannot be made in {above}", remedy)
            if config.router.leaves_host and config.security.api_keys is None:
                told = f"router.host {config.router.host} is reachable from other machines, and there is no key yet"
                return Finding("store", State.STOP, told, "make one with `diptych keys create TENANT`")
            return Finding("store", State.OK, f"{file} does not exist yet; the first start makes it")
        missing = waiting_migrations(url)
        if not missing:
            check_exposed(config)
    except StartupError as error:
        return Finding("store", State.STOP, str(error), remedy)
    if missing:
        return Finding("store", State.OK, f"{shown(url)} gets {', '.join(missing)} at the next start")
    return Finding("store", State.OK, f"{shown(url)} is up to date")


def memory(config: DiptychConfig, folders: dict[str, ModelFolder]) -> Finding:
    """The memory plan against what is free."""
    try:
        engines = plan_cluster(config, folders, config.run_dir).engines()
    except StartupError as error:
        return Finding("plan", State.STOP, str(error), "correct this key")
    plan = plan_memory(engines, host.available_memory(), ray_is_ours=config.ray.address is None)
    try:
        plan.check()
        on_cards = len(card_plans(engines, cards.find().cards))
    except StartupError as error:
        return Finding("memory", State.STOP, str(error))
    told = f"the plan needs {plan.total >> 20:,} MiB; {plan.bound}: {plan.available >> 20:,} MiB"
    told += f"; {on_cards} engines fit on cards" if on_cards else ""
    return Finding("memory", State.OK, told)


def engines(config: DiptychConfig) -> Finding:
    """Engines against cores."""
    count = sum(sum(settings.pools().values()) for settings in config.models.values())
    usable = len(os.sched_getaffinity(0))
    told = f"{count} on {usable} cores"
    if count <= usable:
        return Finding("engines", State.OK, told)
    return Finding("engines", State.SLOW, f"{told}: they wait for each other", "fewer engines, or layout: colocated")


def ports(config: DiptychConfig) -> list[Finding]:
    """The ports that are asked for by number."""
    findings = []
    router = config.router
    for option, port in (("port", router.port), ("serve_port", router.serve_port)):
        if not port:
            continue
        if host.is_port_free(router.host, port):
            findings.append(Finding("port", State.OK, f"{router.host}:{port} is free"))
        else:
            told = f"{router.host}:{port} is in use by another program"
            findings.append(Finding("port", State.STOP, told, f"end that program, or set router.{option}"))
    return findings


def run_dir(folder: Path) -> Finding:
    """Whether it is ours alone and can hold unix sockets; its length is checked with the configuration."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        above = next(parent for parent in folder.parents if parent.exists())
        if not os.access(above, os.W_OK | os.X_OK):
            return Finding(
                "run_dir", State.STOP, f"{folder} cannot be made in {above}", "set run_dir to another folder"
            )
        return _sockets(above, folder)
    except OSError as error:
        return Finding("run_dir", State.STOP, f"{folder}: {error.strerror}", "set run_dir to another folder")
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        told = f"{folder} is not a folder of your own that nobody else can enter"
        return Finding("run_dir", State.STOP, told, f"chmod 700 {folder}, or set run_dir to another folder")
    return _sockets(folder, folder)


def _sockets(where: Path, folder: Path) -> Finding:
    try:
        with tempfile.TemporaryDirectory(prefix="d", dir=where) as name, socket.socket(socket.AF_UNIX) as probe:
            probe.bind(f"{name}/s")
    except OSError as error:
        told = f"no unix socket can be made in {where}: {error.strerror or error}"
        return Finding("sockets", State.STOP, told, "set run_dir to a folder on a local disk")
    return Finding("sockets", State.OK, f"{folder} holds unix sockets")


def leftovers(folder: Path) -> Finding:
    """Clusters of this user: running ones take memory, dead ones left folders behind."""
    running = find_cluster(folder)
    if running is not None:
        told = f"a cluster of yours runs already: {running.url} (pid {running.pid})"
        return Finding("clusters", State.SLOW, told, "a second one needs other ports and memory of its own")
    dead = dead_folders(folder)
    if dead:
        return Finding("clusters", State.OK, f"{len(dead)} ended without order; the next start removes their folders")
    return Finding("clusters", State.OK, "none of yours runs")


def disk(key: str, folder: Path) -> Finding:
    """Room for a converted model, for logs."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding(key, State.STOP, f"{there}: {error.strerror}", f"set {key} to another folder")
    if key == "cache_dir" and not _is_writable(there):
        told = f"{there} is read-only: no model can be converted"
        return Finding(key, State.SLOW, told, "set cache_dir to a folder that can be written")
    if free < MIN_DISK:
        told = f"{there} has {free >> 20} MiB free"
        return Finding(key, State.SLOW, told, f"free some space, or set {key} to a folder with {MIN_DISK >> 20} MiB")
    return Finding(key, State.OK, f"{there} has {free >> 20:,} MiB free")


def _is_writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def ray_cluster(address: str) -> Finding:
    """The Ray cluster that the configuration wants to join."""
    if host.is_reachable(address):
        return Finding("ray", State.OK, f"something listens at {address}")
    return Finding("ray", State.STOP, f"nothing answers at {address}", "start that Ray cluster, or remove ray.address")
