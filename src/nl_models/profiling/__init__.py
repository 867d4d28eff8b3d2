"""Speed and memory of models against context length; the command is :mod:`nl_models.profile`."""
