"""`photon status`: read how far a run between machines is, show it, and readmit a node that was suspended.

The status is what `photon.status_board` keeps. Whoever runs the Aggregator reads it from the run folder; everybody else
asks the gateway with a key.
"""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from photon.aggregator.trust import READMIT
from photon.durable import mode_of, write_atomic
from photon.errors import InputError, StateError, WireError
from photon.identity import client_context
from photon.link.client import GatewayClient, LinkDownError
from photon.options import hint
from photon.readable import byte_size, count, duration, one_line, significant
from photon.recipe import load_recipe
from photon.runfolder import RunFolder
from photon.status_board import TEXT_CHARACTERS, NodeEntry, Status, StatusBoard

__all__ = ["StatusBoard", "read_status", "readmit", "show_status", "status_table"]  # one name for both halves

STALE_S = 30.0
MIN_WATCH_S = 0.5
_ASK_S = 15.0
_SHOWN_ERRORS = 5


def read_status(target: str, bundle: Path | None) -> dict[str, Any]:
    """The status of a run folder, or of the gateway at `https://HOST:PORT`, asked with the key in `bundle`.

    An operator's key sees all, a node's its own entry. The status of an Aggregator that is gone has `warning` added.
    Raises InputError for a target or key that cannot be used, StateError for a damaged file, WireError and
    LinkError for a gateway that does not answer.
    """
    if target.startswith(("https://", "http://")):
        return _ask_gateway(target, bundle)
    if bundle is not None:
        raise InputError(f"a key is only for an address, https://HOST:PORT; {target} is read from the disk without one")
    return _read_folder(target)


def _ask_gateway(url: str, bundle: Path | None) -> dict[str, Any]:
    if bundle is None and url.startswith("https://"):
        raise InputError(f"{url} asks who you are: add --keys FILE, operator.key for all nodes or a node's key for one")
    client = GatewayClient(url, client_context(bundle) if bundle is not None else None, _ASK_S)
    try:
        answer = client.json("GET", "/v1/status")
    finally:
        client.close()
    try:
        return _checked(answer)
    except ValidationError as error:
        raise WireError(f"{client.place} did not answer with the status of a run ({_first(error)})") from None


def _read_folder(target: str) -> dict[str, Any]:
    folder = RunFolder(Path(target))
    try:
        is_folder = stat.S_ISDIR(mode_of(folder.path))
    except OSError as error:
        raise InputError(f"{target} cannot be read: {error.strerror}; is the run another user's?") from None
    if not is_folder:
        raise InputError(f"there is no run folder {target}; an address is written https://HOST:PORT")
    folder.identity()
    path = folder.path / "exchange" / "status.json"
    try:
        status = _checked(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise InputError(f"{target} has no status: only photon aggregator keeps one, once it has begun") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise StateError(f"{path} is damaged ({_first(error)}); a running Aggregator writes it anew") from None
    except ValueError:
        raise StateError(f"{path} is damaged (it is not JSON); a running Aggregator writes it anew") from None
    age_s = time.time() - float(status.get("updated") or 0.0)
    if age_s > STALE_S and status.get("state") != "finished":
        status["warning"] = f"the aggregator is not running: this is how things stood {duration(age_s)} ago"
    return status


def _checked(status: object) -> dict[str, Any]:
    """The same, known to have the form of a status. Raises ValidationError."""
    Status.model_validate(status)
    return dict(status) if isinstance(status, dict) else {}


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return one_line(f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}")


def status_table(status: Mapping[str, Any]) -> list[RenderableType]:
    """A status for people, whole or as a node sees it: a line, a row for each node, and what went wrong last."""
    shown = Status.model_validate(status)
    parts: list[RenderableType] = [_header(shown)]
    if warning := status.get("warning"):
        parts.append(Text(one_line(str(warning), TEXT_CHARACTERS), style="bold red"))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("node", overflow="fold")
    table.add_column("state", overflow="fold")
    for heading in ("step", "loss", "tok/s", "up", "down", "heard", "rounds", "refused"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, entry in shown.nodes.items():
        table.add_row(one_line(name), *_cells(entry))
    parts.append(table)
    for name, entry in shown.nodes.items():
        reason = f"suspended: {entry.suspended}" if entry.suspended else entry.last_error
        if reason:
            parts.append(Text(one_line(f"{name}: {reason}", TEXT_CHARACTERS), style="yellow"))
    for remark in shown.errors[-_SHOWN_ERRORS:]:
        parts.append(Text(f"{_clock(remark.time)}  {one_line(remark.text, TEXT_CHARACTERS)}", style="dim"))
    return parts


def _header(status: Status) -> Text:
    planned = f"/{status.rounds}" if status.rounds is not None else ""
    up = sum(entry.bytes_up for entry in status.nodes.values())
    down = sum(entry.bytes_down for entry in status.nodes.values())
    words = [f"run {one_line(status.run)}", one_line(status.recipe), f"round {status.round}{planned}"]
    words += [status.state or "", f"up {byte_size(up)} down {byte_size(down)}"]
    if status.committed is not None:
        words.append(f"last round at {_clock(status.committed)}")
    return Text("  ".join(word for word in words if word), style="bold")


def _cells(entry: NodeEntry) -> tuple[RenderableType, ...]:
    style = "red" if entry.suspended else "yellow" if entry.late or not entry.online else "green"
    heard = "never" if entry.last_heard_s_ago is None else duration(entry.last_heard_s_ago)
    return (
        Text(_state_words(entry), style=style),
        f"{entry.step}/{entry.steps}" if entry.steps else "-",
        significant(entry.loss) if entry.loss is not None else "-",
        count(entry.tokens_per_second) if entry.tokens_per_second else "-",
        byte_size(entry.bytes_up),
        byte_size(entry.bytes_down),
        heard,
        str(entry.counted_rounds),
        str(entry.refusals),
    )


def _state_words(entry: NodeEntry) -> str:
    state = one_line(entry.phase if entry.state == "ready" and entry.phase != "idle" else entry.state)
    if entry.suspended:
        return "suspended"
    if not entry.online:
        return "offline"
    return f"{state}, late" if entry.late else state


def _clock(unix_s: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))
    except (OverflowError, ValueError, OSError):  # a time from elsewhere that no calendar has
        return f"{unix_s:g}"


def show_status(target: str, bundle: Path | None, as_json: bool, watch_s: float | None) -> None:
    """Print the status once, or every `watch_s` seconds until the run is finished or Ctrl-C is pressed.

    While it is watched, a gateway that cannot be reached is said and asked again. Raises what `read_status` raises.
    """
    console = Console()
    if watch_s is None:
        _print(read_status(target, bundle), as_json, console)
        return
    if not watch_s >= MIN_WATCH_S:
        raise InputError(f"--watch {watch_s:g}: at least {MIN_WATCH_S:g} seconds")
    with suppress(KeyboardInterrupt):
        if as_json or not console.is_terminal:
            _watch(target, bundle, watch_s, lambda status: _print(status, as_json, console, one_line_json=True))
        else:
            with Live(console=console, auto_refresh=False) as live:
                _watch(target, bundle, watch_s, lambda status: live.update(Group(*_parts(status)), refresh=True))


def _watch(
    target: str, bundle: Path | None, watch_s: float, show: Callable[[dict[str, Any] | LinkDownError], None]
) -> None:
    while True:
        try:
            status = read_status(target, bundle)
        except LinkDownError as error:
            show(error)
        else:
            show(status)
            if status.get("state") == "finished":
                return
        time.sleep(watch_s)


def _parts(status: dict[str, Any] | LinkDownError) -> list[RenderableType]:
    if isinstance(status, LinkDownError):
        return [Text(f"{_clock(time.time())}  {one_line(str(status), TEXT_CHARACTERS)}", style="bold red")]
    return status_table(status)


def _print(
    status: dict[str, Any] | LinkDownError, as_json: bool, console: Console, *, one_line_json: bool = False
) -> None:
    if not as_json:
        console.print(*_parts(status), sep="\n", highlight=False)
    elif isinstance(status, LinkDownError):
        Console(stderr=True).print(*_parts(status))  # what reads the JSON is not to meet a sentence in it
    else:
        print(json.dumps(status, indent=None if one_line_json else 2), flush=True)


def readmit(run: RunFolder, name: str) -> str:
    """Ask the Aggregator of `run` to trust node `name` again; gives a sentence on what happens next.

    Raises InputError if the folder is no run, has no such node, or cannot be written to.
    """
    run.identity()
    names = [silo.name for silo in load_recipe(run.recipe).silo]
    if name not in names:
        raise InputError(f"{run.path} has no node {one_line(name)!r}; {hint(name, names)}")
    folder = run.path / "operator"
    try:
        folder.mkdir(exist_ok=True)
        write_atomic(folder / f"{READMIT}{name}", "")
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error.strerror}") from None
    return (
        f"{name} belongs to the run again from the next round on (if the Aggregator is not running: once it is "
        "resumed), and its refusals so far are forgotten. Mend the node first: what it sends is checked as before."
    )
