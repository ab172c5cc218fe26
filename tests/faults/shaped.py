"""A federation of real processes, each node at the end of a line of its own with a given rate and length.

The rate holds in each direction. The Aggregator's side is open: a node's own line is the narrowest place.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.faults.proxy import Proxy
from tests.faults.sites import TIMEOUT_S, Sites

from photon.config import Recipe
from photon.events import RoundDone
from photon.plan_exchange import LinkSpeed
from photon.recipe import load_recipe
from photon.track import METRICS_FILE, read_events

OWNERS = ("ada", "bob")
MBIT = 1e6
_FIRST_LATER = 3  # rounds; in those before everything starts up


@dataclass(frozen=True)
class Line:
    """Bits per second each way, and seconds there and back."""

    bits_per_s: float
    round_trip_s: float

    @property
    def speed(self) -> LinkSpeed:
        """As a plan takes it."""
        return LinkSpeed(self.bits_per_s, self.bits_per_s, self.bits_per_s * len(OWNERS), self.round_trip_s)


@dataclass(frozen=True)
class Recorded:
    """What a federation left behind."""

    recipe: Recipe
    rounds: list[RoundDone]
    parameters: int
    carried_bytes: int  # by all lines, both ways

    @property
    def later(self) -> list[RoundDone]:
        """Rounds in which nothing starts up any more."""
        return [event for event in self.rounds if event.round >= _FIRST_LATER]


def federate(
    folder: Path,
    texts: Path,
    line: Line | None,
    *,
    width: int,
    rounds: int,
    codecs: str = "",
    extra: str = "",
    tau: int = 4,
) -> Recorded:
    """Run one to its end; None: no line stands between. `codecs` are options of `[link]`, `extra` of `[federation]`."""
    with Sites(folder, texts, rounds=rounds, owners=OWNERS, extra=extra, tau=tau) as sites, ExitStack() as lines:
        text = sites.recipe.read_text()
        assert text.count("width = 32") == text.count("every = 2") == 1
        text = text.replace("width = 32", f"width = {width}").replace("every = 2", "every = 1000")
        sites.recipe.write_text(f"{text}\n[link]\n{codecs}\n" if codecs else text)
        proxies: list[Proxy] = []
        if line is not None:
            for _ in OWNERS:
                proxies.append(lines.enter_context(Proxy("127.0.0.1", sites.port)))
                proxies[-1].throttle(line.bits_per_s / 8)
                proxies[-1].delay(line.round_trip_s / 2)
        sites.start_aggregator()
        for index, owner in enumerate(OWNERS):
            sites.start_node(owner, proxies[index].port if proxies else None)
        sites.finish(TIMEOUT_S + 60.0 * rounds)  # on a busy machine each takes its time
        recipe = load_recipe(sites.run_folder / "recipe.toml")
        events = read_events(sites.run_folder / METRICS_FILE)
        parameters = next(event.parameters for event in events if event.event == "run_started")
        done = [event for event in events if isinstance(event, RoundDone)]
        return Recorded(recipe, done, parameters, sum(proxy.bytes_up + proxy.bytes_down for proxy in proxies))
