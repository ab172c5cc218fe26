"""`photon keys`: an authority for a federation of several sites, and one key for each owner."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

keys_app = typer.Typer(help="Keys for several sites: who may join, and who no longer may.", no_args_is_help=True)

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the authority's keys. Keep it secret.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The owner's name: that of its silo in the recipe.")]


@keys_app.command(
    epilog="""Examples:\n
photon keys init keys --host photon.example.org\n
photon keys init keys --host 203.0.113.7 --host localhost"""
)
def init(
    folder: FolderArgument,
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="DNS name or IP address under which nodes reach the Aggregator; repeatable. "
            "Default: localhost and 127.0.0.1.",
        ),
    ] = None,
    days: Annotated[int | None, typer.Option(help="Days until the authority expires; default 1825.")] = None,
) -> None:
    """Make a certificate authority, the Aggregator's certificate and the operator's key, in a new folder."""
    from photon import keys

    hosts = host or list(keys.DEFAULT_HOSTS)
    keys.create_authority(folder, hosts, keys.AUTHORITY_DAYS if days is None else days)
    typer.echo(f"{folder}: an authority, and the Aggregator's certificate for {', '.join(hosts)}.")
    typer.echo(f"{folder / keys.OPERATOR_FILE}: your own key, to look at the run. Keep the whole folder secret.")
    if not host:
        typer.echo("Nodes on other machines need --host with the name or address under which they reach this one.")
    typer.echo(f"Next, for each owner: photon keys node NAME {folder}")


@keys_app.command(
    epilog="""Examples:\n
photon keys node hospital keys\n
photon keys node hospital keys --out /media/stick/hospital.key --days 90"""
)
def node(
    name: NameArgument,
    folder: FolderArgument,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to; default DIR/NAME.key.")] = None,
    days: Annotated[
        int | None, typer.Option(help="Days until it expires; default 365, or until the authority does.")
    ] = None,
) -> None:
    """Make one owner's key: a single file to hand over. Whoever has it can take part under this name."""
    from photon import keys

    path = keys.issue_node(folder, name, days, out)
    end = keys.issued(folder)[-1].not_after
    typer.echo(f"{path}: the key of {name}, {_until(end)}. Hand it over on a way that you trust.")
    typer.echo(
        f"Its owner keeps it readable for itself only (chmod 600). If it is lost: photon keys revoke {name} {folder}"
    )


@keys_app.command(
    epilog="""Examples:\n
photon keys aggregator keys\n
photon keys aggregator keys --host photon.example.org --host 203.0.113.7 --days 365"""
)
def aggregator(
    folder: FolderArgument,
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="DNS name or IP address under which nodes reach the Aggregator; repeatable. "
            "Default: those of the certificate that is there.",
        ),
    ] = None,
    days: Annotated[int | None, typer.Option(help="Days until it expires; default: until the authority does.")] = None,
) -> None:
    """Renew the Aggregator's certificate: other hosts, a later end. Nodes and operators keep their keys."""
    from photon import keys
    from photon.identity import AGGREGATOR_FILE

    hosts = keys.renew_aggregator(folder, host or (), days)
    end = keys.issued(folder)[-1].not_after
    typer.echo(f"{folder / AGGREGATOR_FILE}: the Aggregator's certificate for {', '.join(hosts)}, {_until(end)}.")
    typer.echo("It is used from the next start of the Aggregator on: stop it, and go on with --resume.")
    typer.echo("The one before counts until it expires: if others may have it, make a new authority instead.")


@keys_app.command(
    epilog="""Examples:\n
photon keys operator keys --out /media/stick/second-operator.key\n
photon keys operator keys   (after photon keys revoke operator keys)"""
)
def operator(
    folder: FolderArgument,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to; default DIR/operator.key.")] = None,
) -> None:
    """Make another operator's key, with which one may look at the run and do nothing else."""
    from photon import keys

    path = keys.issue_operator(folder, out)
    typer.echo(f"{path}: an operator's key, {_until(keys.issued(folder)[-1].not_after)}.")
    typer.echo(f"All operators have one name: photon keys revoke operator {folder} refuses every key made so far.")


@keys_app.command(epilog="Example: photon keys revoke hospital keys")
def revoke(name: NameArgument, folder: FolderArgument) -> None:
    """Refuse all keys made for NAME so far, from the next request on. A new one may be made afterwards."""
    from photon import keys

    serials = keys.revoke(folder, name)
    for serial in serials:
        typer.echo(f"{name}: {serial} is refused from now on.")
    if not serials:
        typer.echo(f"{name}: all keys made so far were refused already.")
    again = "operator" if name == "operator" else f"node {name}"
    typer.echo(f"To let {name} in again: photon keys {again} {folder}")


@keys_app.command(name="list", epilog="Example: photon keys list keys")
def list_keys(folder: FolderArgument) -> None:
    """Every certificate that was made: for whom, until when, and whether it is refused."""
    from rich.table import Table
    from rich.text import Text

    from photon import keys

    table = Table(title=Text(f"Keys: {folder}"), title_justify="left")
    for heading in ("name", "kind", "expires", "revoked", "serial"):
        table.add_column(heading, overflow="fold")
    for one in keys.issued(folder):
        table.add_row(one.name, one.role, f"{one.not_after:%Y-%m-%d}", "yes" if one.revoked else "no", one.serial)
    Console().print(table)


def _until(end: datetime) -> str:
    return f"until {end:%Y-%m-%d}"
