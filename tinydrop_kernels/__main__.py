"""``python -m tinydrop_kernels`` is the ``tinydrop`` command."""

from tinydrop_kernels.cli import main

if __name__ == "__main__":
    main(prog_name="tinydrop")
