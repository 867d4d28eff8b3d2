"""The training loop and its parts; the command is :mod:`nl_models.train`."""
