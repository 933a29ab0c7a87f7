"""Builders: from files on disk (or a seed) to TFDS data sets of common records.

`python -m tfds_builders NAME --data_dir=DIR [--source=DIR]` builds one. A builder is a folder NAME
with a module NAME_dataset_builder.py that holds a class `Builder` (see `common.RecordBuilder`);
there is no list to extend.
"""
