"""What the cache costs and saves, counted in teacher passes: one image through the teacher once.

Imports nothing of ours.
"""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt


class Economics(BaseModel):
    """One store, and the students that learned from it.

    Both ways make passes of the same kind, so that their number alone decides, whatever one costs.
    Writing and reading the store come on top; benchmarks/README.md has what they take.
    """

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    views: PositiveInt
    training_images: PositiveInt
    held_out_images: NonNegativeInt  # validation and test, once each
    epochs: Mapping[str, PositiveInt]  # that each student trained for
    bytes_per_row: PositiveFloat | None  # of stored training rows; None where it was not measured

    @property
    def teacher_passes(self) -> int:
        """Made for the cache."""
        return self.views * self.training_images + self.held_out_images

    @property
    def online_passes(self) -> int:
        """That the same students would have taken from a teacher who answers at every step."""
        return sum(self.epochs.values()) * self.training_images

    @property
    def passes_saved(self) -> int:
        """Negative where the cache took more than it saved."""
        return self.online_passes - self.teacher_passes

    @property
    def break_even_epochs(self) -> int:
        """Of one student: the fewest that take more passes online than the cache did."""
        return self.teacher_passes // self.training_images + 1

    @property
    def break_even_students(self) -> int:
        """Of these students' mean epochs: the fewest that take more passes online."""
        return self.teacher_passes * len(self.epochs) // self.online_passes + 1

    @property
    def store_bytes(self) -> int | None:
        """Of all rows, as if validation and test took the bytes of training rows."""
        if self.bytes_per_row is None:
            return None
        return round(self.teacher_passes * self.bytes_per_row)

    @property
    def figures(self) -> dict[str, int | None]:
        """For metrics/comparison.json: no clock is in them."""
        return {
            "teacher_passes": self.teacher_passes,
            "passes_saved": self.passes_saved,
            "break_even_epochs": self.break_even_epochs,
            "break_even_students": self.break_even_students,
            "store_bytes": self.store_bytes,
        }
