"""`fetal-flax cross-validate`: a run for each fold, and all of them evaluated together."""

import dataclasses
from pathlib import Path

from fetal_flax.commands.run_settings import RunSettings


@dataclasses.dataclass(frozen=True)
class CrossValidate(RunSettings):
    """Train every fold and report on all images; goes on where it stopped."""

    workdir: Path | None = None
    """Where everything goes; runs/NAME-folds by default."""

    def run(self) -> int:
        """Trains and evaluates, and prints the headline."""
        from fetal_flax.evaluation import cross_validation
        from fetal_flax.reporting.headline import headline

        workdir = self.workdir or cross_validation.default_workdir(self.settings)
        print(headline(cross_validation.cross_validate(self.settings, workdir), workdir))
        return 0
