"""How far the code has moved on since an adapter was trained."""

from __future__ import annotations

from pydantic import Field

from peft_core.schemas.counts import counted
from peft_core.schemas.frozen import FrozenModel


class Staleness(FrozenModel):
    """What has changed in the code since an adapter was trained. Fields are null if that cannot be said; `text` says why."""

    text: str = Field(description="For people: what has changed, and when to retrain.")
    retrain: bool | None = Field(None, description="Whether so much has changed that retraining is worthwhile.")
    commits_behind: int | None = Field(None, description="Null without git, or if its commit is not in the history.")
    files: int | None = Field(None, description="All files, then or now.")
    files_changed: int | None = None
    files_new: int | None = None
    files_deleted: int | None = None
    units_changed_percent: float | None = Field(
        None, description="Share of the functions and statements that the adapter was not trained with."
    )
    source: str | None = Field(None, description="The code that it was trained on.")

    @property
    def in_brief(self) -> str:
        """For a line in a list, such as "14 commits behind, 9 % of the units changed"; empty if nothing is known."""
        if self.files is None:
            return ""
        percent, behind = self.units_changed_percent or 0, self.commits_behind or 0
        files = (self.files_changed or 0) + (self.files_new or 0) + (self.files_deleted or 0)
        in_files = f"{counted(files, 'file')} changed" if files else ""
        facts = [
            f"{counted(behind, 'commit')} behind" if behind else "",
            f"{percent:.0f} % of the units changed" if percent >= 1 else in_files,
            "retrain it" if self.retrain else "",
        ]
        return ", ".join(filter(None, facts)) or "up to date"
