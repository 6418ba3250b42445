"""The readers by the format of a file."""

from __future__ import annotations

from pipeline.errors import UserError
from pipeline.inputs.formats.arrow import ArrowReader
from pipeline.inputs.formats.base import Reader
from pipeline.inputs.formats.delimited import DelimitedReader
from pipeline.inputs.formats.lines import LinesReader, RequestsReader
from pipeline.inputs.formats.parquet import ParquetReader
from pipeline.inputs.listing import InputFile

READERS: dict[str, Reader] = {
    "parquet": ParquetReader(),
    "jsonl": LinesReader(),
    "openai": RequestsReader(),
    "csv": DelimitedReader("CSV", ","),
    "tsv": DelimitedReader("TSV", "\t"),
    "arrow": ArrowReader(),
}
"""By the names that `listing.FORMATS` has; "openai" is that of lines in a job with this format."""


def format_of(file: InputFile, wanted: str | None) -> str:
    """The format that a file is read in.

    Args:
        file: the file.
        wanted: the job's `input.format`.

    Raises:
        UserError: a file cannot be of the job's format.
    """
    if wanted is None:
        return file.format
    if file.format != "jsonl":
        raise UserError(f"{file.url}: input.format {wanted} needs .jsonl files")
    return wanted
