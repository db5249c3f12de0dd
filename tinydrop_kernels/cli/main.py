"""The ``tinydrop`` command. What a subcommand needs, such as torch, is imported when that subcommand is used."""

from importlib import import_module

import click

from tinydrop_kernels.version import __version__

COMMANDS = {  # name: the module that has it, and its line in the help
    "classify": ("commands", "Classify images: files, and all images in folders."),
    "visualize": ("commands", "Write pictures of the kept patches, and an HTML page to browse them."),
    "calibrate": (
        "calibrate_command",
        "Find the cheapest policy with a certified bound on its loss of accuracy.",
    ),
    "info": ("commands", "Print versions, the device, and the implementation that each operator would run."),
}


class LazyGroup(click.Group):
    """A group that lists its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"tinydrop_kernels.cli.{COMMANDS[cmd_name][0]}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands for the help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, package_name="tinydrop_kernels")
def main() -> None:
    """Token dropping for timm's Vision Transformers."""
