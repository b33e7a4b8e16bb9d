"""What clients keep between tasks: committed when a result is accepted, owned here and not by workers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedsim.local import LocalSGD
from fedsim.vectors import Layout

State = dict[str, Tensor]


class ClientStates:
    """The committed state of every client that has one.

    Args:
        rules: what clients can be asked to do, by name; all jobs of a client share its state.
        layout: of the model.
    """

    def __init__(self, rules: Mapping[str, LocalSGD], layout: Layout) -> None:
        self.rules, self.layout = rules, layout
        self.held: dict[int, State] = {}
        self._none_at_first = False
        """Whether no rule begins with a state: known once one has been asked for."""

    def of(self, client: int) -> State:
        """A client's state; made when first asked for and never written to in place."""
        held = self.held.get(client)
        if held is None:
            held = {} if self._none_at_first else self._first()
            if held:
                self.held[client] = held
        return held

    def commit(self, client: int, new: State) -> None:
        """Keep what a client's accepted task has made of its state."""
        self.held[client] = {**self.of(client), **new}

    def kept(self, name: str) -> dict[int, Tensor]:
        """Copies of the state ``name`` by client, of those that have it, ascending by id."""
        return {client: self.held[client][name].clone() for client in sorted(self.held) if name in self.held[client]}

    def _first(self) -> State:
        first: State = {}
        for rule in self.rules.values():
            first.update(rule.initial_state(self.layout))
        self._none_at_first = not first
        return first
