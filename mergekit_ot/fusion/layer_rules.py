"""What holds for single parameters of a fusion: from which source they come, and how heavily each source counts."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from mergekit_ot.errors import RecipeError

# What `head` may be.
ONE, BOTH = "one", "both"
# What a rule for layers may say besides the parameters that it is for.
KEEP, WEIGHTS, SOLVER, MEASURE = "keep", "weights", "solver", "measure"
_KEYS = ("parameters", KEEP, WEIGHTS, SOLVER, MEASURE)


@dataclass(frozen=True)
class LayerMethod:
    """How the neurons are coupled that some layers make.

    Attributes:
        glob: As the rule names the layers.
        names: Their parameters.
        solver: Name of the solver; empty for that of the fusion.
        measure: Name of the measure; empty for that of the fusion.
    """

    glob: str
    names: frozenset[str]
    solver: str = ""
    measure: str = ""


@dataclass(frozen=True)
class LayerRules:
    """What holds for single parameters, by their names in the state of the fused model.

    Attributes:
        kept: Parameter → number of the source that it comes from, as it is.
        weights: Parameter → model weights of its own, one per source, summing to one.
        has_all_heads: Whether the parameters that make the outputs are taken from every source, beside each other.
        methods: How the neurons of some layers are coupled; of two rules for one layer, the last counts.

    Example:
        >>> rules = LayerRules(kept={"fc.weight": 1})
        >>> rules.weights_of("fc.weight", (0.5, 0.5)), rules.weights_of("conv.weight", (0.5, 0.5))
        ((0.0, 1.0), (0.5, 0.5))
    """

    kept: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    has_all_heads: bool = False
    methods: tuple[LayerMethod, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.kept or self.weights or self.has_all_heads or self.methods)

    def weights_of(self, name: str, model_weights: tuple[float, ...]) -> tuple[float, ...]:
        """Returns the model weights of a parameter; those of the fusion where it has none of its own."""
        source = self.kept.get(name)
        if source is not None:
            return tuple(float(number == source) for number in range(len(model_weights)))
        return self.weights.get(name, model_weights)

    def described(self, aliases: Mapping[str, str]) -> LayerRules:
        """Returns the rules for parameters that stand under several names, under the one that describes them.

        Args:
            aliases: Further name of a tied parameter → the name that describes it.

        Raises:
            RecipeError: Two names of one parameter are kept from two sources.
        """
        kept = dict[str, int]()
        for name, source in self.kept.items():
            own = aliases.get(name, name)
            if kept.setdefault(own, source) != source:
                raise RecipeError(
                    f"'{name}' and '{own}' are one parameter (they are tied), and are kept from models {kept[own]} and "
                    f"{source}. Keep both from one model."
                )
        weights = {aliases.get(name, name): shares for name, shares in self.weights.items()}
        methods = tuple(
            replace(method, names=frozenset(aliases.get(name, name) for name in method.names))
            for method in self.methods
        )
        return LayerRules(kept, weights, self.has_all_heads, methods)

    def untied(self, aliases: Mapping[str, str]) -> LayerRules:
        """Returns the rules where tied parameters have become several: what held for one holds for each.

        Args:
            aliases: Name of a parameter that was tied → the name that it was described by.
        """
        kept = {alias: self.kept[name] for alias, name in aliases.items() if name in self.kept}
        weights = {alias: self.weights[name] for alias, name in aliases.items() if name in self.weights}
        return replace(self, kept={**self.kept, **kept}, weights={**self.weights, **weights})


@dataclass(frozen=True)
class RuledNetworks:
    """The networks that rules speak of.

    Attributes:
        names: Of the parameters and buffers of the fused model, in order of definition.
        sources: Names of the sources, in order.
        target: Number of the source whose sizes are taken; 0 where they are those of no source.
    """

    names: tuple[str, ...]
    sources: tuple[str, ...]
    target: int = 0


def layer_rules(
    keep: Sequence[str], layers: Sequence[Mapping[str, Any]], head: str, networks: RuledNetworks
) -> LayerRules:
    """Returns the rules of a fusion, parameter by parameter.

    Args:
        keep: ``GLOB`` or ``GLOB=SOURCE``, a source by its number or its name.
        layers: Mappings of a recipe: ``parameters`` (a GLOB), and ``keep`` (a source), ``weights``, or ``solver`` and
            ``measure``.
        head: ``one`` or ``both``.
        networks: What they speak of.

    Raises:
        RecipeError: A rule matches nothing, names no source, contradicts another, or says nothing.

    Example:
        >>> networks = RuledNetworks(("conv.weight", "fc.weight", "fc.bias"), ("a.pt", "b.pt"))
        >>> layer_rules(["fc.*=b.pt"], [], "one", networks).kept
        {'fc.weight': 1, 'fc.bias': 1}
    """
    if head not in (ONE, BOTH):
        raise RecipeError(f"head={head!r:.80}: it is '{ONE}' (the fused model has one head) or '{BOTH}'.")
    kept, weights, methods = dict[str, int](), dict[str, tuple[float, ...]](), list[LayerMethod]()
    for text in keep:
        glob, _, source = text.partition("=")
        _keep(kept, glob, source, networks)
    for rule in layers:
        glob = _checked(rule)
        if KEEP in rule:
            _keep(kept, glob, str(rule[KEEP]), networks)
        elif WEIGHTS in rule:
            weights |= _weights(rule[WEIGHTS], glob, networks)
        else:
            names = frozenset(matched(glob, networks.names))
            methods.append(LayerMethod(glob, names, str(rule.get(SOLVER, "")), str(rule.get(MEASURE, ""))))
    both = next((name for name in kept if name in weights), None)
    if both is not None:
        raise RecipeError(f"'{both}' is kept from one model and has model weights of its own. Take one rule out.")
    return LayerRules(kept, weights, head == BOTH, tuple(methods))


def _keep(kept: dict[str, int], glob: str, source: str, networks: RuledNetworks) -> None:
    number = source_number(source, networks) if source else networks.target
    for name in matched(glob, networks.names):
        if kept.setdefault(name, number) != number:
            one, other = (networks.sources[each] for each in (kept[name], number))
            raise RecipeError(f"'{name}' is to be kept from '{one}' and from '{other}'. Keep it from one of them.")


def matched(glob: str, names: Iterable[str]) -> list[str]:
    """Returns the names that a GLOB matches.

    Raises:
        RecipeError: It matches none; names that are close are listed.

    Example:
        >>> matched("fc*.weight", ["fc1.weight", "fc1.bias", "fc2.weight"])
        ['fc1.weight', 'fc2.weight']
    """
    names = list(names)
    found = [name for name in names if fnmatch.fnmatchcase(name, glob)]
    if found:
        return found
    below = [name for name in names if name.startswith(f"{glob}.")]
    if below:
        raise RecipeError(f"No parameter is called '{glob}'; those of that module are '{glob}.*'.")
    bare = glob.replace("*", "").strip(".")
    close = [name for name in names if bare and bare in name][:3]
    close = close or difflib.get_close_matches(glob, names, n=3, cutoff=0.4) or names[-3:]
    raise RecipeError(f"No parameter matches '{glob}'. There are: {', '.join(close)} … ({len(names)} in all).")


def source_number(text: str, networks: RuledNetworks) -> int:
    """Returns the number of a source that is given by it or by a name.

    Raises:
        RecipeError: There is no such source, or several have that name.

    Example:
        >>> source_number("b.pt", RuledNetworks((), ("runs/a.pt", "runs/b.pt")))
        1
    """
    count, names = len(networks.sources), networks.sources
    if text.isdigit() and int(text) < count:
        return int(text)
    found = [number for number, name in enumerate(names) if name == text]
    found = found or [number for number, name in enumerate(names) if PurePath(name).name == text]
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{number} ({name})" for number, name in enumerate(names))
    what = "names several models" if found else "is none of the models"
    raise RecipeError(f"'{text}' {what}. They are: {known}.")


def kept_notes(rules: LayerRules, sources: Sequence[str]) -> list[str]:
    """Returns a sentence per source that parameters are kept from.

    Args:
        rules: What holds for single parameters.
        sources: Names of the sources.

    Example:
        >>> kept_notes(LayerRules({"fc.weight": 1, "fc.bias": 1}), ("a.pt", "b.pt"))
        ["Kept from 'b.pt' as they are: 2 parameters ('fc.weight', 'fc.bias')."]
    """
    notes = []
    for number, source in enumerate(sources):
        names = [name for name, own in rules.kept.items() if own == number]
        shown = ", ".join(f"'{name}'" for name in names[:3]) + (" …" if len(names) > 3 else "")
        count = "1 parameter" if len(names) == 1 else f"{len(names)} parameters"
        notes += [f"Kept from '{source}' as they are: {count} ({shown})."] if names else []
    return notes


def _checked(rule: Mapping[str, Any]) -> str:
    """Returns the GLOB of a rule for layers, whose keys make sense."""
    unknown = [key for key in rule if key not in _KEYS]
    if unknown:
        raise RecipeError(f"A rule for layers has the key '{unknown[0]}'. It takes: {', '.join(_KEYS)}.")
    if not isinstance(rule.get("parameters"), str):
        raise RecipeError("A rule for layers names its parameters by a GLOB, such as 'parameters: blocks.*'.")
    said = [KEEP in rule, WEIGHTS in rule, SOLVER in rule or MEASURE in rule]
    if sum(said) != 1:
        raise RecipeError(
            f"The rule for layers '{rule['parameters']}' says one thing: '{KEEP}' (a model), '{WEIGHTS}' (one per "
            f"model), or '{SOLVER}' and '{MEASURE}' (names). Write a rule for each."
        )
    return rule["parameters"]


def _weights(given: object, glob: str, networks: RuledNetworks) -> dict[str, tuple[float, ...]]:
    """Returns the model weights of every parameter that a rule matches; lists go linearly from layer to layer."""
    where, count = f"of the layers '{glob}'", len(networks.sources)
    if not isinstance(given, list | tuple) or len(given) != count:
        raise RecipeError(f"The weights {where} are a list of {count}: one per model, a number or a list over depth.")
    gradients = [_gradient(entry, where) for entry in given]
    names = matched(glob, networks.names)
    layers = list(dict.fromkeys(map(layer_of, names)))
    found = {}
    for name in names:
        depth = layers.index(layer_of(name)) / max(len(layers) - 1, 1)
        shares = [_at(gradient, depth) for gradient in gradients]
        total = math.fsum(shares)
        if total <= 0:
            raise RecipeError(f"The weights {where} are all zero at '{name}'. One model has to count there.")
        found[name] = tuple(share / total for share in shares)
    return found


def _gradient(entry: object, where: str) -> tuple[float, ...]:
    numbers: list[Any] = [*entry] if isinstance(entry, list | tuple) else [entry]
    if not numbers or not all(_is_share(number) for number in numbers):
        raise RecipeError(f"The weights {where} hold {entry!r:.80}: a number of at least zero, or a list of such ones.")
    return tuple(map(float, numbers))


def _is_share(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number < math.inf


def _at(gradient: tuple[float, ...], depth: float) -> float:
    """Returns the value of a list at a depth from 0 to 1, linearly between its entries."""
    place = depth * (len(gradient) - 1)
    before = min(int(place), len(gradient) - 1)
    after = min(before + 1, len(gradient) - 1)
    return gradient[before] + (place - before) * (gradient[after] - gradient[before])


def layer_of(name: str) -> str:
    """Returns the layer that a parameter belongs to: its path to the first number, or its module where it has none.

    Example:
        >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("fc.bias")
        ('model.layers.3', 'fc')
    """
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: number + 1]) if number is not None else ".".join(parts[:-1]) or name
