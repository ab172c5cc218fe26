"""Who is still asked: a refused reply is charged to its node, too many suspend it, an operator readmits it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

READMIT = "readmit-"


@dataclass(frozen=True)
class Charge:
    """Refused replies of one node since it was last readmitted, and why the last one was refused."""

    refusals: int
    reason: str


class Trust:
    """What is held against which node. `charges` is committed with each round, so a resumed run decides the same.

    The operator readmits a node by a file `OPERATOR/readmit-NAME`, empty or not. It is heeded at the start of a round
    and removed once that round is committed: a crash or a failed round in between does not lose the operator's word.
    `suspend_after` 0 never suspends; `note` tells people.
    """

    def __init__(
        self,
        charges: Mapping[str, Charge],
        suspend_after: int,
        operator: Path | None,
        note: Callable[[str], None],
    ) -> None:
        self.charges = dict(charges)
        self._suspend_after, self._operator, self._note = suspend_after, operator, note
        self._heeded: list[Path] = []

    @property
    def suspended(self) -> dict[str, str]:
        """Nodes that are not asked, in the order of their names, with the reason of the last refusal."""
        if not self._suspend_after:
            return {}
        return {
            name: charge.reason
            for name, charge in sorted(self.charges.items())
            if charge.refusals >= self._suspend_after
        }

    def announce(self) -> None:
        """Tell people who is suspended: at the beginning of a run and of a resumed one."""
        for name in self.suspended:
            self._note(self._sentence(name))

    def readmit(self) -> None:
        """Heed the operator's files: nothing is held against those nodes any more."""
        files = self._operator.glob(f"{READMIT}*") if self._operator is not None else []
        self._heeded = sorted(files)
        for path in self._heeded:
            name = path.name.removeprefix(READMIT)
            charge = self.charges.pop(name, None)
            if charge is None:
                self._note(f"the operator readmits {name!r}: nothing is held against a node of that name")
            else:
                self._note(f"the operator readmits {name}; its refusals ({charge.refusals}) are forgotten")

    def charge(self, round_index: int, refused: Mapping[str, str]) -> None:
        """Charge each node in `refused` with one refusal of round `round_index`, for the reason given."""
        before = self.suspended
        for name, reason in sorted(refused.items()):
            refusals = self.charges[name].refusals + 1 if name in self.charges else 1
            self.charges[name] = Charge(refusals, reason)
            allowed = f" of {self._suspend_after}" if self._suspend_after else ""
            self._note(f"round {round_index}: the reply of {name} was refused ({refusals}{allowed}): {reason}")
        for name in sorted(self.suspended.keys() - before.keys()):
            self._note(self._sentence(name))

    def committed(self) -> None:
        """The round is on the disk, and the operator's word with it: remove the files that were heeded."""
        for path in self._heeded:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self._note(f"cannot remove {path} ({error.strerror}): the node is readmitted again in every round")
        self._heeded = []

    def _sentence(self, name: str) -> str:
        charge = self.charges[name]
        how = f"; to readmit it: photon readmit {name} {self._operator.parent}" if self._operator is not None else ""
        return f"{name} is suspended after {charge.refusals} refused replies{how}. The last reason: {charge.reason}"
