"""Which values the settings of `config.py` may take, and settings to and from JSON.

A value has to be of its field's type, usable at all, and what `_RULES` has for its field; then
what hangs together has to agree.
"""

import dataclasses
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeGuard

from fetal_flax.errors import InputError, printable

Config = typing.TypeVar("Config")

_LARGEST_COUNT = 2**31 - 1
_FLOAT32 = (1.2e-38, 3.4e38)  # Smallest normal and largest; XLA takes what is smaller for 0.
_LONGEST_TEXT = 1000
_LARGEST_SIDE = 4096  # Of an image in pixels.
_MOST_CHANNELS = 4096
_MOST_WORKERS = 1024


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What a field's value must be, in words and as a test; None, where allowed, isn't tested."""

    words: str
    holds: Callable[[Any], bool]


def _at_least(least: int) -> _Rule:
    return _Rule(f"at least {least}", lambda value: value >= least)


def _up_to(most: float) -> _Rule:
    return _Rule(f"in [0, {most}]", lambda value: 0 <= value <= most)


def _from_to(least: int, most: int, what: str) -> _Rule:
    return _Rule(f"{least} to {most} {what}", lambda value: least <= value <= most)


def _sides(least: int) -> _Rule:
    words = f"a height and a width of {least} to {_LARGEST_SIDE}"
    return _Rule(words, lambda sides: all(least <= side <= _LARGEST_SIDE for side in sides))


def _text(words: str) -> _Rule:
    return _Rule(words, bool)


_POSITIVE = _Rule("positive", lambda value: value > 0)
_NOT_NEGATIVE = _Rule("0 or more", lambda value: value >= 0)
_BELOW_1 = _Rule("in [0, 1)", lambda value: 0 <= value < 1)
_INSIDE_0_1 = _Rule("between 0 and 1", lambda value: 0 < value < 1)

_RULES: dict[str, dict[str, _Rule]] = {
    "model": {
        "aspp_width": _from_to(1, _MOST_CHANNELS, "channels or None"),
        "dropout": _BELOW_1,
        "base_width": _from_to(1, _MOST_CHANNELS, "channels"),
    },
    "encoder": {
        "weights": _text("a name, a path or 'none'"),
        "learning_rate": _POSITIVE,
    },
    "data": {
        "image_size": _sides(32),
        "validation_fraction": _INSIDE_0_1,
        "folds": _Rule("0 or at least 2", lambda folds: folds == 0 or folds >= 2),
        "phantom_count": _at_least(2),
        "phantom_size": _sides(64),
        "steps_per_dispatch": _at_least(1),
        "workers": _from_to(0, _MOST_WORKERS, "or None"),
        "prefetch": _at_least(1),
        "keep_validation_mb": _at_least(0),
    },
    "augmentation": {
        "flip_probability": _up_to(1),
        "affine_probability": _up_to(1),
        "photometric_probability": _up_to(1),
        "rotation_degrees": _up_to(180),
        "scale": _up_to(0.9),
        "translation": _up_to(1),
        "gain": _up_to(1),
        "gamma": _up_to(4),
        "blur_px": _up_to(3),
        "speckle": _up_to(1),
        "shadow": _up_to(1),
    },
    "loss": {
        "dice_weight": _NOT_NEGATIVE,
        "bce_weight": _NOT_NEGATIVE,
        "smoothing": _POSITIVE,
        "pos_weight": _Rule(
            "a positive number or 'auto'", lambda weight: weight == "auto" or weight > 0
        ),
    },
    "optimizer": {
        "learning_rate": _POSITIVE,
        "beta1": _BELOW_1,
        "beta2": _BELOW_1,
        "epsilon": _POSITIVE,
        "l2": _NOT_NEGATIVE,
    },
    "schedule": {
        "epochs": _at_least(1),
        "batch_size": _at_least(1),
        "average_decay": _BELOW_1,
        "factor": _INSIDE_0_1,
        "patience": _NOT_NEGATIVE,
        "threshold": _NOT_NEGATIVE,
        "min_learning_rate": _NOT_NEGATIVE,
        "early_stopping_patience": _Rule("at least 1 or None", lambda epochs: epochs >= 1),
    },
    "run": {
        "name": _text("a non-empty name"),
        "seed": _Rule("0 or more and below 2^32", lambda seed: 0 <= seed < 2**32),
        "init": _text("a path or 'none'"),
    },
}
"""Rules by section and field; the fields of `TrainConfig` itself are in the section `run`."""

_PATHS = {"encoder": ("weights",), "data": ("data_dir", "cache_dir"), "run": ("init",)}


def check(settings: object, section: str) -> None:
    """Refuses settings that no run could use.

    Args:
        settings: A dataclass of `config.py`.
        section: Its place in `TrainConfig`, such as `model`; `run` for a `TrainConfig`.

    Raises:
        InputError: A value has another type than its field, breaks its rule, or doesn't go with
            another's.
    """
    prefix = "" if section == "run" else f"{section}."
    for name, hint in typing.get_type_hints(type(settings)).items():
        _check_usable(getattr(settings, name), hint, prefix + name)
    for name in _PATHS.get(section, ()):
        _require_home(prefix + name, getattr(settings, name) or "")
    for name, rule in _RULES[section].items():
        value = getattr(settings, name)
        _require(value is None or rule.holds(value), prefix + name, rule.words, value)
    if section in _TOGETHER:
        _TOGETHER[section](settings)


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a config dataclass as nested dicts of JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type[Config], values: Mapping[str, Any], *, path: str = "config") -> Config:
    """Builds the config dataclass `cls` back from `to_dict`'s output or its JSON.

    Args:
        cls: A dataclass of `config.py`.
        values: One entry per field; absent fields take their defaults.
        path: How error messages name this place.

    Raises:
        InputError: A field is unknown, or a value is not of the field's type or range.
    """
    hints = typing.get_type_hints(cls)
    if not _is_mapping(values):
        raise InputError(f"{path} must hold the settings {', '.join(hints)}")
    unknown = sorted(set(values) - set(hints))
    if unknown:
        named = printable(", ".join(unknown))
        raise InputError(f"{path} has no setting {named}; it has {', '.join(hints)}")
    return cls(
        **{name: _convert(hints[name], value, f"{path}.{name}") for name, value in values.items()}
    )


def _is_mapping(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def _is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, (list, tuple))


def _require(condition: bool, field: str, rule: str, value: object) -> None:
    if not condition:
        raise InputError(f"setting {field} must be {rule}, not {printable(repr(value))}")


def _require_home(field: str, path: str) -> None:
    """Refuses the home of a user that this machine doesn't know."""
    unknown = path.startswith("~") and path[1:2] not in ("", "/")
    unknown = unknown and os.path.expanduser(path) == path
    _require(not unknown, field, "a path in the home of a user who exists", path)


def _check_usable(value: Any, hint: Any, field: str) -> None:
    """Refuses a value of another type than its field's, and one that no field can use.

    A `configs/NAME.py` may set anything, and each comparison with NaN, infinity or a number that
    float32 doesn't hold may succeed.
    """
    _convert(hint, value, field)
    for part in value if _is_sequence(value) else (value,):
        if isinstance(part, str):
            usable = part.isprintable() and len(part) <= _LONGEST_TEXT
            _require(usable, field, f"printable and up to {_LONGEST_TEXT} characters", part)
        elif isinstance(part, float):
            usable = part == 0.0 or _FLOAT32[0] <= abs(part) <= _FLOAT32[1]
            _require(usable, field, "a finite number that float32 holds", part)
        elif isinstance(part, int) and field != "seed":
            usable = abs(part) <= _LARGEST_COUNT
            _require(usable, field, f"at most {_LARGEST_COUNT}", part)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Returns `value` as the type `hint` asks for, or raises InputError naming `path`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if type(value) is hint:
            return value
        if _is_mapping(value):
            return from_dict(typing.cast(type[Any], hint), value, path=path)
    # True == 1 == 1.0, so equality alone is not enough.
    if origin is Literal and any(type(value) is type(a) and value == a for a in arguments):
        return value
    if origin is tuple and _is_sequence(value) and len(value) == len(arguments):
        return tuple(_convert(h, v, path) for h, v in zip(arguments, value, strict=True))
    if origin in (typing.Union, types.UnionType):
        for alternative in arguments:
            try:
                return _convert(alternative, value, path)
            except InputError:
                continue
    if hint is types.NoneType and value is None:
        return None
    if hint is float and type(value) is int and abs(value) < _FLOAT32[1]:
        return float(value)
    if hint in (int, float, str, bool) and type(value) is hint:
        return value
    raise InputError(f"{path} can't be {printable(repr(value))}: expected {hint}")


def _check_fold(data: Any) -> None:
    _require(0 <= data.fold < max(data.folds, 1), "data.fold", "below data.folds", data.fold)


def _check_loss_weights(loss: Any) -> None:
    weighs = loss.dice_weight + loss.bce_weight > 0
    _require(weighs, "loss.dice_weight + loss.bce_weight", "positive", 0)


def _check_warmup(schedule: Any) -> None:
    fits = 0 <= schedule.warmup_epochs <= schedule.epochs
    _require(fits, "schedule.warmup_epochs", "0 to schedule.epochs", schedule.warmup_epochs)


def _check_divisible(run: Any) -> None:
    """Halving the image four times in `unet`, five in the others, must leave whole pixels."""
    size, name = run.data.image_size, run.model.name
    divisor = 16 if name == "unet" else 32
    fits = all(side % divisor == 0 for side in size)
    _require(fits, "data.image_size", f"multiples of {divisor} for {name}", size)


_TOGETHER: dict[str, Callable[[Any], None]] = {
    "data": _check_fold,
    "loss": _check_loss_weights,
    "schedule": _check_warmup,
    "run": _check_divisible,
}
