"""What the commands do, imported once their options are read: ``--help`` waits for none of it."""
