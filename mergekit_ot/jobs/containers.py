"""The container in which a result is written: that of a source, a bare state dict, or a file of mergeot's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import Tensor

from mergekit_ot.errors import RecipeError
from mergekit_ot.progress import Notify
from mergekit_ot.sources.reading import ReadSource
from mergekit_ot.storage.file_options import AS_SOURCE, OWN
from mergekit_ot.storage.record import Checkpoint
from mergekit_ot.storage.side_files import check_side, side_of
from mergekit_ot.storage.torch_form import PlainForm

# Names that end so say which format it is.
_BY_NAME = (".safetensors", ".npz", ".pt2")


@final
@dataclass(frozen=True)
class Container:
    """How a state is written.

    Attributes:
        output: Where.
        template: The checkpoint whose form it takes.
        names: The source whose names it has; None where it has those of the architecture.
        is_same: Whether it is a file of the same kind as that source.
        is_resized: Whether the network has sizes of its own, and nothing of the source's tensors fits beside it.
    """

    output: Path
    template: Checkpoint
    names: ReadSource | None
    is_same: bool
    is_resized: bool

    def state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns a state of the architecture under the names that it has in the container."""
        if self.names is None:
            return state
        if self.is_resized:
            return self.names.names.of_file(state, is_renamed=self.is_same)
        return self.names.of_file(state, is_renamed=self.is_same)

    def check(self, inputs: Iterable[str | Path], *, overwrite: bool) -> None:
        """Checks that the file beside it can be written, where there will be one.

        Raises:
            CheckpointError: It cannot.
        """
        check_side(self.output, self.template, inputs, overwrite=overwrite)

    def tell(self, notify: Notify) -> None:
        """Says what was kept beside the weights and what was left out, once it is written."""
        form = self.template.form
        if form is not None and form.suits(self.output):
            for sentence in form.sentences():
                notify(f"{self.output}: {sentence}")
        side = side_of(self.output, self.template)
        # A format that goes by the name may have told it in the file itself.
        if side is not None and side.is_file():
            notify(f"{self.output}: how it was made stands in '{side}'.")


def container_of(sources: Sequence[ReadSource], target: int | str | Checkpoint, output: Path, wanted: str) -> Container:
    """Returns the container of a result.

    Args:
        sources: What is fused.
        target: The place of the source whose sizes and container it takes, or a checkpoint that gives both. The
            container is that of the first source where the target is an architecture, whose sizes are its own.
        output: Where it is written.
        wanted: ``source``, ``state-dict`` or ``mergeot``.

    Raises:
        RecipeError: The name of the output says another format than the one that is wanted.
    """
    is_resized = not isinstance(target, int)
    source = sources[target] if isinstance(target, int) else sources[0]
    template = source.checkpoint
    if isinstance(target, str):
        # The configuration in a folder says other sizes.
        form = None if template.form is not None and template.form.is_folder else template.form
        template = dataclasses.replace(template, build=None, form=form)
    if isinstance(target, Checkpoint):
        template = target
        if wanted == AS_SOURCE:
            return Container(output, template, None, True, is_resized)
    if wanted == AS_SOURCE:
        form = template.form
        is_same = form is None or form.suits(output)
        # A file of mergeot's own has no place for what an architecture of other sizes lacks.
        names = None if is_resized and form is None else source
        return Container(output, template, names, is_same, is_resized)
    if output.suffix in _BY_NAME:
        raise RecipeError(
            f"The output '{output}' has the format of its name, and --format {wanted} is another one. Leave --format "
            "out, or give a name that ends in .pt."
        )
    if wanted == OWN:
        return Container(output, dataclasses.replace(template, form=None), source, False, is_resized)
    return Container(output, dataclasses.replace(template, form=PlainForm()), None, False, is_resized)
