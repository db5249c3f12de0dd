"""``python -m tinydrop_kernels`` and ``tinydrop`` are the same command."""

import os


def main() -> None:
    """Run the command, with CPU threads that sleep while they wait.

    OpenMP's threads spin by default. Where other processes want the cores, a thread that spins holds up the one it
    waits for, at each of a model's hundreds of parallel regions. Read once, when torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from tinydrop_kernels.cli.main import main as command

    command(prog_name="tinydrop")


if __name__ == "__main__":
    main()
