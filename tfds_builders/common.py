"""What all builders share: the record as features, checked writing, parameters, counts.

A builder subclasses `RecordBuilder` and yields records; its parameters are the fields of its
`RecordConfig`, which become the flags of the command line and are stored with the data set. Both
are ordinary TFDS classes, so that `tfds build` takes them where TensorFlow is installed.
"""

import collections
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath

from rg_jax.data import record
from rg_jax.errors import UserError
from tfds_builders import beam, packed, writing
from tfds_builders.doubts import doubts
from tfds_builders.problems import Found, Problem
from tfds_builders.splits import Member, SameImages, describe, find_leaks, move_to_train

__all__ = ["Found", "Problem", "RecordBuilder", "RecordConfig", "parameter", "parameters"]

_TFDS_FIELDS = {field.name for field in dataclasses.fields(tfds.core.BuilderConfig)}


def parameter(
    default: Any, help: str, choices: tuple[Any, ...] | None = None, role: str = "named"
) -> Any:
    """A field of a `RecordConfig` that is also a flag; its type is that of its default.

    `role`: "named" stands in the derived name of a variant, "stored" is kept with the data set but
    does not name it (a path), "run" says how it is built and leaves no trace (workers).
    """
    if role not in ("named", "stored", "run"):
        raise ValueError(f"role {role!r}")
    return dataclasses.field(
        default=default, metadata={"help": help, "choices": choices, "role": role}
    )


@dataclasses.dataclass(eq=False, kw_only=True)
class RecordConfig(tfds.core.BuilderConfig):
    """The parameters of one variant of a data set.

    Variants live side by side under their names: DIR/<data set>/<name>/<version>. A name that is
    not given is made of the parameters, so that other parameters never meet under one name.
    """

    name: str = ""
    without_train: bool = parameter(
        False, "take a source without a train split: a data set for evaluation alone"
    )

    def __post_init__(self):
        for field in parameters(type(self)):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices and value not in choices:
                raise UserError(
                    f"--{field.name}={value}: must be one of {', '.join(map(str, choices))}"
                )
        self.validate()
        if not self.name:
            self.name = self.derived_name()

    def validate(self) -> None:
        """Raise UserError, naming the flag, for parameters that make no sense."""

    def derived_name(self) -> str:
        return "default" + self.deviations()

    def deviations(self, *spelled_out: str) -> str:
        """ "-train_500-seed_1" for the parameters that are not at their defaults.

        `spelled_out` are those that the name already tells.
        """
        return "".join(
            f"-{field.name}_{_slug(getattr(self, field.name))}"
            for field in parameters(type(self))
            if field.metadata["role"] == "named"
            and field.name not in spelled_out
            and getattr(self, field.name) != field.default
        )

    def values(self) -> dict[str, Any]:
        """What makes the data set what it is; kept with it."""
        return {
            field.name: getattr(self, field.name)
            for field in parameters(type(self))
            if field.metadata["role"] != "run"
        }


def parameters(config_class: type[RecordConfig]) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(config_class) if field.name not in _TFDS_FIELDS]


class RecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder of common records.

    Subclasses set CONFIG, VERSION, IMAGE_DTYPE, CHANNELS and, if they read files, SOURCE (what
    the folder is, one phrase) and MANUAL_DOWNLOAD_INSTRUCTIONS; and write `splits`.
    """

    CONFIG: ClassVar[type[RecordConfig]]
    IMAGE_DTYPE: ClassVar[str]
    CHANNELS: ClassVar[int]
    SOURCE: ClassVar[str] = ""
    RELEASE_NOTES: ClassVar[Mapping[str, str]] = {"1.0.0": "First version."}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        # TFDS would find its builder's file through importlib_resources, which it does not install.
        cls.code_path = epath.Path(inspect.getfile(cls))

    def __init__(self, *, file_format: Any = None, **kwargs: Any):
        if not self.BUILDER_CONFIGS and kwargs.get("config") is None:
            kwargs["config"] = self.CONFIG()
        # TFDS's own default needs TensorFlow to read it back.
        super().__init__(file_format=file_format or "array_record", **kwargs)
        self.counts: collections.Counter[str] = collections.Counter()
        self.notes: list[str] = []
        # A list collects every problem and goes on (the data check); None: a build, which refuses.
        self.problems: list[Problem] | None = None
        # How many records a split will have, as far as it is known before they are read.
        self.expected: dict[str, int] = {}
        # Whether records may come as `packed.Packed`: ready to be written, not to be looked at.
        self.packing = False

    def report(self, problem: Problem) -> None:
        """Tell of a problem; whoever found a harmful one drops its record after this returns.

        A build stops at the first harmful problem, with UserError, unless its parameter `skip_bad`
        is set; then, and for harmless ones, it is counted. A data check collects them all.
        """
        if self.problems is not None:
            self.problems.append(problem)
        elif problem.harmful and not getattr(self.builder_config, "skip_bad", False):
            raise UserError(f"{problem} (--skip_bad leaves such records out)")
        self.counts[f"left out: {problem.kind}" if problem.harmful else problem.kind] += 1

    def or_problem(self, read: Callable[..., Any], path: Path, *more: Any) -> Any:
        """What `read(path, …)` returns; where it fails a data check tells so, and gets None."""
        try:
            return read(path, *more)
        except UserError as error:
            if self.problems is None:
                raise
            detail = str(error).removeprefix(f"{path}: ")
            self.report(Problem("unreadable file", str(path), detail))
            return None

    def guard(self, members: Sequence[Member], hint: str = "") -> list[Member]:
        """The members as they may be built: nothing that belongs together in two splits.

        The parameter `leaks` decides: "refuse" raises UserError naming what leaks (a data check
        reports it), "move" puts it all into train, "allow" leaves it; the notes tell of both.
        `hint` ends the message of a refusal.
        """
        leaks = find_leaks(members)
        choice = getattr(self.builder_config, "leaks", "refuse")
        if not leaks or (choice == "refuse" and self.problems is not None):
            for leak in leaks:
                self.report(Problem("leakage between splits", leak.file, f"{leak}{hint}"))
            return list(members)
        told = describe(leaks)
        if choice == "move":
            kept, moved = move_to_train(members)
            for member in moved:
                self.counts[f"moved from {member.split} to train"] += 1
            self.notes.append(
                f"moved to train, since it was in several splits: {told}; figures on these splits"
                " cannot be compared with published ones"
            )
            return kept
        if choice == "allow":
            self.counts["leaks between splits, left as they are"] += len(leaks)
            self.notes.append(f"the splits share data ({told}): figures on them mean little")
            return list(members)
        raise UserError(f"{leaks[0].file}: {told}; --leaks=move puts all of it into train{hint}")

    def same_image(self, seen: SameImages, digest: int, split: str, name: str) -> bool:
        """Whether these pixels went by in another split; told as a problem if so.

        In the same split they are told, and kept.
        """
        other = seen.before(digest, split, name)
        choice = getattr(self.builder_config, "leaks", "refuse")
        if other is None:
            return False
        if other[0] == split:
            text = f"as in {other[1]}, in {split} both"
            self.report(Problem("same picture twice in a split", name, text, harmful=False))
            return False
        if choice == "allow":
            return False
        text = f"the same picture, pixel by pixel, as {other[1]} of {other[0]}"
        if choice == "move":
            self.counts[f"left out of {split}: the same picture is in {other[0]}"] += 1
        else:
            self.report(Problem("leakage between splits", name, f"{text} (here in {split})"))
        return True

    def place_of(self, item: record.Record) -> str:
        """Where to look for a record whose content is at fault: a file relative to the source."""
        return f"record {item.get('id')}"

    def splits(self, source: Path | None) -> dict[str, Iterable[record.Record | packed.Packed]]:
        """The records of each split; `source` is the folder of files, None if there is none.

        Whatever is cut, skipped or repaired is counted in `self.counts` under words that can be
        printed as they are; what needs a sentence goes to `self.notes`.
        """
        raise NotImplementedError

    def jobs(self, split: str) -> tuple[Callable[[Any], Any], Iterable[Any]]:
        """(function, jobs) of a split, for builders with the parameter `beam`; after `splits`."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(type(self).__doc__ or "").strip(),
            features=packed.accept_packed(record.features(self.IMAGE_DTYPE, self.CHANNELS)),
            # Written beside the data: what it was built with.
            metadata=tfds.core.MetadataDict(parameters=self.builder_config.values()),
        )

    def _generate_splits(self, *args: Any, **kwargs: Any) -> Any:
        with writing.mended(writing.COMPRESSION[self.CHANNELS]):
            if not getattr(self.builder_config, "beam", False):
                return super()._generate_splits(*args, **kwargs)
            with beam.job_folder(Path(self._data_dir).parent) as self._jobs_folder:
                try:
                    return super()._generate_splits(*args, **kwargs)
                except Exception as error:
                    if reason := beam.reason(error):
                        raise UserError(reason) from error
                    raise

    def _process_pipeline_result(self, pipeline_result: Any) -> None:
        self.counts.update(beam.counts(pipeline_result))

    def without_train(self, splits: Mapping[str, Any]) -> str:
        """What is wrong with splits of which none is train; empty if nothing is."""
        without = "train" not in splits and splits.keys() & {"val", "validation", "test"}
        if not without or self.builder_config.without_train:
            return ""
        return (
            f"no train split, only {', '.join(splits)}: nothing can be trained on this;"
            " --without_train takes it for evaluation"
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        source = Path(dl_manager.manual_dir) if self.SOURCE else None
        seen: set[str] = set()
        self.packing = True
        splits = self.splits(source)
        if not splits:
            raise UserError(f"{self.name}: no split has any records")
        if without := self.without_train(splits):
            raise UserError(f"{self.name}: {without}")
        if getattr(self.builder_config, "beam", False):
            skip_bad = getattr(self.builder_config, "skip_bad", False)
            return {
                split: beam.examples(*self.jobs(split), self._jobs_folder, split, skip_bad)
                for split in splits
            }
        return {
            split: self._generate_examples(split, records, seen)
            for split, records in splits.items()
        }

    def _generate_examples(
        self, split: str, records: Iterable[record.Record | packed.Packed], seen: set[str]
    ) -> Iterator[tuple[str, Any]]:
        for item in records:
            if not isinstance(item, packed.Packed) and not self._fit(item):
                continue
            ready = item if isinstance(item, packed.Packed) else packed.pack(item)
            name, example = ready.id, ready.example
            if name in seen:
                raise UserError(f"record {name}: the id occurs twice in {self.name}")
            seen.add(name)
            self.counts[f"{split} records"] += 1
            yield name, example
        if not self.counts[f"{split} records"]:
            raise UserError(
                f"{self.name}: no record is left of split {split} (left out: {self._left_out()})"
            )

    def _fit(self, item: record.Record) -> bool:
        """Whether nothing about a record would harm training; what is doubtful until then is told.

        Builders of packed records look themselves, before they pack.
        """
        for kind, detail, harmful in doubts(item):
            self.report(Problem(kind, self.place_of(item), detail, harmful))
            if harmful:
                return False
        return True

    def _left_out(self) -> str:
        left = ((what, n) for what, n in self.counts.items() if what.startswith("left out"))
        found = [f"{what.partition(': ')[2]} {count}" for what, count in left]
        return ", ".join(found) or "nothing"


def _slug(value: Any) -> str:
    return "".join(letter if letter.isalnum() or letter in "._" else "_" for letter in str(value))
