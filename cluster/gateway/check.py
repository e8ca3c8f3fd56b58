"""What of the branches `providers:` and `gateway:` can only be known together, with the served models and the keys.

Called before anything is started: by `diptych serve`, by deployments, by `diptych doctor`. It reaches nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from diptych.protos.errors import InvalidRequest, StartupError

from .money_settings import ANY, price_path
from .settings import OWN, GatewaySettings, reach_of

if TYPE_CHECKING:
    from diptych.cluster.config import DiptychConfig
    from diptych.cluster.providers.registry import Registry

    from .prices import Prices


_SHOWN = 3  # places with the same mistake


def is_used(settings: GatewaySettings) -> bool:
    """Whether there is a name that leads to the gateway."""
    return bool(settings.routes) or settings.direct


def check_gateway(config: DiptychConfig, environ: Mapping[str, str] | None = None) -> None:
    """Raises StartupError with a sentence for each mistake: providers and pools that there are not, or that have prices
    all the same; keys that are missing where a route or clients may need them.
    """
    if not config.providers and not is_used(config.gateway):
        return
    from diptych.cluster.providers.registry import Registry

    registry = Registry.load(config.providers, os.environ if environ is None else environ)
    faults: dict[str, list[str]] = {}  # with the key paths where each is found
    for path, target in _targets(config.gateway):
        if target.startswith(f"{OWN}/"):
            if why := _no_pool(target.removeprefix(f"{OWN}/"), config):
                faults.setdefault(why, []).append(path)
            continue
        try:
            registry.check(target)
        except StartupError as exc:
            faults.setdefault(str(exc), []).append(path)
    for path, why in _prices_of_nothing(config, registry):
        faults.setdefault(why, []).append(path)
    if config.gateway.direct:
        for name in sorted(registry.configured):
            if (fault := registry.fault(registry.provider(name))) and fault not in faults:
                faults[fault] = [f"providers.{name}"]
    if faults:
        raise StartupError("; ".join(f"{_shown(paths)}: {fault}" for fault, paths in faults.items()))


def unpriced(settings: GatewaySettings, prices: Prices | None = None) -> list[str]:
    """A sentence for each target that has no price and stops a budget's requests; nobody else is told before the first
    of them. `prices` None: those of `settings`. Which rules leave a target out is not looked at.
    """
    budgets = {
        name: budget for name, budget in settings.budgets.items() if budget.unpriced == "refuse" and not budget.shadow
    }
    if not budgets:
        return []
    if prices is None:
        from .prices import Prices

        prices = Prices(settings)
    reach = reach_of(settings.routes)
    nameless = {target for targets in reach.values() for target in targets if prices.rates(target) is None}
    found = []
    for name, budget in budgets.items():
        for target in sorted(nameless):
            routes = [one for one, others in reach.items() if target in others and budget.route in (None, ANY, one)]
            if routes:
                found.append(
                    f"gateway.budgets.{name}: nobody knows what {target} costs, so its requests to "
                    f"{_shown([f'the route {route}' for route in routes])} are refused (503); give "
                    f"{price_path(target)}, 0 where it is free, or say gateway.budgets.{name}.unpriced: admit"
                )
    return found


def _shown(paths: list[str]) -> str:
    return ", ".join(paths[:_SHOWN]) + (f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "")


def _targets(settings: GatewaySettings) -> Iterator[tuple[str, str]]:
    """Of all routes and of what stands behind them, with the key path."""
    for name, route in settings.routes.items():
        for i, entry in enumerate(route.targets):
            yield f"gateway.routes.{name}.targets.{i}", entry.target
        for key, others in route.fallbacks:
            for i, other in enumerate(others):
                if other not in settings.routes:
                    yield f"gateway.routes.{name}.{key}.{i}", other


def _prices_of_nothing(config: DiptychConfig, registry: Registry) -> Iterator[tuple[str, str]]:
    """Key paths of prices, and why there is nothing that has them."""
    for name in config.gateway.prices:
        try:
            registry.provider(name.partition("/")[0])
        except InvalidRequest as exc:
            yield f"gateway.prices.{name}", exc.message
    for model in config.gateway.pools:
        if why := _no_pool(model, config):
            yield f"gateway.pools.{model}", why


def _no_pool(model: str, config: DiptychConfig) -> str:
    """Why there is no such pool; empty: there is one."""
    found = config.models.get(model)
    if found is None:
        return f"there is no model {model!r} under models: to be {OWN}/{model}; there is {', '.join(config.models)}"
    if found.task not in ("auto", "generate"):
        return f"the model {model} does not generate text (models.{model}.task: {found.task})"
    return ""
