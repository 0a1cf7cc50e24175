"""Networks and data as a command names them, opened for whoever compares them: a plugin's own command."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.progress import Notify
from mergekit_ot.scoring.data_options import DataOptions
from mergekit_ot.sources.datasets import DataSource, resolve_data
from mergekit_ot.sources.example_inputs import example_inputs_of
from mergekit_ot.sources.guesses import check_function_is_known
from mergekit_ot.sources.needs import needs_of
from mergekit_ot.sources.reading import read_sources
from mergekit_ot.storage.file_options import FileOptions


@dataclass(frozen=True)
class OpenedModels:
    """Networks that were read, and what they take.

    Attributes:
        models: One per file; a tensor is read when it is needed.
        inputs: To trace them with: two samples.
        data: The data that were named, to be read any number of times, or None.

    Example:
        >>> OpenedModels((), (), None).data is None
        True
    """

    models: tuple[SourceModel, ...]
    inputs: tuple[Tensor, ...]
    data: DataSource | None


@dataclass(frozen=True, kw_only=True)
class ModelFiles(FileOptions, DataOptions):
    """Files of networks as a command line names them, and how they are read; what each flag means is as for ``fuse``.

    Attributes:
        paths: The checkpoints.
        arch: No SPEC (each file carries its own), one for all, or one per checkpoint.
        input_shape: Shape of one input without the batch axis.
        data: Data SPEC, or none.
        trust: The checkpoints whose programs may be loaded.

    Example:
        >>> import pathlib, tempfile
        >>> from torch import nn
        >>> from mergekit_ot import default_manager, save_checkpoint
        >>> path = save_checkpoint(nn.Linear(3, 2), pathlib.Path(tempfile.mkdtemp()) / "net.pt")
        >>> files = ModelFiles(paths=(str(path),), arch=("torch.nn:Linear?in_features=3&out_features=2",))
        >>> opened = files.open("'example'", default_manager(), notify=lambda sentence: None)
        >>> opened.models[0].instance(), opened.inputs[0].shape
        (Linear(in_features=3, out_features=2, bias=True), torch.Size([2, 3]))
    """

    paths: tuple[str, ...]
    arch: tuple[str, ...] = ()
    input_shape: tuple[int, ...] | None = None
    data: str | None = None
    trust: tuple[str, ...] = ()

    def open(self, doing: str, manager: PluginManager, notify: Notify) -> OpenedModels:
        """Reads the networks, and finds the data and inputs.

        Args:
            doing: What is done with them, for the message where they cannot be run on data.
            manager: Whose formats, architectures and data are known.
            notify: Told what was found.

        Raises:
            MergeotError: A file cannot be read or fits no architecture, there are no such data, or a network would
                have to be run whose function was only guessed.
        """
        sources = read_sources(self.paths, self.arch, manager, notify, self.trust, self)
        data = None
        if self.data is not None:
            data = resolve_data(self.data, manager).for_network(*needs_of(sources, self, notify))
        if data is not None:
            check_function_is_known([(source.name, source.make) for source in sources], doing)
        inputs, _ = example_inputs_of(sources[0], self.input_shape, data, notify, self.inputs)
        return OpenedModels(tuple(SourceModel(each.name, each.known, each.state) for each in sources), inputs, data)
