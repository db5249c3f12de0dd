"""The ``tinydrop`` command. Subcommands are imported on use, because importing torch takes seconds."""

from importlib import import_module

import click

from tinydrop_kernels.version import __version__

COMMANDS = {  # name: module, and line in the help
    "classify": ("classify_command", "Classify images with a patched model, and report the savings."),
    "visualize": ("commands", "Write pictures of the kept patches, and an HTML page to browse them."),
    "evaluate": ("evaluate_command", "Measure accuracy and speed on labelled images, patched against dense."),
    "fit-guidance": ("fit_command", "Fit a guidance model to the target's own answers on your images."),
    "calibrate": (
        "calibrate_command",
        "Find the cheapest policy with a certified limit on its accuracy loss.",
    ),
    "info": ("commands", "Print versions, the device, and the implementation of each operator."),
}


class LazyGroup(click.Group):
    """A group that lists its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; None if there is no command of this name."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"tinydrop_kernels.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands for the help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, package_name="tinydrop_kernels")
def main() -> None:
    """Token dropping for timm's Vision Transformers.

    A tiny guidance model classifies each image first. If it is confident, its answer stands and the image exits.
    Otherwise it selects the patches that go through the large ViT, the target.

    \b
    Examples:
      tinydrop classify photos/ --out rows.jsonl --compare-dense
      tinydrop visualize photos/ --out pictures/
      tinydrop evaluate labelled_photos/
      tinydrop calibrate labelled_photos/ --accuracy-drop 0.5
    """
