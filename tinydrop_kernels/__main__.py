"""The entry point of ``python -m tinydrop_kernels`` and of the command ``tinydrop``."""

import os


def main() -> None:
    """Run the command, with OpenMP threads that sleep while they wait.

    By default, waiting OpenMP threads spin. On a busy machine a spinning thread takes the core from the thread it waits
    for, in each of a model's hundreds of parallel regions.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # OpenMP reads this only once, when torch is imported
    from tinydrop_kernels.cli.main import main as command

    command(prog_name="tinydrop")


if __name__ == "__main__":
    main()
