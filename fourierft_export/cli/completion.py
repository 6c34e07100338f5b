"""completion: prints a completion script for a shell."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from .console import Outcome, verb

COMPLETE_VARIABLE = "_FOURIERFT_EXPORT_COMPLETE"
_CLASSES: dict[str, type[ShellComplete]] = {
    "bash": BashComplete,
    "zsh": ZshComplete,
    "fish": FishComplete,
}


@verb(
    examples=(
        "completion bash >> ~/.bashrc",
        "completion zsh >> ~/.zshrc",
        "completion fish > ~/.config/fish/completions/fourierft-export.fish",
    )
)
@click.argument("shell", type=click.Choice(list(_CLASSES)))
def completion(shell: str) -> Outcome:
    """Print a completion script for a shell.

    It completes verbs, options and paths.
    """
    root = click.get_current_context().find_root()
    # Not the class's own source(), which starts bash to ask for its version.
    script = ShellComplete.source(
        _CLASSES[shell](root.command, {}, "fourierft-export", COMPLETE_VARIABLE)
    )
    return Outcome({"completion": {"shell": shell, "script": script}}, script.splitlines())
