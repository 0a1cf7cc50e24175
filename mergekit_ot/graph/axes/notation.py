"""Labels as a reader writes them, with a letter per atom."""

from __future__ import annotations

import string

from mergekit_ot.graph.axes.expressions import Atom, Concat, Expression, Product, Replicated, pieces, resolve


class Notation:
    """Gives each atom a letter when it is first written, and keeps it.

    Written are: ``a:8`` for eight free neurons, ``b:4[a]`` for a family of four per neuron of ``a``, ``5!`` for what is
    pinned, ``6=`` for what is constant; ``(a × b)`` for a product, ``[a + b]`` for a concatenation, ``{a | b}`` for a
    case.

    Example:
        >>> from mergekit_ot.graph.axes.algebra import AxisAlgebra
        >>> algebra, notation = AxisAlgebra(), Notation()
        >>> channels = algebra.atom(12)
        >>> notation.text(channels)
        'a:12'
        >>> heads = algebra.split_product(channels, [3, 4])
        >>> notation.text(channels)
        '(b:3 × c:4[b])'
    """

    def __init__(self) -> None:
        self._numbers: dict[Atom, int] = {}

    def number(self, atom: Atom) -> int:
        """Returns how many atoms were written before this one."""
        return self._numbers.setdefault(atom, len(self._numbers))

    def letter(self, atom: Atom) -> str:
        """Returns the letter of an atom: ``a`` to ``z``, then ``a1`` and so on."""
        again, place = divmod(self.number(atom), len(string.ascii_lowercase))
        return string.ascii_lowercase[place] + (str(again) if again else "")

    def text(self, expression: Expression) -> str:
        """Returns a label in writing, as it stands today."""
        expression = resolve(expression)
        if isinstance(expression, Atom):
            return self._atom_text(expression)
        if isinstance(expression, Replicated):
            return f"{expression.size}="
        written = [self.text(piece) for piece in pieces(expression)]
        if isinstance(expression, Product):
            return f"({' × '.join(written)})"
        if isinstance(expression, Concat):
            return f"[{' + '.join(written)}]"
        return "{" + " | ".join(written) + "}"

    def _atom_text(self, atom: Atom) -> str:
        if atom.pin is not None:
            return f"{atom.size}!"
        own = f"{self.letter(atom)}:{atom.size}"
        context = sorted(self.letter(outer) for outer in sorted(atom.context, key=lambda outer: outer.number))
        return f"{own}[{', '.join(context)}]" if context else own
