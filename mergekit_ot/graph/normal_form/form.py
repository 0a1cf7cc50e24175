"""The normal form of a state: rewrites in order, and what is known of the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergekit_ot.graph.normal_form.rewrites import AbstractRewrite, Read, Refusal


@dataclass(frozen=True)
class NormalForm:
    """Rewrites that bring a state into a form with fewer ways to say the same.

    Attributes:
        rewrites: In order of application.
        refusals: What could not be rewritten, and why.
        neutral: Key of a group → names of the gains and biases of norms on it that do nothing afterwards: gains are 1
            (0 where the forward adds 1), biases 0; the bias of a LayerNorm with a reader that has none is all ones,
            which that reader counts on.
        centred: Keys of the groups on which everything that writes has mean zero afterwards.

    Example:
        >>> from torch import nn
        >>> from mergekit_ot import trace_model
        >>> from mergekit_ot.graph.normal_form.find import find_normal_form
        >>> make = lambda: nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> inputs = (torch.randn(4, 3),)
        >>> form = find_normal_form(trace_model(make(), inputs), make, inputs)
        >>> [type(rewrite).__name__ for rewrite in form.rewrites], dict(form.neutral), sorted(form.centred)
        (['Fold', 'Centre'], {'0.weight:0': ('1.weight', '1.bias')}, ['0.weight:0'])
        >>> net, other = make(), make()
        >>> _ = other.load_state_dict(form.of_state(net.state_dict()))
        >>> torch.allclose(net(inputs[0]), other(inputs[0]), atol=1e-5)
        True
    """

    rewrites: tuple[AbstractRewrite, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    neutral: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    centred: frozenset[str] = frozenset()

    def tensor(self, name: str, read: Read) -> Tensor:
        """Returns the value of one tensor in normal form, computed in float64, in the number type of the old value.

        Args:
            name: Its name in the state.
            read: Gives old values by name; called for what the new value needs alone.
        """
        old = read(name)
        if not any(name in rewrite.names for rewrite in self.rewrites):
            return old
        return self._after(len(self.rewrites), name, lambda other: old if other == name else read(other)).to(old.dtype)

    def _after(self, count: int, name: str, read: Read) -> Tensor:
        """Returns a value after the first rewrites, in float64."""
        for number in reversed(range(count)):
            if name in self.rewrites[number].names:
                return self.rewrites[number].tensor(name, lambda other, before=number: self._after(before, other, read))
        value = read(name)
        return value.to(torch.complex128 if value.is_complex() else torch.float64)

    def of_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns a whole state in normal form."""
        return {name: self.tensor(name, state.__getitem__) for name in state}
