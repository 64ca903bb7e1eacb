"""Small MindRecords, and loaders of them."""

import numpy as np

from mixtral_ms.config.sections.data_section import DataLoaderSection, DatasetSection
from mixtral_ms.data.loader.record_loader import RecordLoader
from mixtral_ms.data.mindrecord.writer import RecordWriter

SEQ = 8
RECORDS = 53


def make(path, rows=None, *, overwrite=False, partitions=1, **columns):
    if rows is None:
        rows = np.arange(RECORDS * (SEQ + 1), dtype=np.int32).reshape(RECORDS, SEQ + 1)
    with RecordWriter(
        path, ("input_ids", *columns), partitions=partitions, overwrite=overwrite
    ) as writer:
        writer.write(input_ids=rows, **columns)
    return writer


def loader(path, **options):
    section = DatasetSection(
        data_loader=DataLoaderSection(
            dataset_dir=str(path), num_samples=options.pop("num_samples", None)
        ),
        input_columns=options.pop("input_columns", ["input_ids"]),
    )
    defaults = {
        "seq_length": SEQ,
        "batch_size": 4,
        "seed": 7,
        "shuffle": True,
        "ignore_token_id": -100,
        "pad_token_id": -1,
    }
    return RecordLoader(section, **{**defaults, **options})


def records_of(batches):
    """The numbers of the records in batches of the rows that `make` writes."""
    return [int(row[0]) // (SEQ + 1) for batch in batches for row in batch.input_ids]
