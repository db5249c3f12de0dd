"""The ``tinydrop`` command."""
