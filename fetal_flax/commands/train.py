"""`fetal-flax train`: one run, begun or resumed."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from fetal_flax.commands.run_settings import RunSettings
from fetal_flax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Train(RunSettings):
    """Train a network; --section.field VALUE overrides any setting of the config."""

    workdir: Path | None = None
    """Where everything goes; by default runs/NAME, or runs/NAME-folds/fold-K with --fold K."""
    fold: int | None = None
    """Train one fold of a cross-validation, counted from 0 (data.folds, or 5); the command
    cross-validate trains those that are missing and reports on all."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on where the run in the workdir stopped, by default with its settings."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Build everything, run one step, print the plan and write nothing."""
    profile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Trace a few steps into the workdir's profile/, for TensorBoard or Perfetto."""
    distributed: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train together with other processes; SLURM, Open MPI and the next three flags tell which."""
    coordinator: str | None = None
    """HOST:PORT of process 0, with --distributed."""
    process_count: int | None = None
    """Number of processes, with --distributed."""
    process_id: int | None = None
    """This process's position among them, from 0, with --distributed."""

    def run(self) -> int:
        """Trains, or prints the plan."""
        from fetal_flax.training import distributed, dry_run, run

        distributed_flags = self.coordinator, self.process_count, self.process_id
        if self.distributed:
            distributed.initialize(*distributed_flags)
        elif any(flag is not None for flag in distributed_flags):
            raise InputError(
                "--coordinator, --process-count and --process-id are for --distributed"
            )
        settings, workdir = self.settings, Path("runs", self.settings.name)
        if self.fold is not None:
            from fetal_flax.evaluation import cross_validation

            settings = cross_validation.with_fold(settings, self.fold)
            folds = cross_validation.default_workdir(settings)
            workdir = cross_validation.fold_folder(folds, self.fold)
        if self.dry_run:
            dry_run.dry_run(settings)
        else:
            run.train(settings, self.workdir or workdir, resume=self.resume, profile=self.profile)
        return 0
