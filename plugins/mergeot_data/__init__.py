"""Data as they lie on a disk: folders of images, text, tables, folders of the `datasets` library, single arrays.

Nothing that a file holds is ever run. Images need Pillow, folders of `datasets` need that, and tokenizers need
`tokenizers`: all three come with the extra ``data``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_ot import hookimpl

if TYPE_CHECKING:
    from mergekit_ot import DataReader, DataRequest


@hookimpl
def mergeot_open_data(request: DataRequest) -> DataReader | None:
    """Return what reads a folder of images or of `datasets`, a text, a table or an array; None for anything else."""
    if request.path.is_dir():
        from mergeot_data.folders import folder_reader

        return folder_reader(request)
    name = request.path.name.lower().removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        from mergeot_data.tables import table_reader

        return table_reader(request)
    if name.endswith(".txt"):
        from mergeot_data.texts import text_reader

        return text_reader(request)
    if name.endswith(".npy"):
        from mergeot_data.arrays import array_reader

        return array_reader(request)
    return None
