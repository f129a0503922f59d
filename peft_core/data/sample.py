"""Cut a sample of a repository's files into examples, to say how many units, examples and tokens all of them hold.

In: the files that `walk` found. Out: a `RepositorySample`. A small repository is cut completely; then the training set follows
from the same split that the training makes. Of a larger one, its giant files and random others are cut, and the rest is
extrapolated by size. Tokens are estimated from bytes, so that no tokenizer is loaded.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from peft_core.data.classification import NOTEBOOK
from peft_core.data.examples import FileResult, examples_from_file, keep_secrets, printable_path
from peft_core.data.exclusions import Exclusions
from peft_core.data.minhash import MinHashIndex
from peft_core.data.notebook import Notebook, read_notebook
from peft_core.data.split import (
    HELD_OUT_MAX_EXAMPLES,
    ExampleKey,
    cap_per_file,
    count_distinct,
    digest,
    file_limit,
    split,
    with_canonical_digests,
)
from peft_core.data.token_counter import BYTES_PER_TOKEN, EstimatedTokenCounter
from peft_core.data.walk import File
from peft_core.schemas.dataset import DatasetPurpose, TrainingSetSize

# Bytes of the files that are cut; a repository of at most this size is cut completely. Where finding the files takes a second,
# cutting some of them should not take another one.
_SAMPLE_BYTES = 800_000
_SAMPLE_BYTES_OF_MANY_FILES = 400_000
_MANY_FILES = 1_000
# A file with more than this share of all code is cut in any case, up to so many bytes of such files: it may be a table of data,
# and would then spoil a random sample, whether it is in it or not.
_GIANT_SHARE = 0.02
_GIANT_BYTES = 200_000
# Limits of the work that is done where such a sample gives too few examples. What is in doubt then is judged by `prepare`.
_PROBE_FILES = 300
_PROBE_BYTES = 1_500_000
_TINY_BYTES = 100  # a smaller file, such as an almost empty __init__.py, holds no code that counts
_SKIPPING_SPEED = 20  # prose and outputs of notebooks are read so many times faster than code is cut
_SIGNED = 100  # examples of an incomplete sample that are compared for near duplicates, to see that there are enough
_OUTSIDE_DEFINITIONS = frozenset(
    {"module", "block"}
)  # kinds of examples that hold no definition, or are cut without a grammar
_MARKDOWN_CODE_SHARE = 0.2  # share of a Markdown file that is fenced code
# Notebooks that are read to see which share of them is code. The rest is outputs, of which some notebooks have a hundred times
# as much as code, and others none.
_SAMPLED_NOTEBOOKS = 20
_SAMPLED_NOTEBOOK_BYTES = 20_000_000


@dataclass
class RepositorySample:
    """What the files that were cut hold, and what all files do."""

    all_files: Sequence[File]
    code_shares: Mapping[str, float]  # language -> share of its files that is code; others: all of it
    signed: int | None = None  # only the first so many examples are compared for near duplicates; None: all
    files: int = 0  # that were cut
    giants: dict[str, float] = field(default_factory=dict)  # those that stand for themselves only, and their size
    size: float = 0.0  # bytes of code in those that stand for others, too
    units: Counter[bool] = field(default_factory=Counter)  # whether it is a giant -> functions, methods and classes
    keys: list[ExampleKey] = field(default_factory=list)  # one per example
    signatures: MinHashIndex = field(default_factory=MinHashIndex)
    left_out: Counter[str] = field(default_factory=Counter)
    not_read: Exclusions = field(default_factory=Exclusions)

    @property
    def is_complete(self) -> bool:
        return self.files == len(self.all_files)

    @property
    def estimated_units(self) -> int:
        return round(self.units[True] + self.units[False] * self._scale)

    @property
    def estimated_tokens(self) -> int:
        return round(self._total_size / BYTES_PER_TOKEN)

    @cached_property
    def _total_size(self) -> float:
        return sum(map(self.code_size, self.all_files))

    @property
    def _scale(self) -> float:
        """How many bytes of other files a byte of a random file stands for."""
        if self.is_complete:
            return 1.0
        return (self._total_size - sum(self.giants.values())) / max(1.0, self.size)

    def add(self, file: File, result: FileResult, *, is_giant: bool) -> None:
        self.files += 1
        if is_giant:
            self.giants[printable_path(file.name)] = self.code_size(file)
        else:
            self.size += self.code_size(file)
        # Code outside of definitions, such as that of a script, counts by the examples that it becomes.
        outside = sum(example.kind in _OUTSIDE_DEFINITIONS for example in result.examples)
        self.units[is_giant] += max(result.definitions, outside) if result.examples else 0
        self.left_out.update(result.left_out)
        if result.not_read is not None:
            self.not_read.add(result.not_read, file.name)
        for example in result.examples:
            text = example.segments[-1].text
            if self.signed is None or len(self.keys) < self.signed:
                self.signatures.add(text)
            self.keys.append(ExampleKey(example.path, digest(text), example.tokens))

    def code_size(self, file: File) -> float:
        return file.size * self.code_shares.get(file.language.name, 1.0)

    def distinct_keys(self) -> list[ExampleKey]:
        signed = self.keys[: self.signed]
        return with_canonical_digests(signed, self.signatures) + self.keys[len(signed) :]

    def has_enough(self, purpose: DatasetPurpose) -> bool:
        if len(self.keys) < purpose.min_examples:
            return False
        examples, files = count_distinct(self.distinct_keys())
        return examples >= purpose.min_examples and files >= purpose.min_files

    def training_set(self, held_out_fraction: float, seed: int) -> TrainingSetSize:
        """Return how many examples will be trained on, and their tokens."""
        if self.is_complete:
            parts = split(self.keys, self.signatures, held_out_fraction=held_out_fraction, seed=seed)
            train = cap_per_file(self.keys, parts.train)
            return TrainingSetSize(examples=len(train), tokens=sum(self.keys[position].tokens for position in train))
        distinct = list({key.digest: key for key in self.distinct_keys()}.values())
        weights = self._weights(distinct)
        examples = sum(weights)
        tokens = sum(key.tokens * weight for key, weight in zip(distinct, weights, strict=True))
        share = 1 - min(held_out_fraction, HELD_OUT_MAX_EXAMPLES / max(1.0, examples))
        return TrainingSetSize(examples=max(1, round(examples * share)), tokens=max(1, round(tokens * share)))

    def _weights(self, keys: Sequence[ExampleKey]) -> list[float]:
        """Return for each example how many examples of the training set it stands for: fewer than one in a capped giant."""
        tokens: Counter[str] = Counter()
        for key in keys:
            tokens[key.file] += key.tokens
        scale = self._scale
        limit = file_limit([tokens[file] for file in self.giants] + [round(scale * sum(tokens.values()) / 20)] * 20)
        return [min(1.0, limit / max(1, tokens[key.file])) if key.file in self.giants else scale for key in keys]


def sample_repository(files: Sequence[File], max_length: int, purpose: DatasetPurpose) -> RepositorySample:
    """Cut all files, or as many as are needed to estimate the rest and to see that there are enough examples."""
    is_large = len(files) > _MANY_FILES
    enough = _SAMPLE_BYTES_OF_MANY_FILES if is_large else _SAMPLE_BYTES
    shares = {"markdown": _MARKDOWN_CODE_SHARE, NOTEBOOK.name: _code_share_of_notebooks(files)}
    may_be_complete = sum(file.size for file in files) <= _PROBE_BYTES
    sample = RepositorySample(files, shares, signed=None if may_be_complete else _SIGNED)
    counter = EstimatedTokenCounter()
    giants = _giant_files(sample)
    others = sorted((file for file in files if file.name not in giants), key=_random_order)
    read = 0.0
    for file in (*giants.values(), *others):
        is_sampled = read >= enough or (is_large and sample.files >= _PROBE_FILES)
        is_probed = sample.files >= _PROBE_FILES or read >= _PROBE_BYTES
        if is_sampled and (is_probed or sample.has_enough(purpose)):
            break
        read += max(sample.code_size(file), file.size / _SKIPPING_SPEED)
        result = examples_from_file(file, token_counter=counter, max_length=max_length, redact=keep_secrets)
        sample.add(file, result, is_giant=file.name in giants)
    return sample


def _giant_files(sample: RepositorySample) -> dict[str, File]:
    limit = _GIANT_SHARE * sum(map(sample.code_size, sample.all_files))
    giants: dict[str, File] = {}
    read = 0
    large = [file for file in sample.all_files if sample.code_size(file) > limit]
    for file in sorted(large, key=lambda file: (-file.size, file.name)):
        read += file.size
        if read > _GIANT_BYTES:
            break
        giants[file.name] = file
    return giants


def _random_order(file: File) -> tuple[bool, int]:
    """Return a key that does not depend on the place of a file in the tree, and is the same each time; tiny files come last."""
    return file.size < _TINY_BYTES, zlib.crc32(file.name.encode("utf-8", "surrogateescape"))


def _code_share_of_notebooks(files: Sequence[File]) -> float:
    """Return which share of the bytes of the notebooks is code, from a sample."""
    read = code = 0
    notebooks = sorted((file for file in files if file.language is NOTEBOOK), key=lambda file: file.name)
    for file in notebooks[:: 1 + len(notebooks) // _SAMPLED_NOTEBOOKS]:
        if read and read + file.size > _SAMPLED_NOTEBOOK_BYTES:
            break
        notebook = read_notebook(file.path)
        read += file.size
        if isinstance(notebook, Notebook):
            code += sum(len(line.encode()) for part in notebook.parts for line in part.lines)
    return code / read if read else 0.0
