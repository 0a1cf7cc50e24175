"""The atoms of one trace: who stands for whom, who is indexed by whom, and what is pinned."""

from __future__ import annotations

from mergekit_ot.graph.axes.expressions import (
    Atom,
    Case,
    Concat,
    Expression,
    Product,
    Tag,
    at_one,
    atoms_of,
    pieces,
    product,
    resolve,
    select,
    standing_for,
)
from mergekit_ot.graph.axes.reasons import PinReason


class UnionFind:
    """Union-find over atoms, with binding to composites and a context per atom.

    The functions of `splitting`, `unification`, `concatenation` and `settling` take one and change it; expressions
    themselves are values. What holds for all atoms before and after every call is said in `Atom`.

    Attributes:
        touched: Atoms that the running rule has accounted for.
        reason: Where the running operation stands; pins carry it.
    """

    def __init__(self) -> None:
        self.touched: set[Atom] = set()
        self.reason = PinReason("not traced")
        # Atom → the atoms that were indexed by it; entries that no longer hold are told by the context itself.
        self._indexed: dict[Atom, dict[Atom, None]] = {}
        # Expressions of which the atoms may keep, of their contexts, what is allowed: settled later, all at once.
        self._pending: list[tuple[Expression, set[Atom]]] = []

    def atom(self, size: int, like: Atom | None = None, context: set[Atom] | None = None) -> Atom:
        """Returns a new atom with the context, pin and flags of `like`."""
        new = Atom(size, context if like is None or context is not None else like.context, like.pin if like else None)
        if like is not None:
            new.flags |= like.flags
        self.index_by(new, new.context)
        return new

    def pinned(self, size: int, why: str) -> Atom:
        """Returns a new atom that nothing may reorder."""
        return Atom(size, pin=self._pin_reason(why))

    def touch(self, expression: Expression) -> None:
        """Marks the atoms of `expression` as accounted for by the running rule."""
        self.touched |= atoms_of(expression)

    def pin(self, expression: Expression, why: str) -> None:
        """Fixes every atom of `expression` at the identity; an atom that is pinned already keeps its reason."""
        reason = self._pin_reason(why)
        for atom in atoms_of(expression):
            self.pin_atom(atom, reason)
        self.touch(expression)

    def _pin_reason(self, why: str) -> PinReason:
        return PinReason(why, self.reason.operation, self.reason.module_path, self.reason.source)

    def pin_atom(self, atom: Atom, reason: PinReason) -> None:
        """Fixes one atom at the identity, for every index of its context: it is no family any more."""
        atom.pin = atom.pin or reason
        atom.context = set()

    def index_by(self, atom: Atom, context: set[Atom]) -> None:
        """Makes `atom` a family over `context`.

        Who may be indexed by whom is remembered, so that cutting an atom does not look through all others.
        """
        atom.context = context
        for outer in context:
            self._indexed.setdefault(outer, {})[atom] = None

    def join(self, first: Atom, second: Atom) -> None:
        """Makes one atom of two: the older one stands for both.

        After: it is pinned where one of them was, has the flags of both, and keeps (once settled) the context that they
        share. Families that were indexed by the younger one are indexed by it.
        """
        root, child = sorted((first, second), key=lambda atom: atom.number)
        pin = root.pin or child.pin
        self.allow(root, set(child.context))
        child.link = root
        self._carry_over(child, root)
        root.flags |= child.flags
        if pin is not None:
            self.pin_atom(root, pin)

    def _carry_over(self, child: Atom, root: Atom) -> None:
        """Lets families indexed by `child` be indexed by `root`, so that they are found when that is cut."""
        for other in list(self._indexed.get(child, {})):
            if other.link is None and child in other.context:
                self.index_by(other, (other.context - {child} | {root}) - {other})

    def hand_on(self, atom: Atom, inside: set[Atom]) -> None:
        """Gives the atoms of what `atom` is bound to next its pin, its flags and the bounds of its context."""
        for inner in inside:
            if atom.pin is not None:
                self.pin_atom(inner, atom.pin)
            inner.flags |= atom.flags
            self.allow(inner, atom.context | inside)

    def bind(self, atom: Atom, expression: Expression) -> None:
        """Binds `atom` to `expression`; families indexed by the atom become indexed by its pieces.

        Before: the atom is unbound and does not stand in the expression, and both have one size. After: no context
        holds the atom. Where the pieces are factors, a family is indexed by all of them. Where they are blocks, it
        becomes a case: in each block a family of its own, indexed by what stands in that block.
        """
        atom.link = expression
        # Looked up again each time: rebinding a family also changes those that are indexed by it.
        while (other := self._dependent(atom)) is not None:
            other.context.discard(atom)
            resolved = resolve(expression)
            if isinstance(resolved, Atom | Product) and _first_tag(resolved) is None:
                self.index_by(other, other.context | {a for a in atoms_of(resolved) if a.size > 1})
            else:
                self.bind(other, self._over(other, resolved))

    def _dependent(self, atom: Atom) -> Atom | None:
        """Returns one unbound atom that is indexed by `atom`, the oldest first."""
        candidates = self._indexed.get(atom, {})
        for other in sorted(candidates, key=lambda o: o.number):
            if other.link is None and atom in other.context:
                return other
            del candidates[other]
        return None

    def _over(self, template: Atom, expression: Expression) -> Expression:
        """Returns what a family indexed by `expression` is: a case with one family per block."""
        tagged = _first_tag(expression)
        if tagged is None:
            seen = {a for a in atoms_of(expression) if a.size > 1 and a is not template}
            return self.atom(template.size, template, context=template.context | seen)
        tag, count = tagged
        options = [self._over(template, _at_block(expression, tag, block)) for block in range(count)]
        return Case(tag, tuple(options))

    def allow(self, expression: Expression, context: set[Atom]) -> None:
        """Says that the atoms of `expression` may be indexed by those of `context` and by each other, and by no more.

        It is carried out by `narrow`, when the operation is done and everything that it refines is refined.
        """
        self._pending.append((expression, context))

    @property
    def has_pending(self) -> bool:
        """Whether contexts are still to be narrowed."""
        return bool(self._pending)

    def narrow(self) -> None:
        """Takes from every context what `allow` does not allow."""
        while self._pending:
            expression, allowed = self._pending.pop()
            inside = atoms_of(resolve(expression))
            permitted = self.unbound(allowed) | inside
            for atom in inside:
                self.index_by(atom, self.unbound(atom.context) & permitted - {atom})

    def unbound(self, context: set[Atom]) -> set[Atom]:
        """Returns the atoms that stand today for those of a context, of more than one neuron each."""
        return {atom for atom in standing_for(context) if atom.size > 1}


def _first_tag(expression: Expression) -> tuple[Tag, int] | None:
    """Returns the tag and the number of blocks of the first concatenation or case inside, outermost first."""
    if isinstance(expression, Concat | Case):
        return expression.tag, len(pieces(expression))
    for piece in pieces(expression):
        tagged = _first_tag(piece)
        if tagged is not None:
            return tagged
    return None


def _at_block(expression: Expression, tag: Tag, block: int) -> Expression:
    """Returns `expression` where the axis stands in block `block` of the concatenation with `tag`."""
    if isinstance(expression, Concat) and expression.tag is tag:
        return resolve(expression.blocks[block])
    if isinstance(expression, Product):
        return product([_at_block(factor, tag, block) for factor in expression.factors])
    return select(expression, at_one(tag, block))
