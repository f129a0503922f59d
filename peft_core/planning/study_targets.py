"""Rank the API of a repository in a child process: a StudyPlanRequest (JSON) in, a StudyPlan or an ErrorInfo out.

By hand: `python -m peft_core.planning.study_targets < request.json`.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations

from peft_core.data.examples import FileResult, parts_of_file, printable_path
from peft_core.data.exclusions import ExclusionReason
from peft_core.data.languages import language_named, language_of_file
from peft_core.data.records import parse
from peft_core.data.secrets import redact_secrets
from peft_core.data.selection import Selection
from peft_core.data.snapshot import Snapshot, read_snapshot
from peft_core.data.sources import walk_sources
from peft_core.data.study.builtins import builtin_names
from peft_core.data.study.definitions import Definition
from peft_core.data.study.index import Reference, RepositoryIndex, index_files
from peft_core.data.study.items import Drop, check_item
from peft_core.data.units import file_digest, units_of_file
from peft_core.data.walk import File
from peft_core.errors import DataError
from peft_core.schemas.dataset import DatasetPurpose
from peft_core.schemas.study import StudyPair, StudyPlan, StudyPlanRequest, StudyTarget
from peft_core.system.allowed_paths import require_data_path
from peft_core.system.child_process import answer_request
from peft_core.system.failures import TaskKind

TASK = TaskKind(
    name="study plan",
    crash_code="inspection_failed",
    log="the log of the server",
    memory_advice=("Close other programs, or give a part of the code.",),
)
MAX_TARGETS = 24  # a plan of 24 is 20 kB of text, which every client passes on
MAX_PAIRS = 8
READ_S = 25.0  # three megabytes of code take ten seconds
_COMPARED_S = 8.0
_MAX_COMPARED = 400  # files that have changed and are cut to compare their units
_MAX_EXCERPT_LINES = 10
_MAX_EXCERPT = 400  # characters
_MAX_USAGE = 160
_SHOWN = 3  # callers and lines that are shown of each
_SHARED_NAME = 0.05  # weight of a call whose name is one of the language's own: most are of those
_PRIVATE = 0.3
_UNDOCUMENTED, _CHANGED = 1.5, 3.0  # as many doublings of the number of calls
_TEST = re.compile(
    r"(^|/)(tests?|__tests__|specs?|testing|fixtures|benchmarks?)/|(^|/)(test_[^/]*|conftest)\.\w+$|[._-](test|spec)s?\.\w+$",
    re.IGNORECASE,
)


def study_plan(request: StudyPlanRequest) -> StudyPlan:
    """Return what is most worth study items.

    Raises:
        DataError: 'no_api': the repository defines nothing in a language with a grammar; see also `walk_sources`.
        InvalidArgument: a repository may not be read.
    """
    for source in request.repositories:
        require_data_path(
            source.path,
            data_dir=request.data_dir,
            allowed_roots=request.allowed_roots,
            field=DatasetPurpose.TRAINING.field,
        )
    files = walk_sources(request.repositories, Selection(request.include, request.exclude)).files
    files.sort(key=lambda file: _TEST.search(file.name) is not None)
    roots = [source.path for source in request.repositories]
    index = index_files(files, roots, is_over=_clock(READ_S))
    snapshot = None if request.adapter is None else read_snapshot(request.adapter)
    ranking = Ranking(index, {printable_path(file.name): file for file in files}, snapshot)
    if not ranking.order:
        raise DataError(
            f"{', '.join(map(str, roots))} defines no function, method or class that other code could use.",
            code="no_api",
            suggestions=(
                "Languages with a grammar are needed: docs/training-data.md lists them",
                "Give the directory of the code",
            ),
        )
    best = ranking.order[:MAX_TARGETS]
    targets = [ranking.target(each) for each in best]
    return StudyPlan(
        project_id=request.project_id,
        source=", ".join(map(str, roots)),
        definitions=len(ranking.order),
        unread_files=index.unread,
        compared_with=request.adapter.name if request.adapter is not None and snapshot is not None else "",
        targets=targets,
        pairs=ranking.pairs(),
        example=_example(index, best, targets),
    )


def _clock(seconds: float) -> Callable[[], bool]:
    """Return a function that says whether so many seconds have passed from now on."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


@dataclass
class Ranking:
    """Orders the definitions of a repository by how much is gained by knowing them."""

    index: RepositoryIndex
    files: dict[str, File]
    snapshot: Snapshot | None
    _lines: dict[str, list[str]] = field(default_factory=dict)

    @cached_property
    def order(self) -> list[Definition]:
        """Definitions that other code can use, the most valuable first. Tests are no API."""
        usable = [
            each
            for each in self.index.definitions.values()
            if not _TEST.search(each.path)
            and not each.name.startswith("__")
            and each.name not in ("main", "constructor")
        ]
        best: dict[str, Definition] = {}  # of one name, what is known of one helps with the others
        for each in sorted(usable, key=lambda each: (-self._score(each), each.qualified)):
            best.setdefault(each.name, each)
        return list(best.values())

    def _score(self, definition: Definition) -> float:
        score = math.log2(1 + self._calls(definition)) * (1.0 if definition.is_public else _PRIVATE)
        if definition.is_public and not definition.documented:
            score += _UNDOCUMENTED
        return score + _CHANGED * (definition.qualified in self.changes)

    def _calls(self, definition: Definition) -> float:
        """Return how often a definition is probably called: definitions of one name share its calls."""
        alike = len(self.index.by_name[definition.name])
        weight = _SHARED_NAME if _is_of_the_language(definition) else 1.0
        return len(self.index.calls_of(definition.name)) / alike * weight

    @cached_property
    def changes(self) -> frozenset[str]:
        """The qualified names of the definitions that the snapshot does not know as they are now."""
        found: set[str] = set()
        if self.snapshot is None:
            return frozenset()
        before = {state.path: state for state in self.snapshot.files}
        is_over, cut = _clock(_COMPARED_S), 0
        for path, definitions in self.index.in_file.items():
            state, file = before.get(path), self.files[path]
            if state is not None and (state.units is None or file_digest(file) == state.digest):
                continue
            if cut >= _MAX_COMPARED or is_over():
                break
            cut += 1
            units = units_of_file(file)
            for each in definitions:
                around = [unit for unit in units if each.start < unit.end_line and unit.start_line <= each.end]
                if any(unit.digest not in self.snapshot.units for unit in around):
                    found.add(each.qualified)
        return frozenset(found)

    def target(self, definition: Definition) -> StudyTarget:
        lines = self._text(definition.path)[definition.start : definition.end]
        calls = self.index.calls_of(definition.name)
        by_use = sorted(calls, key=lambda each: (_TEST.search(each.path) is not None, each.path == definition.path))
        callers = {
            f"{each.qualified} ({place.path}:{place.row + 1})": None
            for place in by_use
            if (each := self.index.enclosing(place))
        }
        return StudyTarget(
            study=definition.qualified,
            kind=definition.kind,
            path=definition.path,
            start_line=definition.start + 1,
            end_line=definition.end,
            signature="" if redact_secrets([definition.signature])[1] else definition.signature,
            reasons=self._reasons(definition, len(calls)),
            calls=len(calls),
            callers=list(callers)[:_SHOWN],
            usage=self._usage(definition, by_use),
            documented=definition.documented,
            changed=definition.qualified in self.changes,
            excerpt=_excerpt(lines),
        )

    def _reasons(self, definition: Definition, calls: int) -> list[str]:
        reasons = ["new or changed since the latest training"] if definition.qualified in self.changes else []
        alike = len(self.index.by_name[definition.name])
        if calls:
            shared = f" (a name that {alike} definitions share)" if alike > 1 else ""
            shared = " (a name that the language has as well)" if _is_of_the_language(definition) else shared
            reasons.append(f"called {calls} {'time' if calls == 1 else 'times'} in the repository{shared}")
        if not definition.documented:
            reasons.append("undocumented")
        return reasons or ["part of the public API"]

    def _usage(self, definition: Definition, places: Sequence[Reference]) -> list[str]:
        """Return different lines that call a definition, as they stand in the code."""
        found: dict[str, None] = {}
        for place in places[: 20 * _SHOWN]:
            if place.path == definition.path and definition.start <= place.row < definition.end:
                continue
            lines = self._text(place.path)
            line = lines[place.row].strip() if place.row < len(lines) else ""
            if line and len(line) <= _MAX_USAGE:
                found[line] = None
            if len(found) == _SHOWN:
                break
        return list(found)

    def _text(self, path: str) -> list[str]:
        """Return the lines of a file without its secrets."""
        if path not in self._lines:
            parts = parts_of_file(self.files[path], path, FileResult())
            self._lines[path] = [] if isinstance(parts, ExclusionReason) else redact_secrets(parts[0].lines)[0]
        return self._lines[path]

    def pairs(self) -> list[StudyPair]:
        """Return the definitions that most functions use together."""
        known = {
            each.name: each
            for each in reversed(self.order[: 4 * MAX_TARGETS])
            if each.is_public and self._calls(each) >= 2 and not _is_of_the_language(each)
        }
        used: defaultdict[str, set[str]] = defaultdict(set)
        for name in known:
            for place in self.index.calls_of(name):
                if (caller := self.index.enclosing(place)) is not None and caller.name != name:
                    used[caller.qualified].add(name)
        together = Counter(pair for names in used.values() for pair in combinations(sorted(names), 2))
        where = {pair: caller for caller, names in used.items() for pair in combinations(sorted(names), 2)}
        return [
            StudyPair(
                first=known[pair[0]].qualified, second=known[pair[1]].qualified, together=count, where=where[pair]
            )
            for pair, count in together.most_common(MAX_PAIRS)
            if count > 1
        ]


def _is_of_the_language(definition: Definition) -> bool:
    """Return whether the language has the name as well, so that most calls are probably not of this definition."""
    language = language_of_file(definition.path.rpartition("/")[2])
    return language is not None and definition.name in builtin_names(language.name)


def _excerpt(lines: Sequence[str]) -> str:
    text = "".join(lines[:_MAX_EXCERPT_LINES])[:_MAX_EXCERPT].rstrip()
    return f"{text}\n…" if len(text) < len("".join(lines).rstrip()) else text


def _example(index: RepositoryIndex, best: Sequence[Definition], targets: Sequence[StudyTarget]) -> dict[str, str]:
    """Return a record about one of the best that passes the check, with a line of the repository that calls it if possible."""
    for definition, target in zip(best, targets, strict=True):
        language = language_of_file(definition.path.rpartition("/")[2]) or language_named("text")
        for line in target.usage:
            answer = (
                f"Call `{definition.name}`, which is defined in `{definition.path}`:\n\n```{language.name}\n{line}\n```"
            )
            record = {"study": target.study, "question": f"How is `{definition.name}` used?", "answer": answer}
            if not isinstance(check_item(parse(record, "example"), index), Drop):
                return record
    name, first = best[0].name, targets[0]
    return {
        "study": first.study,
        "question": f"Where is `{name}`?",
        "answer": f"`{name}` is defined in `{first.path}`.",
    }


if __name__ == "__main__":
    sys.exit(answer_request(StudyPlanRequest, study_plan, TASK))
