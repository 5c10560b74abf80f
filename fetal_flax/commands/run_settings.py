"""Where the settings of a run come from, before flags override single ones."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

import tyro

from fetal_flax import presets
from fetal_flax.config import TrainConfig
from fetal_flax.errors import InputError


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What commands that train have in common: a preset or a file, and every setting as a flag."""

    settings: Annotated[TrainConfig, tyro.conf.arg(name="")]
    preset: Annotated[
        str | None,
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="[NAME]",
            help=f"Preset to begin with, before all flags: {', '.join(presets.names())}.",
            help_behavior_hint=f"(default: {presets.DEFAULT})",
        ),
    ] = None
    config: Path | None = None
    """Your own file whose `config()` gives the settings, in a preset's place."""

    @classmethod
    def before_flags(cls, flags: Sequence[str]) -> Self:
        """Returns the settings that flags such as --schedule.epochs override and --help shows.

        Raises:
            InputError: There is no such preset, file or run, or it can't be used.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--config", type=Path)
        parser.add_argument("--workdir", type=Path)
        parser.add_argument("--resume", action="store_true")
        known, _ = parser.parse_known_args(flags)
        preset = flags[0] if flags and not flags[0].startswith("-") else None
        if preset is not None and known.config:
            raise InputError("give a preset's name or --config, not both")
        if known.config:
            settings = presets.load_file(known.config)
        elif known.resume and known.workdir and preset is None:
            from fetal_flax.training.workdir import read_config

            settings = read_config(known.workdir)
        else:
            settings = presets.load(presets.DEFAULT if preset is None else preset)
        return cls(settings, preset)
