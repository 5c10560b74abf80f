"""`fetal-flax summary`: what each network costs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Summarize:
    """Print parameters and multiply-accumulates of every network, by part."""

    model: str | None = None
    """One network's name; without it, all."""

    def run(self) -> int:
        """Prints."""
        import rich.console

        from fetal_flax import summary

        rich.console.Console().print(summary.render(summary.summaries(self.model)))
        return 0
