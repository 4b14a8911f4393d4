"""What the cache costs and saves, in teacher passes: the forward pass of one image.

Imports nothing of ours.
"""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class CacheFigures(_Record):
    """`cache` of metrics/comparison.json; no figure depends on time."""

    teacher_passes: int
    passes_saved: int
    break_even_epochs: int
    break_even_students: int
    store_bytes: int | None


class Economics(_Record):
    """One store, and the students that were trained from it.

    Cached or online, a pass costs the same, so the numbers of passes decide. Writing and reading
    the store come on top; benchmarks/README.md has their times.
    """

    views: PositiveInt
    training_images: PositiveInt
    held_out_images: NonNegativeInt  # validation and test, once each
    epochs: Mapping[str, PositiveInt]  # by student
    of_both_views: frozenset[str] = frozenset()  # students of pairs: two passes an image and epoch
    bytes_per_row: PositiveFloat | None  # of stored training rows; None if not measured
    extra_passes: NonNegativeInt = 0  # that measured the store's fidelity alone

    @property
    def rows(self) -> int:
        """Count the rows of the store."""
        return self.views * self.training_images + self.held_out_images

    @property
    def teacher_passes(self) -> int:
        """Count the passes made for the cache."""
        return self.rows + self.extra_passes

    @property
    def online_passes(self) -> int:
        """Count the passes of the same trainings with a teacher that runs at every step."""
        epochs = sum(self._passes(name) * count for name, count in self.epochs.items())
        return epochs * self.training_images

    def _passes(self, student: str) -> int:
        """Of a live teacher, for each image of an epoch."""
        return 2 if student in self.of_both_views else 1

    @property
    def passes_saved(self) -> int:
        """Negative if the cache took more passes than it saved."""
        return self.online_passes - self.teacher_passes

    @property
    def break_even_epochs(self) -> int:
        """The fewest epochs of any one student that take more passes online than the cache did."""
        fewest = min(map(self._passes, self.epochs))
        return self.teacher_passes // (fewest * self.training_images) + 1

    @property
    def break_even_students(self) -> int:
        """The fewest students, of mean epochs, that take more passes online than the cache did."""
        return self.teacher_passes * len(self.epochs) // self.online_passes + 1

    @property
    def store_bytes(self) -> int | None:
        """Estimate the bytes of all rows, held-out rows at the size of training rows."""
        if self.bytes_per_row is None:
            return None
        return round(self.rows * self.bytes_per_row)

    @property
    def figures(self) -> CacheFigures:
        return CacheFigures(**{name: getattr(self, name) for name in CacheFigures.model_fields})
